"""A mixture upcycled from a dense model, against the dense model trained on and a mixture from scratch, at equal FLOPs.

A small Qwen3 (see `small.py`) is trained; then every arm gets the FLOPs of `--more` steps of it, counted per token by
`nestling.cost`, routers included: fine arms have 64 experts of an eighth of the FFN, standard ones 8 whole; 1x uses
as much of them as the dense FFN has, 2x twice that. `exact` keeps the logits at the start, `paper` nearly. `plain`
draws a router row for every expert, so that a token's experts are no whole copies of the FFN any more. One arm from
scratch has the parent's FLOPs too. Figures: held-out loss before and after.

    python -m benchmarks.moe.upcycling --work runs/moe [--seeds 0 1] [--size tiny] [--steps 1200] [--more 400]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from benchmarks.moe.small import CONTEXT, RATE, fresh, gap, parser, trained
from benchmarks.record import Record, Row, show
from transformers import PreTrainedModel

from nestling import hub
from nestling.cost import cost
from nestling.moe import routed_modules, upcycle

FINE = (8, 1, 8)
Make = Callable[[PreTrainedModel, Path, str, int], PreTrainedModel]


def upcycled(*numbers: int, mode: str = "exact", plain: bool = False) -> Make:
    """A mixture of the parent; plain: with router rows of their own."""

    def make(parent: PreTrainedModel, work: Path, size: str, seed: int) -> PreTrainedModel:
        model = upcycle(parent, *numbers, mode=mode, seed=seed)
        for _, router, _ in routed_modules(model) if plain else ():
            torch.nn.init.normal_(router.get_parameter("weight"), std=0.02)
        return model

    return make


def scratch(parent: PreTrainedModel, work: Path, size: str, seed: int) -> PreTrainedModel:
    return fresh(work, size, seed, (*FINE, True))


# name -> what is made of the parent, and whether the arm also gets the parent's FLOPs
ARMS: dict[str, tuple[Make, bool]] = {
    "dense continued": (lambda parent, work, size, seed: parent, False),
    "upcycled 1x G8 exact": (upcycled(*FINE), False),
    "upcycled 1x G8 paper": (upcycled(*FINE, mode="paper"), False),
    "upcycled 1x G8 plain": (upcycled(*FINE, plain=True), False),
    "upcycled 1x G1 paper": (upcycled(8, 1, 1, mode="paper"), False),
    "upcycled 2x G1 exact": (upcycled(8, 2, 1), False),
    "upcycled 2x G8 exact": (upcycled(8, 2, 8), False),
    "scratch 1x G8": (scratch, False),
    "scratch 1x G8, all FLOPs": (scratch, True),
}


def main() -> None:
    options = parser(__doc__, ARMS, 1200)
    options.add_argument("--size", default="tiny", help="tiny, small or large")
    options.add_argument("--more", type=int, default=400, help="whose FLOPs each arm gets, in steps of the parent")
    chosen, record = options.parse_args(), Record("moe", "upcycling")
    for seed in chosen.seeds:
        for arm in chosen.arms:
            job = {"size": chosen.size, "steps": chosen.steps, "more": chosen.more}
            record.row(job | {"arm": arm, "seed": seed}, partial(figures, chosen.work, **job, arm=arm, seed=seed))
            record.save(claims(record, job))
    show(record.rows, ("size", "steps", "more", "arm"), ("loss_before", "loss", "updates", "params", "active_params"))


def figures(work: Path, size: str, steps: int, more: int, arm: str, seed: int) -> Row:
    """An arm's figures: the parent, what is made of it, and its share of the FLOPs."""
    folder = f"upcycling-{size}-{steps}-{more}"
    trained(work, f"{folder}/parent-{seed}", lambda: fresh(work, size, seed, None), steps, seed, RATE)
    parent, _ = hub.load(work / folder / f"parent-{seed}" / "model")
    make, whole = ARMS[arm]
    model = make(parent, work, size, seed)
    budget = (more + whole * steps) * cost(parent, context=CONTEXT).flops_per_token
    updates = round(budget / cost(model, context=CONTEXT).flops_per_token)
    # another seed for the order of the data, so that continued arms do not see the parent's batches again
    order = seed + 100 * (not whole)
    return trained(
        work, f"{folder}/{arm.replace(' ', '-').replace(',', '')}-{seed}", lambda: model, updates, order, RATE
    )


def claims(record: Record, job: Row) -> dict[str, Row]:
    """Gains of the fine upcycled model over the dense one trained on and over those from scratch."""
    found = {}
    others = ("dense continued", "scratch 1x G8", "scratch 1x G8, all FLOPs", "upcycled 1x G8 plain")
    for name, other in zip(("continued_dense", "scratch", "scratch_all_flops", "plain_copies"), others, strict=True):
        how = f"held-out loss of '{other}' minus that of the upcycled 64 experts top 8 (exact)"
        if one := gap(record, job | {"arm": other}, job | {"arm": "upcycled 1x G8 exact"}, how):
            found[f"upcycled_vs_{name}_loss_gain"] = one
    return found


if __name__ == "__main__":
    main()
