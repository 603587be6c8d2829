"""Fewer experts by each criterion: what a quarter or half of them costs, dropped or merged; and after distilling.

Parents are the fine-grained models (64 experts, 8 of a token) that `fine_grained.py` left in the work folder. Figures
are held-out loss above the parent's; distillation is 40 steps of 2,048 tokens from the parent.

    python benchmarks/moe/pruning.py --work runs/moe [--steps 150] [--seeds 0 1]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from benchmarks.moe.small import DATA, claim, held_out, options, texts, tokenizer, write
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from nestling import hub
from nestling.anatomy import Anatomy
from nestling.distill import distill
from nestling.moe import loads, merge
from nestling.ranking import Ranking, rank
from nestling.surgery import prune

CRITERIA = ("random", "frequency", "gate", "reap", "contribution", "output_error")
KEPT = (48, 32)
DISTILLED = ("random", "reap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with the runs of fine_grained.py")
    parser.add_argument("--steps", type=int, default=150, help="of the parents' training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--distill_steps", type=int, default=40)
    chosen = parser.parse_args()
    words, rows = tokenizer(chosen.work), []
    for seed in chosen.seeds:
        parent, _ = hub.load(chosen.work / f"small-{chosen.steps}/1x-G8-post-{seed}/model")
        whole, calibration = held_out(parent, words), texts(words)
        for criterion in CRITERIA:
            ranking = ranked(parent, criterion, calibration, seed)
            for kept in KEPT:
                for how, child in children(parent, ranking, criterion, kept, calibration).items():
                    row = {"seed": seed, "criterion": criterion, "how": how, "kept": kept}
                    rows.append(row | {"damage": held_out(child, words) - whole})
                    if criterion in DISTILLED and how == "drop":
                        learn: dict[str, Any] = options(chosen.distill_steps, seed, 1e-3)
                        distill(child, parent, DATA, words, **learn)
                        rows[-1]["damage_distilled"] = held_out(child, words) - whole
        conclude(rows, chosen.seeds)
    show(rows)


def ranked(parent: PreTrainedModel, criterion: str, calibration: list, seed: int) -> Ranking:
    if criterion != "random":
        return rank(parent, calibration, metric={"num_experts": criterion})
    generator = torch.Generator().manual_seed(seed)
    return Ranking(
        {"num_experts": tuple(torch.rand(64, generator=generator) for _ in range(Anatomy.of(parent).num_layers))}
    )


def children(parent: PreTrainedModel, ranking: Ranking, criterion: str, kept: int, calibration: list) -> dict:
    made = {"drop": prune(parent, Ranking({"num_experts": ranking.scores["num_experts"]}), {"num_experts": kept})}
    if criterion in ("frequency", "reap"):
        made["merge"] = merge(parent, ranking, kept, loads(parent, calibration))
    return made


def conclude(rows: list[dict], seeds: list[int]) -> None:
    """Write what is known so far."""
    claims = {}
    for kept in KEPT:
        found = {
            (row["seed"], row["criterion"]): row["damage"]
            for row in rows
            if row["kept"] == kept and row["how"] == "drop"
        }
        done = [seed for seed in seeds if (seed, "reap") in found]
        gaps = [found[seed, "random"] - found[seed, "reap"] for seed in done]
        how = f"held-out loss of random minus REAP, {kept} of 64 experts kept, no distillation"
        claims[f"reap_vs_random_loss_gap_{kept}of64"] = claim(gaps, done, how)
    write("pruning", rows, claims, seeds)


def show(rows: list[dict]) -> None:
    table = Table("seed", "criterion", "how", "kept", "damage", "after distilling")
    for row in rows:
        after = f"{row['damage_distilled']:.4f}" if "damage_distilled" in row else "-"
        table.add_row(str(row["seed"]), row["criterion"], row["how"], str(row["kept"]), f"{row['damage']:.4f}", after)
    Console().print(table)


if __name__ == "__main__":
    main()
