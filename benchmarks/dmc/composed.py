"""A pruned model with a compressed cache: quality, memory of the cache at 16k tokens and speed, in one table.

Four models from the `parent` of `quality`, as many tokens of training for each step: as it is (`vanilla+`), its cache
compressed 4 times (`dmc`), cut to about half of its parameters and distilled (`pruned`), and that with its cache
compressed 4 times (`pruned dmc`). Half of the key-value heads go with the cut, so the cache shrinks twice over.
Caches for memory and speed are filled at the ratio that was measured on held-out rows; the models take turns decoding.

    python -m benchmarks.dmc.composed [--seed 0] [--tokens N] [--context 16384] [--rounds 5] [--work DIR]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.dmc.corpus import held_out
from benchmarks.dmc.parent import HOW, TOKENS, parent, rows
from benchmarks.dmc.quality import RATE, RATIO, kept_score, train_arm, versions
from benchmarks.dmc.speed import STEPS, fill_static, interleaved, slot_cache, stepper
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

import nestling as nl
from nestling import dmc

RESULT = Path(__file__).parents[1] / "results/dmc/composed.json"
SHAPE = nl.Shape(intermediate_size=144, num_key_value_heads=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of each step")
    parser.add_argument("--parent-tokens", type=int, default=TOKENS)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs/dmc-quality"))
    chosen = parser.parse_args()
    folders = models(chosen)
    loaded = {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in folders.items()}
    scores = {name: kept_score(path) for name, path in folders.items()}
    found = measured(loaded, scores, chosen.context, chosen.rounds)
    show(found, chosen.context)
    words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(chosen).items() if name != "work")
    about = versions() | {"command": f"python -m benchmarks.dmc.composed {words}", "seeds": [chosen.seed]}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(about | {"rows": found, "claims": {}}, indent=1) + "\n")


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
    loaded: dict[str, PreTrainedModel], scores: dict[str, Any], context: int, rounds: int
) -> list[dict[str, Any]]:
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
    taken = interleaved(arms, rounds)
    return [
        {"arm": name, "parameters": model.num_parameters(), "cache_bytes": held[name], **scores[name]}
        | {"tokens_per_s": 1000 * STEPS / median(taken[name]), "all_ms": [ms / STEPS for ms in taken[name]]}
        for name, model in loaded.items()
    ]


def show(found: list[dict[str, Any]], context: int) -> None:
    columns = ("model", "parameters", "loss", "recall", f"cache at {context:,}, MB", "tokens per second")
    table = Table(*columns, title="pruned and compressed", box=None)
    for row in found:
        quality = (f"{row['loss']:.4f}", f"{row['recall']:.3f}")
        cost = (f"{row['cache_bytes'] / 1e6:.2f}", f"{row['tokens_per_s']:.0f}")
        table.add_row(row["arm"], f"{row['parameters']:,}", *quality, *cost)
    Console().print(table)


if __name__ == "__main__":
    main()
