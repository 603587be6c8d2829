"""The command line: one verb per job, each verb the dataclass that its Python call and its YAML file use.

Thin on purpose: it parses, calls and prints. A mistake in the input is one sentence and exit code 2; Ctrl-C is exit
code 130, and the run folder is as the last finished stage or checkpoint left it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module

from nestling.errors import NestlingError

# verb -> (module, settings, function, one line of help)
VERBS = {
    "inspect": ("inspect", "InspectSettings", "inspect", "what a model is made of, and what it costs"),
    "rank": ("rank", "RankSettings", "rank_model", "importance of everything, saved"),
    "search": ("search", "SearchSettings", "search", "candidate shapes for a budget, ranked"),
    "prune": ("prune", "PruneSettings", "prune_model", "cut a model to a budget or a shape"),
    "pretrain": ("pretrain", "PretrainVerb", "pretrain_model", "train a model from scratch on text"),
    "distill": ("distill", "DistillVerb", "distill_model", "retrain a student from its teacher"),
    "compress": ("compress", "CompressSettings", "compress", "the whole job: rank, search, prune, distill, report"),
    "eval": ("evaluate", "EvalSettings", "evaluate_model", "perplexity, minimal pairs, lm-eval tasks"),
    "bench": ("evaluate", "BenchSettings", "bench", "prefill and decode speed of models, side by side"),
    "report": ("report", "ReportSettings", "report", "write the page of a finished run anew"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(arguments)
    except NestlingError as error:
        print(f"nestling: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nestling: interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="nestling", description="Turn one language model into a family.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {import_module('nestling').__version__}")
    verbs = parser.add_subcommands(required=True, dest="verb", metavar="VERB")
    named = next((argument for argument in arguments if argument in VERBS), None)
    for verb, (module, settings, _, summary) in VERBS.items():
        sub = ArgumentParser(description=summary)
        if named in (None, verb):
            sub.add_argument("--config", action="config", help="YAML file with these settings")
            sub.add_argument("--json", action="store_true", help="print one JSON object on the last line")
        if named == verb:
            sub.add_class_arguments(getattr(import_module(f"nestling.recipes.{module}"), settings), as_positional=True)
        verbs.add_subcommand(verb, sub, help=summary)
    chosen = parser.parse_args(arguments)
    values = parser.instantiate_classes(chosen)[chosen.verb].as_dict()
    as_json = values.pop("json")
    values.pop("config", None)
    module, settings, function, _ = VERBS[chosen.verb]
    recipe = import_module(f"nestling.recipes.{module}")
    result = getattr(recipe, function)(getattr(recipe, settings)(**values))
    if as_json:
        print(json.dumps(result, default=str))
    return 0
