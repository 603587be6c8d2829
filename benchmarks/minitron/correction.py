"""Teacher correction (arXiv 2408.11796, section 3.1 and figure 4) on text that the parent was not trained on.

The parent knows the standard library; its child is distilled on other text, given by path, and judged on that text's
validation part: from the parent as it is, from a copy fine-tuned on the text first, and from one that is fine-tuned
together with the child. `text alone` is the child trained without a teacher.

    python -m benchmarks.minitron.correction --text FILE [--seeds 0 1] [--tokens 16384]
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.minitron.common import HELD_OUT, Ground
from benchmarks.minitron.from_scratch import HALF, SHAPES
from benchmarks.record import Record, Row, claim, show

import nestling as nl
from nestling.search import token_loss

RATE = 0.8  # of the child's learning rate: a fifth of the peak that the parent was trained with, as in the paper
ARMS: dict[str, dict[str, Any]] = {
    "text alone": {"kd_weight": 0.0, "ce_weight": 1.0},
    "teacher as it is": {},
    "corrected first": {"correction": "first", "correct_rate": RATE},
    "corrected together": {"correction": "together", "correct_rate": RATE},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="file of other text than the standard library")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--tokens", type=int, default=16_384, help="of distillation, and of the correction before it")
    chosen, record = parser.parse_args(), Record("minitron", "correction")
    for seed in chosen.seeds:
        ground = Ground(seed)
        loss = token_loss(ground.batches(HELD_OUT, chosen.text, split="validation"))
        pruned = nl.prune(ground.parent, ground.ranking, SHAPES[HALF], repair=ground.repair)
        record.row({"seed": seed, "arm": "parent"}, lambda g=ground, f=loss: {"loss": f(g.parent)})
        record.row({"seed": seed, "arm": "pruned"}, lambda p=pruned, f=loss: {"loss": f(p)})
        for arm, settings in ARMS.items():
            how = {"text": chosen.text, **settings}
            record.row(
                {"seed": seed, "arm": arm},
                lambda p=pruned, g=ground, h=how, f=loss: {"loss": f(g.trained(p, chosen.tokens, **h))},
            )
        record.save(claims(record, chosen.tokens), tokens=chosen.tokens)
    show(record.rows, ("arm",), ("loss",))


def claims(record: Record, tokens: int) -> dict[str, Row]:
    """What a correction gains, as a part of the loss: the paper says over 6 %."""
    seeds = sorted({row["seed"] for row in record.rows})

    def gains(arm: str) -> list[float]:
        pairs = [[record.find(seed=s, arm=name)["loss"] for name in ("teacher as it is", arm)] for s in seeds]
        return [1 - corrected / plain for plain, corrected in pairs]

    return {
        f"teacher_correction_gain_{arm.split()[-1]}": claim(
            gains(arm),
            seeds,
            f"part of the held-out loss that a teacher {arm} takes off, {tokens:,} tokens of other text",
            "",
            0.06,
        )
        for arm in ("corrected first", "corrected together")
    }


if __name__ == "__main__":
    main()
