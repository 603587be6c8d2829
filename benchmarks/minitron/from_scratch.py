"""Pruning and distilling against training from scratch, on models small enough to train here from nothing.

Each seed's parent is cut to about half, by width and by depth at equal parameters, and to three quarters. Each child is
trained on few tokens: from the parent (KD), on the text alone (plain), and with fresh weights instead of the parent's
(random). Then models of the half's shape are trained from scratch, each length a run of its own with a whole
learning-rate schedule, longer and longer until one reaches the distilled child's held-out loss: the tokens that reach
it are read off between the last two, in log tokens. What is recorded already is not trained again.

    python -m benchmarks.minitron.from_scratch [--seeds 0 1] [--lengths 655360 1310720 1920000 3840000]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.minitron.common import PARENT_TOKENS, Ground
from benchmarks.record import Record, Row, claim, show
from benchmarks.scratch import reach, tokens_to
from transformers import PreTrainedModel

import nestling as nl

HALF, DEPTH, MORE = "half, width", "half, depth", "three quarters, width"
SHAPES = {
    HALF: nl.Shape(hidden_size=80, intermediate_size=120),
    DEPTH: nl.Shape(num_hidden_layers=3),
    MORE: nl.Shape(hidden_size=88, intermediate_size=192),
}
ARMS = [(start, loss) for start in ("pruned", "random") for loss in ("KD", "plain")]
DISTILLED, MORE_TOKENS, KD = 8192, (16_384, 32_768), "pruned + KD"
LENGTHS = (655_360, 1_310_720, 1_920_000, 3_840_000)  # tokens of runs from scratch
RATES = {"pruned": 2e-3, "random": 8e-3}
LOSSES = {"KD": {}, "plain": {"kd_weight": 0.0, "ce_weight": 1.0}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS, help="tokens of runs from scratch")
    chosen, record = parser.parse_args(), Record("minitron", "from_scratch")
    for seed in chosen.seeds:
        run(record, Ground(seed), chosen.lengths)
        record.save(claims(record))
    show(record.rows, ("shape", "arm", "tokens"), ("loss", "params", "seconds"))


def run(record: Record, ground: Ground, lengths: Sequence[int]) -> None:
    """The children of one seed's parent, and the runs from scratch that are held against them."""

    def note(shape: str, arm: str, tokens: int, make) -> Row:
        def figures() -> Row:
            model = make()
            return {"loss": round(ground.loss(model), 4), "params": model.num_parameters()}

        return record.row({"seed": ground.seed, "shape": shape, "arm": arm, "tokens": tokens}, figures)

    note("parent", "scratch", PARENT_TOKENS, lambda: ground.parent)
    for name, shape in SHAPES.items():
        pruned = nl.prune(ground.parent, ground.ranking, shape, repair=ground.repair)
        note(name, "pruned", 0, lambda pruned=pruned: pruned)
        for start, loss in ARMS if name != MORE else ARMS[:1]:
            note(name, f"{start} + {loss}", DISTILLED, lambda s=start, o=loss, p=pruned: child(ground, p, s, o))
        for tokens in MORE_TOKENS:
            note(name, KD, tokens, lambda p=pruned, n=tokens: child(ground, p, "pruned", "KD", n))
    config = nl.prune(ground.parent, ground.ranking, SHAPES[HALF]).config
    goal = record.find(seed=ground.seed, shape=HALF, arm=KD, tokens=DISTILLED)["loss"]
    reach(goal, lengths, lambda n: note(HALF, "scratch", n, lambda: ground.from_scratch(config, n))["loss"])


def child(ground: Ground, pruned: PreTrainedModel, start: str, loss: str, tokens: int = DISTILLED) -> PreTrainedModel:
    model = pruned if start == "pruned" else ground.fresh(pruned.config)
    return ground.trained(model, tokens, learning_rate=RATES[start], **LOSSES[loss])


def tokens_to_equal_loss(record: Record, seed: int) -> tuple[float, bool]:
    """Tokens from scratch that reach the distilled half's loss, interpolated in log tokens; whether they did."""
    goal = record.find(seed=seed, shape=HALF, arm=KD, tokens=DISTILLED)["loss"]
    same = {"seed": seed, "shape": HALF, "arm": "scratch"}
    return tokens_to(goal, [(row["tokens"], row["loss"]) for row in record.rows if same.items() <= row.items()])


def family_cost(record: Record, seed: int) -> float:
    """Operations of training three models on the parent's tokens over those of the parent and two distillations.

    6 per parameter and token trained, 2 more per parameter of the teacher; embeddings counted, as in the paper.
    """
    params = {row["shape"]: row["params"] for row in record.rows if row["seed"] == seed}
    apart = 6 * PARENT_TOKENS * sum(params[shape] for shape in ("parent", HALF, MORE))
    distilled = sum(6 * params[shape] + 2 * params["parent"] for shape in (HALF, MORE))
    return apart / (6 * PARENT_TOKENS * params["parent"] + DISTILLED * distilled)


def claims(record: Record) -> dict[str, Row]:
    """Over the seeds that are whole."""
    seeds = sorted({row["seed"] for row in record.rows if (row["shape"], row["arm"]) == (MORE, KD)})
    whole = sorted({row["seed"] for row in record.rows if (row["shape"], row["arm"]) == (HALF, "scratch")})

    def gap(worse: tuple[str, str], better: tuple[str, str]) -> list[float]:
        where = [{"shape": shape, "arm": arm, "tokens": DISTILLED} for shape, arm in (worse, better)]
        pairs = [[record.find(seed=seed, **key)["loss"] for key in where] for seed in seeds]
        return [one - other for one, other in pairs]

    factors = [tokens_to_equal_loss(record, seed) for seed in whole]
    read_off = "read off between two runs" if all(found for _, found in factors) else "a bound: not bracketed"
    what = f"parent of 0.66 M parameters and {PARENT_TOKENS:,} tokens, child of about half, {DISTILLED:,} tokens"
    return {
        "tokens_to_equal_loss": claim(
            [tokens / DISTILLED for tokens, _ in factors],
            whole,
            f"tokens from scratch over tokens of distillation at equal held-out loss ({what}; {read_off})",
            "x",
            40.0,
        ),
        "family_cost_ratio": claim(
            [family_cost(record, seed) for seed in seeds],
            seeds,
            f"operations of training models of 1x, 0.76x and 0.54x apart, each on {PARENT_TOKENS:,} tokens, over those "
            f"of the parent and two distillations on {DISTILLED:,}; the teacher's forward passes counted",
            "x",
            1.8,
        ),
        "kd_vs_plain_loss_gap": claim(
            gap((HALF, "pruned + plain"), (HALF, KD)),
            seeds,
            f"pruned child on text alone minus from its parent, equal tokens ({what})",
            "nats",
        ),
        "width_vs_depth_loss_gap": claim(
            gap((DEPTH, KD), (HALF, KD)),
            seeds,
            f"3 of 6 layers off minus width cut to the same parameters, both distilled ({what})",
            "nats",
            0.106,
        ),
        "pruned_vs_random_loss_gap": claim(
            gap((HALF, "random + KD"), (HALF, KD)),
            seeds,
            f"fresh weights minus the parent's, both distilled ({what})",
            "nats",
            1.904,
        ),
    }


if __name__ == "__main__":
    main()
