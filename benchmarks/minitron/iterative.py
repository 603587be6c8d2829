"""Minitron's table 12 and figure 7: one shot against iterative, in both senses.

Importance: the residual stream cut to 72 of 96 channels and the FFN to half, scored once, in two and in four rounds,
then the same distillation. Layers: three of six off at once, or one after another with a third of the tokens each time.

    python -m benchmarks.minitron.iterative [--seeds 0 1] [--tokens 16384]
"""

from __future__ import annotations

import argparse

from benchmarks.minitron.common import Ground
from benchmarks.record import Record, Row, claim, show

import nestling as nl
from nestling.surgery.iterate import rank_iteratively

SHAPE = nl.Shape(hidden_size=72, intermediate_size=128)
ROUNDS, LAYERS_OFF = (1, 2, 4), 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--tokens", type=int, default=16_384, help="of distillation, in all")
    chosen, record = parser.parse_args(), Record("minitron", "iterative")
    for seed in chosen.seeds:
        ground = Ground(seed)
        for rounds in ROUNDS:
            key = {"seed": seed, "what": "importance", "rounds": rounds}
            record.row(key, lambda g=ground, r=rounds: width(g, r, chosen.tokens))
        for rounds in (1, LAYERS_OFF):
            key = {"seed": seed, "what": "layers", "rounds": rounds}
            record.row(key, lambda g=ground, r=rounds: depth(g, r, chosen.tokens))
        record.save(claims(record), tokens=chosen.tokens)
    show(record.rows, ("what", "rounds"), ("pruned", "distilled"))


def width(ground: Ground, rounds: int, tokens: int) -> Row:
    ranking = rank_iteratively(ground.parent, ground.calibration, SHAPE, rounds, metric="activation")
    pruned = nl.prune(ground.parent, ranking, SHAPE)
    return {"pruned": ground.loss(pruned), "distilled": ground.loss(ground.trained(pruned, tokens))}


def depth(ground: Ground, rounds: int, tokens: int) -> Row:
    """Prune and distill so often, the parent always the teacher; the loss after the last cut and at the end."""
    model = ground.parent
    for number in range(1, rounds + 1):
        kept = ground.parent.config.num_hidden_layers - LAYERS_OFF * number // rounds
        pruned = nl.prune(model, nl.rank(model, ground.calibration), nl.Shape(num_hidden_layers=kept))
        model = ground.trained(pruned, tokens // rounds)
    return {"pruned": ground.loss(pruned), "distilled": ground.loss(model)}


def claims(record: Record) -> dict[str, Row]:
    """By how much iterating is worse than one shot."""
    seeds = sorted({row["seed"] for row in record.rows})

    def gaps(what: str, rounds: int) -> list[float]:
        pairs = [[record.find(seed=s, what=what, rounds=r)["distilled"] for r in (rounds, 1)] for s in seeds]
        return [one - other for one, other in pairs]

    what = "held-out loss after the same tokens of distillation"
    return {
        "iterative_importance_loss_gap": claim(
            gaps("importance", 4), seeds, f"{what}: units scored in four rounds minus once", "nats", 0.0
        ),
        "iterative_depth_loss_gap": claim(
            gaps("layers", LAYERS_OFF), seeds, f"{what}: three layers off one by one minus at once", "nats"
        ),
    }


if __name__ == "__main__":
    main()
