"""Fine-grained against standard experts at equal active parameters, tokens and data order, over sizes and lengths.

Small Qwen3-MoE models from scratch (see `small.py`): 8 experts of the FFN's width against 64 of an eighth of it, using
as much of them as the dense FFN has (1x) or twice that (2x). A single expert per token cannot be normalized over
itself, so the 1x standard arm takes its weights from the softmax over all, and a third arm does so with 64 experts.
Routers of 64 experts cost some FLOPs more: a second gain grants the standard arm as many, by its loss at two lengths.

With `--pairs`, a file or folder of minimal pairs in BLiMP's format, the models in the work folder decide those too.

    python -m benchmarks.moe.fine_grained --work runs/moe [--sizes tiny small] [--lengths 200 800] [--rates 0.004]
"""

from __future__ import annotations

import math
from itertools import pairwise, product
from pathlib import Path

from benchmarks.moe.small import RATE, fresh, gap, parser, trained
from benchmarks.record import Record, Row, claim, show

from nestling import evaluate, hub

# name -> experts, experts per token (both at granularity 1), granularity, normalized over the chosen; None is dense
ARMS = {
    "dense": None,
    "1x G1 pre": (8, 1, 1, False),
    "1x G8 post": (8, 1, 8, True),
    "1x G8 pre": (8, 1, 8, False),
    "2x G1 post": (8, 2, 1, True),
    "2x G8 post": (8, 2, 8, True),
}
PAIRS = {"1x": ("1x G1 pre", "1x G8 post"), "2x": ("2x G1 post", "2x G8 post")}
PAPER = {"1x": 0.050, "2x": 0.023}  # 2506.02890 at 11B and at 56B
FIGURES = ("loss", "pairs", "params", "active_params", "max_load", "dead", "training_seconds")
PAIRS_PER_FILE = 100


def main() -> None:
    options = parser(__doc__, ARMS, 0)
    options.add_argument("--sizes", nargs="+", default=["tiny", "small"], help="tiny, small or large")
    options.add_argument("--lengths", type=int, nargs="+", default=[200, 800], help="steps of 2,048 tokens")
    options.add_argument("--rates", type=float, nargs="+", default=[RATE], help="learning rates")
    options.add_argument("--pairs", type=Path, help="minimal pairs in BLiMP's format, a file or a folder")
    chosen, record = options.parse_args(), Record("moe", "fine_grained")
    grid = product(chosen.sizes, chosen.lengths, chosen.rates, chosen.seeds, chosen.arms)
    for size, steps, rate, seed, arm in grid:
        name = f"{size}-{steps}/{arm.replace(' ', '-')}-{seed}" + ("" if rate == RATE else f"-{rate:g}")
        make = lambda size=size, seed=seed, arm=arm: fresh(chosen.work, size, seed, ARMS[arm])  # noqa: E731
        run = lambda name=name, make=make, steps=steps, seed=seed, rate=rate: trained(  # noqa: E731
            chosen.work, name, make, steps, seed, rate
        )
        row = record.row({"size": size, "steps": steps, "rate": rate, "arm": arm, "seed": seed}, run)
        if chosen.pairs and "pairs" not in row:
            row["pairs"] = decided(chosen.work / name / "model", chosen.pairs)
        record.save(claims(record))
    show(record.rows, ("size", "steps", "rate", "arm"), FIGURES)


def decided(folder: Path, pairs: Path) -> float:
    """Part of the minimal pairs that a model decides rightly."""
    model, words = hub.load(folder)
    assert words is not None
    return round(evaluate.minimal_pairs(model, words, pairs, limit=PAIRS_PER_FILE).accuracy, 4)


def claims(record: Record) -> dict[str, Row]:
    """Every pair at every size and length; the longest run of the largest model gives the headline."""
    places = sorted({(row["params"], row["size"], row["steps"]) for row in record.rows})
    found: dict[str, Row] = {}
    for (_, size, steps), multiple in product(places, PAIRS):
        found |= compared(record, size, steps, multiple)
    for multiple, end in (("1x", ""), ("2x", "_2x")):
        ranked = [name for _, size, steps in places if (name := f"{multiple}_{size}_{steps}_loss_gain") in found]
        if ranked:
            found[f"fine_grained_loss_gain{end}"] = found[ranked[-1]]
    return found


def compared(record: Record, size: str, steps: int, multiple: str) -> dict[str, Row]:
    """The claims of one pair of arms at one size and length."""
    coarse, fine = ({"size": size, "steps": steps, "rate": RATE, "arm": arm} for arm in PAIRS[multiple])
    what = f"8 experts against 64 of an eighth, {multiple} the dense FFN, {size}, {steps * 2048 / 1e6:.2g}M tokens"
    gain = gap(record, coarse, fine, f"held-out loss, {what}", paper=PAPER[multiple])
    if not gain:
        return {}
    seeds, start = gain["seeds"], f"{multiple}_{size}_{steps}"
    pairs = [(record.find(**coarse, seed=seed), record.find(**fine, seed=seed)) for seed in seeds]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    found = {f"{start}_loss_gain": gain}
    judged = [b["pairs"] - a["pairs"] for a, b in both if "pairs" in a and "pairs" in b]
    if len(judged) == len(both):
        how = f"part of minimal pairs decided rightly, fine minus standard, {what}"
        found[f"{start}_minimal_pairs_gain"] = claim(judged, seeds, how, "accuracy")
    granted = [_granted(record, a, b) for a, b in both]
    if all(value is not None for value in granted):
        gains = [a["loss"] - b["loss"] - float(g or 0) for (a, b), g in zip(both, granted, strict=True)]
        how = f"held-out loss at equal FLOPs, routers included (loss of the standard arm by its two lengths), {what}"
        found[f"{start}_loss_gain_equal_flops"] = claim(gains, seeds, how, "nats", PAPER[multiple])
    ratios = [b["training_seconds"] / a["training_seconds"] for a, b in both]
    found[f"{start}_time_ratio"] = claim(ratios, seeds, f"time of the fine run over the other, {what}", "x")
    savings = [saved(a["curve"], b["curve"]) for a, b in both]
    if all(value is not None for value in savings):
        how = f"tokens of the standard arm over those after which the fine one has its last training loss, {what}"
        found[f"{start}_tokens_to_equal_loss"] = claim([float(v or 0) for v in savings], seeds, how, "x")
    return found


def _granted(record: Record, coarse: Row, fine: Row) -> float | None:
    """What the standard arm's loss would fall by with the FLOPs of the fine one: by log tokens, between two lengths."""
    same = {name: coarse[name] for name in ("size", "rate", "arm", "seed")}
    runs = sorted((row["tokens"], row["loss"]) for row in record.rows if same.items() <= row.items())
    near = [pair for pair in pairwise(runs) if coarse["tokens"] in (pair[0][0], pair[1][0])]
    if not near:
        return None
    (few, before), (many, after) = near[-1]
    return (before - after) / math.log(many / few) * math.log(fine["flops_per_token"] / coarse["flops_per_token"])


def saved(coarse: list[float], fine: list[float]) -> float | None:
    """How many times fewer tokens the fine arm needs for the coarse one's last loss; None if it does not reach it."""
    reached = next((i for i, loss in enumerate(fine) if loss <= coarse[-1]), None)
    return None if reached is None else len(coarse) / (reached + 1)


if __name__ == "__main__":
    main()
