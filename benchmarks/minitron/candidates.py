"""The order of candidates at equal parameters: as pruned, after a short distillation, and after a longer one.

Seven shapes of about 0.54 of the parent's parameters, from all depth to all width. Minitron (table 1, figure 9) finds
that the order before training is not the order after it, and that a short training shows it: Spearman's correlation of
the ranks with those of the longest training says how far each is to be believed.

    python -m benchmarks.minitron.candidates [--seeds 0 1] [--tokens 4096 16384]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.minitron.common import Ground
from benchmarks.record import Record, Row, claim, show

import nestling as nl

SHAPES = {
    "3 layers": {"num_hidden_layers": 3},
    "4 layers, FFN 168": {"num_hidden_layers": 4, "intermediate_size": 168},
    "5 layers, FFN 114": {"num_hidden_layers": 5, "intermediate_size": 114},
    "4 layers, hidden 80, FFN 228": {"num_hidden_layers": 4, "hidden_size": 80, "intermediate_size": 228},
    "hidden 80, FFN 120": {"hidden_size": 80, "intermediate_size": 120},
    "hidden 64, FFN 180": {"hidden_size": 64, "intermediate_size": 180},
    "hidden 88, 1 KV group, FFN 144": {
        "hidden_size": 88,
        "num_key_value_heads": 1,
        "num_attention_heads": 2,
        "intermediate_size": 144,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16_384], help="of distillation, each anew")
    chosen, record = parser.parse_args(), Record("minitron", "candidates")
    for seed in chosen.seeds:
        ground = Ground(seed)
        for name, sizes in SHAPES.items():
            pruned = nl.prune(ground.parent, ground.ranking, nl.Shape(**sizes), repair=ground.repair)
            for tokens in [0, *chosen.tokens]:
                key = {"seed": seed, "shape": name, "tokens": tokens}
                record.row(key, lambda p=pruned, n=tokens, g=ground: figures(g, p, n))
        record.save(claims(record, chosen.tokens))
    show(record.rows, ("shape", "tokens"), ("loss", "params"))


def figures(ground: Ground, pruned, tokens: int) -> Row:
    model = ground.trained(pruned, tokens) if tokens else pruned
    return {"loss": round(ground.loss(model), 4), "params": model.num_parameters()}


def claims(record: Record, tokens: Sequence[int]) -> dict[str, Row]:
    """Correlation of two early orders with the last one, and what believing each would have cost."""
    seeds = sorted({row["seed"] for row in record.rows})
    short, last = tokens[0], tokens[-1]

    def losses(seed: int, at: int) -> list[float]:
        return [record.find(seed=seed, shape=name, tokens=at)["loss"] for name in SHAPES]

    def regret(seed: int, at: int) -> float:
        final = dict(zip(losses(seed, at), losses(seed, last), strict=True))
        return final[min(final)] - min(final.values())

    found = {}
    for name, at in (("before", 0), ("after_short", short)):
        when = f"after {at:,} tokens" if at else "as pruned"
        found[f"rank_correlation_{name}"] = claim(
            [spearman(losses(seed, at), losses(seed, last)) for seed in seeds], seeds,
            f"Spearman's, of {len(SHAPES)} shapes {when} with the order after {last:,} tokens", "",
        )  # fmt: skip
        found[f"choice_regret_{name}"] = claim(
            [regret(seed, at) for seed in seeds], seeds,
            f"held-out loss after {last:,} tokens of the shape that is best {when}, minus the best of all", "nats",
        )  # fmt: skip
    return found


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation without ties: 1 - 6 sum d^2 / (n (n^2 - 1))."""
    places = [[sorted(values).index(value) for value in values] for values in (one, other)]
    apart = sum((a - b) ** 2 for a, b in zip(*places, strict=True))
    return 1 - 6 * apart / (len(one) * (len(one) ** 2 - 1))


if __name__ == "__main__":
    main()
