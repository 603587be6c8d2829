"""Fewer experts by each criterion: what a quarter or half of them costs, dropped or merged; and after distilling.

Parents are the fine-grained models (64 experts, 8 of a token) that `fine_grained.py` left in the work folder. Figures
are held-out loss above the parent's, before and after distillation from it. Rows are kept in the work folder one by
one, so that an interrupted run goes on.

    python benchmarks/moe/pruning.py --work runs/moe [--steps 150] [--seeds 0 1] [--distill_steps 20]
"""

from __future__ import annotations

import argparse
import json
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

CRITERIA = ("reap", "random", "frequency", "gate", "contribution", "output_error")
KEPT = (48, 32)
MERGED = ("reap", "frequency")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with the runs of fine_grained.py")
    parser.add_argument("--steps", type=int, default=150, help="of the parents' training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--distill_steps", type=int, default=20)
    chosen = parser.parse_args()
    words, rows = tokenizer(chosen.work), []
    for seed in chosen.seeds:
        parent, _ = hub.load(chosen.work / f"small-{chosen.steps}/1x-G8-post-{seed}/model")
        whole, calibration = held_out(parent, words), texts(words)
        for criterion in CRITERIA:
            for kept in KEPT:
                for how in ("drop", "merge") if criterion in MERGED else ("drop",):
                    record = chosen.work / f"pruned-{chosen.steps}-{chosen.distill_steps}"
                    record /= f"{seed}-{criterion}-{kept}-{how}.json"
                    if not record.exists():
                        child = made(parent, criterion, kept, how, calibration, seed)
                        row = {"seed": seed, "criterion": criterion, "how": how, "kept": kept}
                        row["damage"] = round(held_out(child, words) - whole, 5)
                        learn: dict[str, Any] = options(chosen.distill_steps, seed, 1e-3)
                        distill(child, parent, DATA, words, **learn)
                        row["damage_distilled"] = round(held_out(child, words) - whole, 5)
                        record.parent.mkdir(parents=True, exist_ok=True)
                        record.write_text(json.dumps(row))
                    rows.append(json.loads(record.read_text()))
                    conclude(rows, chosen.seeds)
    show(rows)


def ranked(parent: PreTrainedModel, criterion: str, calibration: list, seed: int) -> Ranking:
    if criterion != "random":
        return rank(parent, calibration, metric={"num_experts": criterion})
    generator = torch.Generator().manual_seed(seed)
    return Ranking(
        {"num_experts": tuple(torch.rand(64, generator=generator) for _ in range(Anatomy.of(parent).num_layers))}
    )


def made(parent: PreTrainedModel, criterion: str, kept: int, how: str, calibration: list, seed: int) -> PreTrainedModel:
    """The parent with `kept` experts in each layer, the others dropped or merged into them."""
    ranking = ranked(parent, criterion, calibration, seed)
    if how == "merge":
        return merge(parent, ranking, kept, loads(parent, calibration))
    return prune(parent, Ranking({"num_experts": ranking.scores["num_experts"]}), {"num_experts": kept})


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
        done = [seed for seed in done if (seed, "random") in found]
        if not done:
            continue
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
