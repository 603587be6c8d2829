"""A pruned model with a compressed cache: quality, memory of the cache at 16k tokens and speed, in one table.

Four models from the `parent` of `quality`, as many tokens of training for each step: as it is (`vanilla+`), its cache
compressed 4 times (`dmc`), cut to about half of its parameters and distilled (`pruned`), and that with its cache
compressed 4 times (`pruned dmc`). Half of the key-value heads go with the cut, so the cache shrinks twice over.
Caches for memory and speed are filled at the ratio that was measured on held-out rows; the models take turns decoding.

    python -m benchmarks.dmc.composed [--seed 0] [--tokens N] [--context 16384] [--rounds 5] [--processor] [--work DIR]

Models are kept in `--work`, those of `quality` among them, and an interrupted training goes on.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.dmc.corpus import held_out
from benchmarks.dmc.parent import HOW, TOKENS, parent, rows
from benchmarks.dmc.quality import RATE, RATIO, RETROFIT, score, train_arm
from benchmarks.dmc.speed import STEPS, Clock, fill_static, interleaved, slot_cache, stepper
from benchmarks.record import Record, Row, claim
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

import nestling as nl
from nestling import dmc

SHAPE = nl.Shape(intermediate_size=128, num_key_value_heads=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=RETROFIT, help="of each step")
    parser.add_argument("--parent-tokens", type=int, default=TOKENS)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor", action="store_true", help="processor time of one thread, for a busy machine")
    parser.add_argument("--work", type=Path, default=Path("runs/dmc-quality"))
    chosen = parser.parse_args()
    if chosen.processor:
        torch.set_num_threads(1)
    clock = time.process_time if chosen.processor else time.perf_counter
    record, folders = Record("dmc", "composed"), models(chosen)
    loaded = {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in folders.items()}
    scores = {name: score(path) for name, path in folders.items()}
    record.rows = measured(loaded, scores, chosen.context, chosen.rounds, clock)
    record.save(claims(record.rows, chosen), seeds=[chosen.seed], threads=torch.get_num_threads())
    show(record.rows, chosen.context)


def models(chosen: argparse.Namespace) -> dict[str, Path]:
    """The folders of the four models, made if they are not there."""
    start = parent(chosen.work, chosen.parent_tokens)
    how = (chosen.tokens, chosen.seed)
    folders = {name: chosen.work / f"{start.name}-{name}-{chosen.tokens}-s{chosen.seed}" for name in ("cut", "cut-dmc")}
    for arm, ratio in (("vanilla+", 1), ("dmc", RATIO)):
        folders[arm] = chosen.work / f"{start.name}-{arm}-{ratio}-{chosen.tokens}-s{chosen.seed}"
        train_arm(start, folders[arm], arm, ratio, *how)
    if not (folders["cut"] / "config.json").exists():
        cut(start, folders["cut"], *how).save_pretrained(folders["cut"])
    train_arm(folders["cut"], folders["cut-dmc"], "dmc", RATIO, *how)
    names = {"vanilla+": "vanilla+", "dmc": "dmc", "pruned": "cut", "pruned dmc": "cut-dmc"}
    return {name: folders[folder] for name, folder in names.items()}


def cut(start: Path, folder: Path, tokens: int, seed: int) -> PreTrainedModel:
    """The parent cut to `SHAPE` and distilled from it."""
    teacher: PreTrainedModel = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    ranking = nl.rank(teacher, [{"input_ids": part} for part in held_out(32, seed=7)[0].split(8)])
    small = nl.prune(teacher, ranking, SHAPE)
    how = HOW | {"tokens": tokens, "seed": seed, "learning_rate": RATE, "save_every": 50}
    return nl.distill(small, teacher, rows(tokens, seed + 1), run_dir=folder, **how)


@torch.no_grad()
def measured(
    loaded: dict[str, PreTrainedModel], scores: dict[str, Row], context: int, rounds: int, clock: Clock
) -> list[Row]:
    """A row per model: parameters, quality, bytes of the cache after `context` tokens, tokens per second."""
    arms, held = {}, {}
    for name, model in loaded.items():
        config, ratio = model.config, scores[name].get("measured")
        if ratio is None:
            cache: Any = StaticCache(config=config, max_cache_len=context + STEPS * (rounds + 2))
            fill_static(cache, config, context)
            held[name] = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context * 4
        else:
            cache = slot_cache(model, context, ratio)
            held[name] = dmc.cache_bytes(cache)
        arms[name] = stepper(model, cache, context)
    taken = interleaved(arms, rounds, clock)
    return [
        {"arm": name, "parameters": model.num_parameters(), "cache_bytes": held[name], **scores[name]}
        | {"tokens_per_s": 1000 * STEPS / median(taken[name]), "all_ms": [ms / STEPS for ms in taken[name]]}
        for name, model in loaded.items()
    ]


def claims(found: list[Row], chosen: argparse.Namespace) -> dict[str, Row]:
    """Of the model that is pruned and compressed, against the one that is neither."""
    before, after = found[0], found[-1]
    rounds = [a / b for a, b in zip(before["all_ms"], after["all_ms"], strict=True)]
    clock = "processor time, one thread" if chosen.processor else f"{torch.get_num_threads()} threads"
    how = f"vanilla+ over the model cut to half and compressed {RATIO} times, {chosen.tokens:,} tokens a step"
    speed = claim(rounds, [chosen.seed], f"decoding after {chosen.context:,} tokens, {clock}: {how}", "x")
    figures = {
        "composed_cache_ratio": (before["cache_bytes"] / after["cache_bytes"], "bytes of the cache"),
        "composed_loss_ratio": (after["loss"] / before["loss"], "held-out loss, the other way about"),
    }
    made = {name: claim([value], [chosen.seed], f"{what}: {how}", "x") for name, (value, what) in figures.items()}
    return made | {"composed_speedup": speed | {"value": round(median(rounds), 2)}}


def show(found: list[Row], context: int) -> None:
    columns = ("model", "parameters", "loss", "recall", f"cache at {context:,}, MB", "tokens per second")
    table = Table(*columns, title="pruned and compressed", box=None)
    for row in found:
        quality = (f"{row['loss']:.4f}", f"{row['recall']:.3f}")
        cost = (f"{row['cache_bytes'] / 1e6:.2f}", f"{row['tokens_per_s']:.0f}")
        table.add_row(row["arm"], f"{row['parameters']:,}", *quality, *cost)
    Console().print(table)


if __name__ == "__main__":
    main()
