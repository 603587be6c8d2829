"""A hybrid's child against training its shape from scratch: the tokens that reach the same held-out loss.

The parent of `pruning.py` is cut to about half its parameters, over all axes, and distilled on few tokens. Models of
the child's shape are trained from scratch, longer and longer, until one reaches its loss (see `benchmarks.scratch`).
Rows that are recorded already are not made again.

    python -m benchmarks.hybrid.from_scratch [--seeds 0 1] [--work DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.hybrid.common import PARENT_TOKENS, WORK, Ground, parent
from benchmarks.record import Record, Row, claim, show
from benchmarks.scratch import reach, tokens_to
from transformers import PreTrainedModel, set_seed

import nestling as nl

CHILD = nl.Shape(mamba_num_heads=12, mamba_head_dim=12, ssm_state_size=12, intermediate_size=224, num_hidden_layers=7)
DISTILLED = (7_680, 15_360, 30_720)  # tokens
LENGTHS = (225_000, 450_000, 900_000, 1_800_000)  # tokens of runs from scratch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS, help="tokens of runs from scratch")
    parser.add_argument("--work", type=Path, default=WORK, help="where the parents are kept")
    chosen, record = parser.parse_args(), Record("hybrid", "from_scratch")
    for seed in chosen.seeds:
        run(record, seed, chosen.work, chosen.lengths)
        record.save(claims(record))
    show(record.rows, ("arm", "tokens"), ("loss", "params", "seconds"))


def run(record: Record, seed: int, work: Path, lengths: list[int]) -> None:
    """The children of one seed's parent, and the runs from scratch that are held against them."""
    model, tokenizer = parent(seed, work)
    set_seed(seed)
    ground = Ground(tokenizer, seed)
    ranking = nl.rank(model, ground.calibration, layers="kl")
    child = nl.prune(model, ranking, CHILD, repair=ground.calibration)

    def note(arm: str, tokens: int, loss, made: PreTrainedModel = child) -> float:
        key = {"seed": seed, "arm": arm, "tokens": tokens}
        return record.row(key, lambda: {"loss": round(loss(), 4), "params": made.num_parameters()})["loss"]

    note("parent", PARENT_TOKENS, lambda: ground.loss(model), model)
    note("cut", 0, lambda: ground.loss(child))
    goals = [note("distilled", n, lambda n=n: ground.distilled(child, model, n)) for n in DISTILLED]
    trained = lambda tokens: ground.loss(ground.from_scratch(child.config, tokens))  # noqa: E731
    reach(min(goals), lengths, lambda n: note("from scratch", n, lambda: trained(n)))


def claims(record: Record) -> dict[str, Row]:
    """For each length of distillation, over the seeds that are whole."""
    seeds = sorted({row["seed"] for row in record.rows if row["arm"] == "from scratch"})
    made = {}
    for tokens in DISTILLED:
        factors, found = [], []
        for seed in seeds:
            runs = [(r["tokens"], r["loss"]) for r in record.rows if (r["seed"], r["arm"]) == (seed, "from scratch")]
            goal = record.find(seed=seed, arm="distilled", tokens=tokens)["loss"]
            needed, between = tokens_to(goal, runs)
            factors.append(needed / tokens)
            found.append(between)
        how = (
            f"tokens from scratch over {tokens:,} tokens of distillation at equal held-out loss (hybrid of 1.0 M "
            f"parameters trained on {PARENT_TOKENS:,} tokens, child of about half)"
        )
        read = "read off between two runs" if all(found) else "a bound where no two runs lie around it"
        name = "tokens_to_equal_loss" if tokens == DISTILLED[0] else f"tokens_to_equal_loss_{tokens}"
        made[name] = claim(factors, seeds, f"{how}; {read}", "x")
    return made


if __name__ == "__main__":
    main()
