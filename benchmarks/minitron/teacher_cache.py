"""What it saves to ask the teacher once: three students from a live teacher against three from its cache.

The parent's likeliest 32 tokens of 512, kept on disk, serve children of 0.76, 0.54 and 0.33 of its size; the live arm
compares the same 32 tokens. Processor time on one thread, arms in turns; the cache's own making counts.

    python -m benchmarks.minitron.teacher_cache [--seeds 0 1] [--tokens 8192]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.minitron.common import Ground
from benchmarks.minitron.from_scratch import HALF, MORE, SHAPES
from benchmarks.record import Record, Row, claim, show

import nestling as nl

STUDENTS = {"0.76x": SHAPES[MORE], "0.54x": SHAPES[HALF], "0.33x": nl.Shape(hidden_size=64, intermediate_size=64)}
TOP_K = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--tokens", type=int, default=8192, help="of distillation, for each student")
    chosen, record = parser.parse_args(), Record("minitron", "teacher_cache")
    for seed in chosen.seeds:
        ground = Ground(seed)
        children = {name: nl.prune(ground.parent, ground.ranking, shape) for name, shape in STUDENTS.items()}
        with tempfile.TemporaryDirectory() as folder:
            for name, pruned in children.items():  # the first student pays for the cache
                for arm, cache in (("live", None), ("cache", Path(folder, "teacher"))):
                    key = {"seed": seed, "student": name, "arm": arm}
                    record.row(key, lambda g=ground, p=pruned, c=cache: figures(g, p, chosen.tokens, c))
        record.save(claims(record), tokens=chosen.tokens)
    show(record.rows, ("student", "arm"), ("cpu_seconds", "loss"))


def figures(ground: Ground, pruned, tokens: int, cache: Path | None) -> Row:
    started = time.process_time()
    model = ground.trained(pruned, tokens, top_k=TOP_K, cache=cache)
    return {"cpu_seconds": round(time.process_time() - started, 2), "loss": round(ground.loss(model), 4)}


def claims(record: Record) -> dict[str, Row]:
    seeds = sorted({row["seed"] for row in record.rows})

    def total(seed: int, arm: str, field: str) -> float:
        return sum(row[field] for row in record.rows if (row["seed"], row["arm"]) == (seed, arm))

    return {
        "teacher_cache_speedup": claim(
            [total(s, "live", "cpu_seconds") / total(s, "cache", "cpu_seconds") for s in seeds],
            seeds,
            "processor time of distilling three students from a live teacher over that from its cache, its making "
            "included",
            "x",
        ),
        "teacher_cache_loss_difference": claim(
            [(total(s, "cache", "loss") - total(s, "live", "loss")) / len(STUDENTS) for s in seeds],
            seeds,
            "held-out loss of students from the cache minus from the live teacher, mean of three",
            "nats",
        ),
    }


if __name__ == "__main__":
    main()
