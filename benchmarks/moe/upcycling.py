"""A mixture upcycled from a dense model, against the dense model trained on and a mixture from scratch, at equal FLOPs.

A small Qwen3 (see `small.py`) is trained; then every arm gets the FLOPs of `--more` steps of it, counted per token by
`nestling.cost`, routers included. Upcycled arms have 64 experts of an eighth of the FFN, 8 of a token (1x the FFN),
with logits that stay (exact) or nearly (paper), or 8 whole ones, 2 of a token (2x). The arm from scratch also gets
the FLOPs of the parent. Figures: held-out loss before and after.

    python benchmarks/moe/upcycling.py --work runs/moe [--seeds 0 1] [--steps 300] [--more 150]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.moe.small import CONTEXT, claim, fresh, trained, write
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from nestling import hub
from nestling.cost import cost
from nestling.moe import upcycle

FINE = (8, 1, 8)
# name -> what is made of the parent, and whether the arm also gets the parent's FLOPs
ARMS: dict[str, tuple[Callable[[PreTrainedModel, Path, int], PreTrainedModel], bool]] = {
    "dense continued": (lambda parent, work, seed: parent, False),
    "upcycled 1x G8 exact": (lambda parent, work, seed: upcycle(parent, *FINE, seed=seed), False),
    "upcycled 1x G8 paper": (lambda parent, work, seed: upcycle(parent, *FINE, mode="paper", seed=seed), False),
    "upcycled 2x G1 exact": (lambda parent, work, seed: upcycle(parent, 8, 2, 1, seed=seed), False),
    "scratch 1x G8": (lambda parent, work, seed: fresh(work, "small", seed, (*FINE, True)), True),
}
RATE = 4e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=300, help="of the dense parent, of 2,048 tokens")
    parser.add_argument("--more", type=int, default=150, help="whose FLOPs each arm gets, in steps of the parent")
    chosen = parser.parse_args()
    rows: list[dict] = []
    for seed in chosen.seeds:
        folder = f"upcycling-{chosen.steps}-{chosen.more}"
        parent_at = f"{folder}/parent-{seed}"
        trained(chosen.work, parent_at, lambda s=seed: fresh(chosen.work, "small", s, None), chosen.steps, seed, RATE)
        for arm, (make, whole) in ARMS.items():
            parent, _ = hub.load(chosen.work / parent_at / "model")
            model = make(parent, chosen.work, seed)
            budget = (chosen.more + whole * chosen.steps) * cost(parent, context=CONTEXT).flops_per_token
            steps = round(budget / cost(model, context=CONTEXT).flops_per_token)
            name = f"{folder}/{arm.replace(' ', '-')}-{seed}"
            # another seed for the order of the data, so that continued arms do not see the parent's batches again
            row = trained(chosen.work, name, lambda m=model: m, steps, seed + 100 * (not whole), RATE)
            rows.append({"arm": arm, **row, "seed": seed})
            write("upcycling", rows, claims(rows, chosen.seeds), chosen.seeds)
    show(rows)


def claims(rows: list[dict], seeds: list[int]) -> dict[str, dict]:
    """Gains of the fine upcycled model over the dense one trained on and over the one from scratch."""
    losses = {(row["arm"], row["seed"]): row["loss"] for row in rows}
    found = {}
    for name, other in (("continued_dense", "dense continued"), ("scratch", "scratch 1x G8")):
        done = [s for s in seeds if ("upcycled 1x G8 exact", s) in losses and (other, s) in losses]
        if done:
            gains = [losses[other, s] - losses["upcycled 1x G8 exact", s] for s in done]
            how = f"held-out loss of '{other}' minus that of the upcycled 64 experts top 8, equal FLOPs"
            found[f"upcycled_vs_{name}_loss_gain"] = claim(gains, done, how)
    return found


def show(rows: list[dict]) -> None:
    table = Table("arm", "seed", "loss before", "loss", "steps", "params", "active", "seconds")
    for row in rows:
        losses = (f"{row['loss_before']:.3f}", f"{row['loss']:.3f}")
        counts = (str(row["steps"]), f"{row['params']:,}", f"{row['active_params']:,}", f"{row['seconds']:.0f}")
        table.add_row(row["arm"], str(row["seed"]), *losses, *counts)
    Console().print(table)


if __name__ == "__main__":
    main()
