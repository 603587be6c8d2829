"""Router choices, one changed at a time: what each does to the held-out loss and to how even the load is.

Small Qwen3-MoE from scratch (see `small.py`), 64 experts of an eighth of the FFN, 8 of a token. An arm is a line of
`ARMS`: whether weights are normalized over the chosen, and settings of the training that differ from the defaults.

    python benchmarks/moe/ablations.py --work runs/moe [--seeds 0 1] [--steps 200] [--arms default pre ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.moe.small import claim, fresh, trained, write
from rich.console import Console
from rich.table import Table

ARMS: dict[str, tuple[bool, dict[str, Any]]] = {
    "default": (True, {}),
    "pre": (False, {}),
    "pre, small output": (False, {"init_scale": 1 / 8}),
    "small output": (True, {"init_scale": 1 / 8}),
    "no balance": (True, {"balance": 0.0}),
    "balance 0.001": (True, {"balance": 1e-3}),
    "balance 0.1": (True, {"balance": 0.1}),
    "balance per batch": (True, {"balance_over": "batch"}),
    "balance per sequence": (True, {"balance_over": "sequence"}),
    "no z-loss": (True, {"z_loss": 0.0}),
    "capacity 1.25": (True, {"capacity": 1.25}),
}
RATE = 4e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=200, help="of 2,048 tokens")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="only these")
    chosen = parser.parse_args()
    rows: list[dict] = []
    for seed in chosen.seeds:
        for arm in chosen.arms:
            normalized, settings = ARMS[arm]
            name = f"ablations-{chosen.steps}/{arm.replace(' ', '-').replace(',', '')}-{seed}"
            make = lambda n=normalized, s=seed: fresh(chosen.work, "small", s, (8, 1, 8, n))  # noqa: E731
            row = trained(chosen.work, name, make, chosen.steps, seed, RATE, **settings)
            rows.append({"arm": arm, **row})
            write("ablations", rows, claims(rows, chosen.seeds), chosen.seeds)
    show(rows)


def claims(rows: list[dict], seeds: list[int]) -> dict[str, dict]:
    """How much better the default is than each other arm."""
    losses = {(row["arm"], row["seed"]): row["loss"] for row in rows}
    found = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        done = [s for s in seeds if (arm, s) in losses and ("default", s) in losses]
        if arm != "default" and done:
            gains = [losses[arm, s] - losses["default", s] for s in done]
            name = "".join(c if c.isalnum() else "_" for c in arm)
            found[f"router_{name}_loss_gap"] = claim(gains, done, f"held-out loss of '{arm}' minus that of the default")
    return found


def show(rows: list[dict]) -> None:
    table = Table("arm", "seed", "loss", "busiest / mean", "entropy", "dead", "seconds")
    for row in rows:
        load = (f"{row['max_load']:.2f}", f"{row['entropy']:.3f}", f"{row['dead']:.3f}")
        table.add_row(row["arm"], str(row["seed"]), f"{row['loss']:.3f}", *load, f"{row['seconds']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
