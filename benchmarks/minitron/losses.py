"""Minitron's tables 15 to 17: what a child learns with, at a mild and at a strong cut of its layers.

One of six layers off, or three. The divergence of the logits (forward and reverse KL, MSE, cosine), the text's
cross-entropy beside the KL, and intermediate states beside it: embedding and output of the layers that the default
pairs, and of a pair that does not belong together (the teacher's first layer with the student's last but one).

    python -m benchmarks.minitron.losses [--seeds 0 1] [--tokens 16384]
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.minitron.common import Ground
from benchmarks.record import Record, Row, claim, show

import nestling as nl

CUTS = {"mild": 5, "strong": 3}  # layers that stay
RATES = {"mild": 5e-4, "strong": 2e-3}  # learning rates: a child that lost little unlearns at the higher one
STATES = ["embedding", "output"]
ARMS: dict[str, dict[str, Any]] = {
    "KLD": {},
    "reverse KLD": {"loss": "reverse_kl"},
    "MSE": {"loss": "mse"},
    "cosine": {"loss": "cosine"},
    "KLD + text": {"ce_weight": 1.0},
    "KLD + embedding + output": {"states": STATES},
    "KLD + embedding + output, wrong pair": {"states": STATES, "layer_map": "0:{last}"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--tokens", type=int, default=16_384, help="of distillation")
    chosen, record = parser.parse_args(), Record("minitron", "losses")
    for seed in chosen.seeds:
        ground = Ground(seed)
        for cut, layers in CUTS.items():
            shape = nl.Shape(num_hidden_layers=layers)
            pruned = nl.prune(ground.parent, ground.ranking, shape, repair=ground.repair)
            record.row({"seed": seed, "cut": cut, "arm": "pruned"}, lambda p=pruned, g=ground: {"loss": g.loss(p)})
            for arm, settings in ARMS.items():
                how = {
                    **settings,
                    "learning_rate": RATES[cut],
                    "layer_map": settings.get("layer_map", "").format(last=layers - 2),
                }
                key = {"seed": seed, "cut": cut, "arm": arm}
                record.row(key, lambda p=pruned, g=ground, h=how: {"loss": g.loss(g.trained(p, chosen.tokens, **h))})
        record.save(claims(record), tokens=chosen.tokens)
    show(record.rows, ("cut", "arm"), ("loss",))


def claims(record: Record) -> dict[str, Row]:
    """By how much each arm is worse than KL alone: positive where the paper's choice is the better one."""
    seeds = sorted({row["seed"] for row in record.rows})

    def gaps(cut: str, arm: str) -> list[float]:
        pairs = [[record.find(seed=s, cut=cut, arm=name)["loss"] for name in (arm, "KLD")] for s in seeds]
        return [one - other for one, other in pairs]

    named = {
        "reverse_kl": ("reverse KLD", {"mild": None, "strong": 0.51}),
        "mse": ("MSE", {}),
        "cosine": ("cosine", {}),
        "states": ("KLD + embedding + output", {"strong": -0.014}),
        "wrong_states": ("KLD + embedding + output, wrong pair", {"strong": 0.085}),
    }
    return {
        f"{name}_loss_gap_{cut}_depth_cut": claim(
            gaps(cut, arm), seeds, f"held-out loss with {arm} minus with KLD alone, {6 - layers} of 6 layers off",
            "nats", papers.get(cut),
        )
        for name, (arm, papers) in named.items()
        for cut, layers in CUTS.items()
    }  # fmt: skip


if __name__ == "__main__":
    main()
