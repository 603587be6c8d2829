"""Fine-grained against standard experts at equal total and active parameters, tokens and data order.

Small Qwen3-MoE models from scratch (see `small.py`): 8 experts of the FFN's width against 64 of an eighth of it, using
as much of them as the dense FFN has (1x) or twice that (2x). A single expert per token cannot be normalized over
itself, so the 1x standard arm takes its weights from the softmax over all, and a third arm does so with 64 experts.
Figures: held-out loss, tokens after which the fine arm has the standard one's last training loss, load, time.

    python benchmarks/moe/fine_grained.py --work runs/moe [--seeds 0 1] [--steps 200] [--size small]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.moe.small import claim, fresh, trained, write
from rich.console import Console
from rich.table import Table

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
RATE = 4e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=200, help="of 2,048 tokens")
    parser.add_argument("--size", default="small", help="small or large")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="only these")
    chosen = parser.parse_args()
    rows = []
    for seed in chosen.seeds:
        for arm in chosen.arms:
            name = f"{chosen.size}-{chosen.steps}/{arm.replace(' ', '-')}-{seed}"
            make = lambda arm=arm, seed=seed: fresh(chosen.work, chosen.size, seed, ARMS[arm])  # noqa: E731
            rows.append({"arm": arm, **trained(chosen.work, name, make, chosen.steps, seed, RATE)})
            conclude(rows, chosen.seeds)
    show(rows)


def conclude(rows: list[dict], seeds: list[int]) -> None:
    """Write what is known so far: after every run, so that an interrupted benchmark leaves its figures."""
    done = {(row["arm"], row["seed"]): row for row in rows}
    claims = {}
    for multiple, pair in PAIRS.items():
        both = [seed for seed in seeds if all((arm, seed) in done for arm in pair)]
        if both:
            claims |= compared(multiple, [(done[pair[0], seed], done[pair[1], seed]) for seed in both], both)
    write("fine_grained", rows, claims, seeds)


def compared(multiple: str, pairs: list[tuple[dict, dict]], seeds: list[int]) -> dict[str, dict]:
    """Claims of one pair of arms; that of the 1x pair is the headline."""
    what = f"8 experts against 64 of an eighth, {multiple} the dense FFN, {pairs[0][0]['tokens'] / 1e6:.2g}M tokens"
    suffix = "" if multiple == "1x" else f"_{multiple}"
    gains = [coarse["loss"] - fine["loss"] for coarse, fine in pairs]
    found = {
        f"fine_grained_loss_gain{suffix}": claim(gains, seeds, f"held-out loss, {what}", paper=PAPER[multiple]),
        f"fine_grained_step_time_ratio{suffix}": claim(
            [fine["seconds"] / coarse["seconds"] for coarse, fine in pairs], seeds, f"time of the run, {what}", "x"
        ),
    }
    savings = [saved(coarse["curve"], fine["curve"]) for coarse, fine in pairs]
    if all(value is not None for value in savings):
        how = f"tokens of the standard arm over those after which the fine one has its last training loss, {what}"
        found[f"fine_grained_tokens_to_equal_loss{suffix}"] = claim([float(v or 0) for v in savings], seeds, how, "x")
    return found


def saved(coarse: list[float], fine: list[float]) -> float | None:
    """How many times fewer tokens the fine arm needs for the coarse one's last loss; None if it does not reach it."""
    reached = next((i for i, loss in enumerate(fine) if loss <= coarse[-1]), None)
    return None if reached is None else len(coarse) / (reached + 1)


def show(rows: list[dict]) -> None:
    table = Table("arm", "seed", "loss", "params", "active", "busiest / mean", "dead", "seconds")
    for row in rows:
        load = (f"{row['max_load']:.2f}", f"{row['dead']:.2f}") if "max_load" in row else ("-", "-")
        counts = (f"{row['params']:,}", f"{row['active_params']:,}")
        table.add_row(row["arm"], str(row["seed"]), f"{row['loss']:.3f}", *counts, *load, f"{row['seconds']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
