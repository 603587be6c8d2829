"""The command line: one verb per job, each verb the dataclass that its Python call and its YAML file use.

Thin on purpose: it parses, calls and prints. A mistake in the input is one sentence and exit code 2; Ctrl-C is exit
code 130, SIGTERM 143, and the run folder is as the last finished stage or checkpoint left it.
"""

from __future__ import annotations

import errno
import json
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from nestling.cli.arguments import meant, near, options, spelled_out
from nestling.cli.job import Job
from nestling.errors import NestlingError

# What the file system refuses anywhere is the user's to mend; other errors of the system are bugs.
PLACE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
# verb, of one word or two -> (module, settings, function, one line of help)
VERBS = {
    "inspect": ("inspect", "InspectSettings", "inspect", "what a model is made of, and what it costs"),
    "rank": ("rank", "RankSettings", "rank_model", "importance of everything, saved"),
    "search": ("search", "SearchSettings", "search", "candidate shapes for a budget, ranked"),
    "prune": ("prune", "PruneSettings", "prune_model", "cut a model to a budget or a shape"),
    "pretrain": ("pretrain", "PretrainVerb", "pretrain_model", "train a model from scratch on text"),
    "distill": ("distill", "DistillVerb", "distill_model", "retrain a student from its teacher"),
    "compress": ("compress", "CompressSettings", "compress", "the whole job: rank, search, prune, distill, report"),
    "family": ("family", "FamilySettings", "family", "several children of one model in one job"),
    "moe upcycle": ("moe", "UpcycleSettings", "upcycle_model", "a dense model as a mixture of experts"),
    "moe prune": ("moe", "ExpertSettings", "prune_experts", "fewer experts: drop, merge, or make one dense FFN"),
    "moe train": ("moe", "MixtureVerb", "train_mixture", "train a standard or fine-grained mixture"),
    "export": ("export", "ExportSettings", "export", "a model as a GGUF file, for llama.cpp"),
    "eval": ("evaluate", "EvalSettings", "evaluate_model", "perplexity, minimal pairs, lm-eval tasks"),
    "plan": ("plan", "PlanSettings", "plan_job", "what a job takes on machines that are not here: memory, time"),
    "bench": ("evaluate", "BenchSettings", "bench", "prefill and decode speed of models, side by side"),
    "elastic train": ("elastic", "ElasticTrain", "elastic_train", "many nested members in one training run"),
    "elastic extract": ("elastic", "ElasticExtract", "elastic_extract", "one member as a checkpoint of its own"),
    "elastic inspect": ("elastic", "ElasticInspect", "elastic_inspect", "a family's members, costs and shapes"),
    "dmc retrofit": ("dmc", "RetrofitVerb", "retrofit_model", "teach a model to share slots of its KV cache"),
    "dmc show": ("dmc", "ShowVerb", "show", "which tokens of a text share a slot"),
    "dmc eval": ("dmc", "DmcEval", "dmc_eval", "perplexity and tokens per slot of a compressed cache"),
    "report": ("report", "ReportSettings", "report", "write the page of a finished run anew"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    job = Job()
    try:
        with job.running():
            return _run(arguments)
    except NestlingError as error:
        return _refuse(job, str(error))
    except OSError as error:
        if error.errno not in PLACE_ERRORS:
            raise
        what = f"'{error.filename}'" if error.filename else "a file"
        return _refuse(job, f"{what} cannot be written or read ({error.strerror}): make room, or mend its rights")
    except KeyboardInterrupt:
        return job.say("nestling: interrupted; run the same command again to continue", job.interrupted_code)


def _refuse(job: Job, sentence: str) -> int:
    return job.say(f"nestling: {' '.join(sentence.split())}", 2)


def _run(arguments: list[str]) -> int:
    from argparse import ArgumentError

    arguments = _in_words(arguments)
    named = _named(arguments)
    words = [argument for argument in arguments if not argument.startswith("-")]
    if named is None and words:
        raise NestlingError(f"'{words[0]}' is not a verb: {near(words, VERBS)}, see nestling --help")
    try:
        chosen, values = _parsed(_with_present_names(arguments, named), named)
    except ArgumentError as error:
        raise NestlingError(f"{_plain(str(error))}: {', '.join(_hints(str(error), named))}") from error
    as_json = values.pop("json")
    values.pop("config", None)
    module, _, function, _ = VERBS[chosen]
    result = getattr(import_module(f"nestling.recipes.{module}"), function)(_settings(chosen)(**values))
    if as_json:
        print(json.dumps(result, default=str))
    return 0


def _hints(message: str, verb: str | None) -> list[str]:
    """What helps with a message of the parser."""
    found = [f"{old} is called {new} now" for old, new in _former(verb).items() if _names(message, old)]
    guess = meant(message, options(_settings(verb))) if verb and not found else None
    return [*found, *([guess] if guess else []), f"see nestling {verb} --help" if verb else "see nestling --help"]


def _former(verb: str | None) -> dict[str, str]:
    """Former names of a verb's settings, and what they are called now."""
    return dict(getattr(_settings(verb), "FORMER", {})) if verb else {}


def _with_present_names(arguments: list[str], verb: str | None) -> list[str]:
    """Arguments in which former names stand no more; each that did is told."""
    found = list(arguments)
    for old, new in _former(verb).items():
        for place, argument in enumerate(found):
            if argument.partition("=")[0] == f"--{old}":
                found[place] = f"--{new}{argument.removeprefix(f'--{old}')}"
                print(f"nestling: --{old} of {verb} is called --{new} now", file=sys.stderr)
    return found


def _names(message: str, setting: str) -> bool:
    return re.search(rf"\b{setting}\b", message) is not None


def _settings(verb: str) -> Any:
    """The class of a verb's settings."""
    module, settings, _, _ = VERBS[verb]
    return getattr(import_module(f"nestling.recipes.{module}"), settings)


def _plain(message: str) -> str:
    """What the argument parser says, in the words of the command line."""
    text = " ".join(line.strip(" -") for line in message.splitlines()[:3])
    text = re.sub(r'Parser key "(?:\w+\.)?([\w.]+)":', r"--\1:", text)
    return re.sub(r"Expected a <class '(\w+)'>\. Got value: ", r"expected \1, got ", text).rstrip(":. ")


def _in_words(arguments: list[str]) -> list[str]:
    """Arguments in which a verb of two words, written with a hyphen, stands as two."""
    words = {_hyphened(verb): verb.split() for verb in VERBS}
    return [*words.get(arguments[0], arguments[:1]), *arguments[1:]] if arguments else []


def _named(arguments: list[str]) -> str | None:
    """The verb on the command line: its first two words, or one of them."""
    return next((verb for verb in (" ".join(arguments[:2]), *arguments) if verb in VERBS), None)


def _parsed(arguments: list[str], named: str | None) -> tuple[str, dict[str, Any]]:
    """The verb, and its settings by name. A verb of two words is one word with a hyphen to the parser."""
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def format_help(self, *arguments: Any, **options: Any) -> str:
            text = super().format_help(*arguments, **options)
            for verb in VERBS:
                text = text.replace(f" {_hyphened(verb)} ", f" {verb} ")
            return str(text)

    parser = Parser(prog="nestling", description="Turn one language model into a family.", exit_on_error=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {import_module('nestling').__version__}")
    verbs = parser.add_subcommands(required=True, dest="verb", metavar="VERB")
    if named and " " in named:
        arguments = [_hyphened(named), *arguments[2:]]
    for verb, (_, _, _, summary) in VERBS.items():
        sub = Parser(description=summary, exit_on_error=False, allow_abbrev=False)
        if named in (None, verb):
            sub.add_argument("--config", action="config", help="YAML file with these settings")
            sub.add_argument("--json", action="store_true", help="print one JSON object on the last line")
        if named == verb:
            sub.add_class_arguments(_settings(verb), as_positional=True)
        verbs.add_subcommand(_hyphened(verb), sub, help=summary)
    chosen = parser.parse_args(spelled_out(arguments, options(_settings(named))) if named else arguments)
    verb = next(verb for verb in VERBS if _hyphened(verb) == chosen.verb)
    return verb, parser.instantiate_classes(chosen)[chosen.verb].as_dict()


def _hyphened(verb: str) -> str:
    return verb.replace(" ", "-")
