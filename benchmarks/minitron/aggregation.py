"""Minitron's table 11: how activations are aggregated over batch and sequence, before and after light retraining.

The paper's own metric (mean size of the activation) on every width axis, all nine pairs of aggregations, plain slices
to about half; then the same short distillation for each. `random` ranks by chance.

    python -m benchmarks.minitron.aggregation [--seeds 0 1] [--tokens 16384]
"""

from __future__ import annotations

import argparse
from itertools import product

from benchmarks.minitron.common import Ground
from benchmarks.minitron.from_scratch import HALF, SHAPES
from benchmarks.record import Record, Row, claim, show

import nestling as nl

WAYS = ("l2", "mean", "var")
PAIRS = [f"{batch}, {sequence}" for batch, sequence in product(WAYS, WAYS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--tokens", type=int, default=16_384, help="of distillation")
    chosen, record = parser.parse_args(), Record("minitron", "aggregation")
    for seed in chosen.seeds:
        ground = Ground(seed)
        for pair in [*PAIRS, "random"]:
            key = {"seed": seed, "batch, sequence": pair}
            record.row(key, lambda pair=pair, ground=ground: figures(ground, pair, chosen.tokens))
        record.save(claims(record), tokens=chosen.tokens)
    show(record.rows, ("batch, sequence",), ("pruned", "distilled"))


def figures(ground: Ground, pair: str, tokens: int) -> Row:
    if pair == "random":
        ranking = nl.rank(ground.parent, ground.calibration, metric="random")
    else:
        batch, sequence = pair.split(", ")
        ranking = nl.rank(
            ground.parent, ground.calibration, metric="activation", over_batch=batch, over_sequence=sequence
        )
    pruned = nl.prune(ground.parent, ranking, SHAPES[HALF])
    distilled = ground.trained(pruned, tokens)
    return {"pruned": round(ground.loss(pruned), 4), "distilled": round(ground.loss(distilled), 4)}


def claims(record: Record) -> dict[str, Row]:
    """What the sequence's mean gains over its rivals, at the paper's L2 over the batch."""
    seeds = sorted({row["seed"] for row in record.rows})

    def gaps(stage: str, worse: str) -> list[float]:
        pairs = [[record.find(seed=s, **{"batch, sequence": pair}) for pair in (worse, "l2, mean")] for s in seeds]
        return [one[stage] - other[stage] for one, other in pairs]

    how = "held-out loss of the child ranked by {} minus by (L2, mean), width cut to about half, {}"
    return {
        f"aggregation_{name}_loss_gap_{stage}": claim(
            gaps(stage, pair), seeds, how.format(f"({pair})" if "," in pair else pair, stage), "nats", paper
        )
        for name, pair, before in (("l2", "l2, l2", 1.55), ("var", "var, var", 3.37), ("random", "random", None))
        for stage, paper in (("pruned", before), ("distilled", None))
    }


if __name__ == "__main__":
    main()
