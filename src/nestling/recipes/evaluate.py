"""`nestling eval` and `nestling bench`: how good and how fast checkpoints are."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from nestling import evaluate
from nestling.anatomy import compiled_steps
from nestling.errors import DataError
from nestling.recipes.progress import bar, console
from nestling.recipes.settings import ModelSettings, at_least, listed
from nestling.recipes.source import Source, load, measured
from nestling.report.human import figure
from nestling.train import documented
from nestling.train.settings import check_seed

COMPILERS = ("g++", "clang++")


@documented
@dataclass
class EvalSettings(ModelSettings):
    """Settings of `eval`.

    Args:
        model: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        data: Texts to measure perplexity on, with commas between: hub datasets, files, folders, builtin:stdlib.
        split: Part of that text: validation, train or all.
        tokens: Tokens per text.
        context: Tokens per window.
        stride: Tokens between windows; the context unless given.
        pairs: File or folder of minimal pairs in BLiMP's JSONL format.
        tasks: lm-eval tasks by name, with commas between.
        limit: Examples per lm-eval task and pairs per file; all unless given.
        seed: The one seed of every random choice.
    """

    model: str
    data: str | list[str] = ""
    split: str = "validation"
    tokens: int = 8192
    context: int = 512
    stride: int | None = None
    pairs: str | None = None
    tasks: str | list[str] = ""
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        at_least("tokens", self.tokens, 1)
        if self.limit is not None:
            at_least("limit", self.limit, 1)


@documented
@dataclass
class BenchSettings(ModelSettings):
    """Settings of `bench`.

    Args:
        models: Hub ids, folders or GGUF files to measure side by side, with commas between.
        prompt_tokens: Length of the prompt that is prefilled.
        new_tokens: Tokens decoded after it.
        batch: Sequences at once.
        rounds: Rounds that count, after one that does not.
        compiled: Decode with the Mamba mixers of hybrids compiled; needs a C++ compiler on a CPU.
    """

    models: str | list[str]
    prompt_tokens: int = 512
    new_tokens: int = 32
    batch: int = 1
    rounds: int = 5
    compiled: bool = False


def evaluate_model(settings: EvalSettings) -> dict[str, Any]:
    """Measure what was asked for; returns it. Raises `DataError` when nothing was."""
    if not (settings.data or settings.pairs or settings.tasks):
        raise DataError("eval has nothing to measure: give --data, --pairs or --tasks")
    source = Source.open(settings)
    results: dict[str, Any] = {}
    for spec in listed(settings.data):
        window: dict[str, Any] = {"context": settings.context, "stride": settings.stride, "split": settings.split}
        what = f"perplexity on {spec}"
        results[spec] = measured(what, source.model, source.tokenizer, spec, settings.tokens, **window)
    if settings.pairs:
        pairs = evaluate.minimal_pairs(source.model, source.tokenizer, settings.pairs, limit=settings.limit)
        results["minimal pairs"] = asdict(pairs)
    if settings.tasks:
        results |= evaluate.harness(source.model, source.tokenizer, listed(settings.tasks), limit=settings.limit)
    console.print(_scores(results))
    return results


def bench(settings: BenchSettings) -> dict[str, Any]:
    """Measure prefill and decode speed, interleaved in one process; returns the figures of each model."""
    names = listed(settings.models)
    if not names:
        raise DataError("bench has nothing to measure: give at least one model")
    if settings.compiled and not any(map(shutil.which, COMPILERS)):
        raise DataError(f"--compiled needs a C++ compiler ({' or '.join(COMPILERS)}): install one, or leave it out")
    models = {name: load(settings, name)[0] for name in names}
    with bar("rounds", settings.rounds + 1) as advance, ExitStack() as faster:
        for model in models.values() if settings.compiled else ():
            faster.enter_context(compiled_steps(model))
        found = evaluate.speed(
            models,
            prompt_tokens=settings.prompt_tokens,
            new_tokens=settings.new_tokens,
            batch=settings.batch,
            rounds=settings.rounds,
            progress=advance,
        )
    table = Table(title="tokens per second, median", title_justify="left", box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    table.add_column("prefill", justify="right")
    table.add_column("decode", justify="right")
    for name, speed in found.items():
        table.add_row(name, figure(speed.prefill_tokens_per_s), figure(speed.decode_tokens_per_s))
    console.print(table)
    return {name: asdict(speed) for name, speed in found.items()}


def _scores(results: dict[str, Any]) -> Table:
    table = Table(title="evaluation", title_justify="left", box=None, pad_edge=False)
    table.add_column("on", overflow="fold")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, values in results.items():
        for measure in ("perplexity", "accuracy") if {"perplexity", "accuracy"} & set(values) else values:
            if isinstance(values.get(measure), float):
                table.add_row(name, measure, figure(values[measure]))
    return table
