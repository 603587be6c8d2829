"""Decoding with compiled mixers (`compiled_steps`) against transformers' own path, side by side in one process.

The models of `long_context.py`: a hybrid and its half-size child, random weights, random keys and values of a long text
before the tokens that are decoded. Compiling is done before anything is timed.

    python -m benchmarks.hybrid.steps [--contexts 1024 8192] [--rounds 8] [--tokens 8]
"""

from __future__ import annotations

import argparse
import copy
import time
from statistics import median

from benchmarks.hybrid.long_context import built, decode, filled, in_turn
from benchmarks.record import Record, Row, claim, show
from transformers import PreTrainedModel, set_seed

from nestling.anatomy import compiled_steps

MODELS = ("parent", "child")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192], help="tokens before those decoded")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8, help="tokens that a round decodes each way")
    chosen, record = parser.parse_args(), Record("hybrid", "steps")
    set_seed(0)
    models, record.rows = built(), []
    for name in MODELS:
        record.rows += measured(name, models[name], chosen.contexts, chosen.rounds, chosen.tokens)
        record.save(claims(record.rows), seeds=[0])
    show(record.rows, ("what", "context"), ("ms", "compiled_ms", "compiling_s", "speedup"))


def measured(name: str, model: PreTrainedModel, contexts: list[int], rounds: int, tokens: int) -> list[Row]:
    """Milliseconds of a step both ways after each context, in turn."""
    ways, rows = {"stock": model, "compiled": copy.deepcopy(model)}, []
    with compiled_steps(ways["compiled"]):
        start = time.perf_counter()
        decode(ways["compiled"], filled(ways["compiled"], contexts[0]), 3)
        compiling = time.perf_counter() - start
        for context in contexts:
            taken = in_turn(ways, context, rounds, tokens)
            ratios = [round(a / b, 3) for a, b in zip(taken["stock"], taken["compiled"], strict=True)]
            row = {"what": name, "context": context, "ms": round(1e3 * median(taken["stock"]), 2)}
            row |= {"compiled_ms": round(1e3 * median(taken["compiled"]), 2), "compiling_s": round(compiling, 1)}
            rows.append(row | {"speedup": round(median(ratios), 3), "ratios": ratios})
    return rows


def claims(rows: list[Row]) -> dict[str, Row]:
    made = {}
    for row in rows:
        how = (
            f"a decoding step of the {row['what']} after {row['context']:,} tokens, batch 1, float32: time of "
            f"transformers' own path over that with compiled mixers, median and range of rounds"
        )
        found = claim(row["ratios"], [0], how, "x") | {"value": row["speedup"]}
        made[f"compiled_steps_speedup_{row['what']}_{row['context']}"] = found
    return made


if __name__ == "__main__":
    main()
