"""Router choices, one changed at a time: what each does to the held-out loss and to how even the load is.

Small Qwen3-MoE from scratch (see `small.py`), 64 experts of an eighth of the FFN, 8 of a token. An arm is a line of
`ARMS`: whether weights are normalized over the chosen, and settings of the training that differ from the defaults.

    python -m benchmarks.moe.ablations --work runs/moe [--seeds 0 1] [--steps 200] [--arms default pre ...]
"""

from __future__ import annotations

from typing import Any

from benchmarks.moe.small import RATE, fresh, gap, parser, trained
from benchmarks.record import Record, Row, show

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


def main() -> None:
    chosen, record = parser(__doc__, ARMS, 200).parse_args(), Record("moe", "ablations")
    for seed in chosen.seeds:
        for arm in chosen.arms:
            normalized, settings = ARMS[arm]
            name = f"ablations-{chosen.steps}/{arm.replace(' ', '-').replace(',', '')}-{seed}"
            make = lambda n=normalized, s=seed: fresh(chosen.work, "small", s, (8, 1, 8, n))  # noqa: E731
            run = lambda name=name, make=make, seed=seed, more=settings: trained(  # noqa: E731
                chosen.work, name, make, chosen.steps, seed, RATE, **more
            )
            record.row({"steps": chosen.steps, "arm": arm, "seed": seed}, run)
            record.save(claims(record, chosen.steps))
    show(record.rows, ("steps", "arm"), ("loss", "max_load", "entropy", "dead", "training_seconds"))


def claims(record: Record, steps: int) -> dict[str, Row]:
    """How much better the default is than each other arm."""
    found = {}
    for arm in ARMS:
        how = f"held-out loss of '{arm}' minus that of the default, {steps * 2048 / 1e6:.2g}M tokens"
        one = gap(record, {"steps": steps, "arm": arm}, {"steps": steps, "arm": "default"}, how)
        if arm != "default" and one:
            found["router_" + "".join(c if c.isalnum() else "_" for c in arm) + "_loss_gap"] = one
    return found


if __name__ == "__main__":
    main()
