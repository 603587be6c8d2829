"""A mixture upcycled from a dense model, against the dense model trained on and a mixture from scratch, at equal FLOPs.

A small Qwen3 (see `small.py`) is trained; then every arm gets the FLOPs of `--more` steps of it, counted per token by
`nestling.cost`, routers included. Upcycled arms have 64 experts of an eighth of the FFN, 8 of a token (1x the FFN),
with logits that stay (exact) or nearly (paper), or 8 whole ones, 2 of a token (2x). The arm from scratch also gets
the FLOPs of the parent. Figures: held-out loss before and after.

    python -m benchmarks.moe.upcycling --work runs/moe [--seeds 0 1] [--steps 300] [--more 150]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.moe.small import CONTEXT, RATE, fresh, gap, parser, trained
from benchmarks.record import Record, Row, show
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


def main() -> None:
    options = parser(__doc__, ARMS, 300)
    options.add_argument("--more", type=int, default=150, help="whose FLOPs each arm gets, in steps of the parent")
    chosen, record = options.parse_args(), Record("moe", "upcycling")
    for seed in chosen.seeds:
        for arm in chosen.arms:
            key = {"steps": chosen.steps, "more": chosen.more, "arm": arm, "seed": seed}
            record.row(key, lambda seed=seed, arm=arm: figures(chosen.work, chosen.steps, chosen.more, arm, seed))
            record.save(claims(record, chosen.steps, chosen.more))
    show(record.rows, ("steps", "more", "arm"), ("loss_before", "loss", "updates", "params", "active_params"))


def figures(work: Path, steps: int, more: int, arm: str, seed: int) -> Row:
    """An arm's figures: the parent, what is made of it, and its share of the FLOPs."""
    folder = f"upcycling-{steps}-{more}"
    trained(work, f"{folder}/parent-{seed}", lambda: fresh(work, "small", seed, None), steps, seed, RATE)
    parent, _ = hub.load(work / folder / f"parent-{seed}" / "model")
    make, whole = ARMS[arm]
    model = make(parent, work, seed)
    budget = (more + whole * steps) * cost(parent, context=CONTEXT).flops_per_token
    updates = round(budget / cost(model, context=CONTEXT).flops_per_token)
    # another seed for the order of the data, so that continued arms do not see the parent's batches again
    order = seed + 100 * (not whole)
    return trained(work, f"{folder}/{arm.replace(' ', '-')}-{seed}", lambda: model, updates, order, RATE)


def claims(record: Record, steps: int, more: int) -> dict[str, Row]:
    """Gains of the fine upcycled model over the dense one trained on and over the one from scratch."""
    found = {}
    for name, other in (("continued_dense", "dense continued"), ("scratch", "scratch 1x G8")):
        how = f"held-out loss of '{other}' minus that of the upcycled 64 experts top 8, equal FLOPs"
        worse, better = ({"steps": steps, "more": more, "arm": arm} for arm in (other, "upcycled 1x G8 exact"))
        if one := gap(record, worse, better, how):
            found[f"upcycled_vs_{name}_loss_gain"] = one
    return found


if __name__ == "__main__":
    main()
