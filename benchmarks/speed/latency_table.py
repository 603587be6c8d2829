"""How far the latency table is from the clock: predicted against measured step times of shapes of SmolLM2-135M.

The table is measured anew, not read. Then models of several shapes (random weights; the speed does not depend on them)
decode one token each in turns in one process, and the ratio of each one's step to the parent's beside it is compared
with the ratio that the table predicts, because a limit such as latency=0.7x is a ratio. One thread, by the wall clock,
so it wants a quiet machine: asking for processor time at every part of a step costs a twentieth of the step. Also: each
model of the table as the others foretell it, and how long it takes to price thousands of shapes.

    python benchmarks/speed/latency_table.py [--rounds 5] [--context 512]
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

import torch
from rich.console import Console
from rich.table import Table as Printed
from transformers import AutoModelForCausalLM, PreTrainedModel

from nestling import hub
from nestling.anatomy import Anatomy, cache_name, decoder
from nestling.search import Pricing, describe
from nestling.search.latency import Curve, Table
from nestling.search.parts import Work, parts
from nestling.search.timing import STEPS, WARM, measure
from nestling.shape import Shape, child_config

RESULT = Path(__file__).parents[1] / "results/speed/latency_table.json"
MODEL = "builtin:smollm2-135m-instruct"
SHAPES = (
    Shape(),
    Shape(intermediate_size=768),
    Shape(num_hidden_layers=15),
    Shape(hidden_size=432, intermediate_size=1152),
    Shape(num_key_value_heads=1, num_hidden_layers=24),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of decoding")
    parser.add_argument("--context", type=int, default=256, help="tokens before those that are timed")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    anatomy = Anatomy.of(hub.config(MODEL))
    started = time.perf_counter()
    work = Work(1, chosen.context)
    table = Table(work, measure(anatomy, torch.device("cpu"), torch.float32, work))
    taken = time.perf_counter() - started
    pricing = Pricing(anatomy, latency=lambda form: table.milliseconds(anatomy, form))
    rows = compare(pricing, chosen)
    others = left_out(table, anatomy)
    each = speed(table, pricing)
    show(rows)
    Console().print(f"each model of the table by the others: {max(map(abs, others)):.1%} off at most")
    Console().print(f"table: {taken:.0f} s; pricing a shape: {1e3 * each:.2f} ms")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record(rows, others, chosen, taken, each), indent=1) + "\n")


def compare(pricing: Pricing, chosen: argparse.Namespace) -> list[dict]:
    """Predicted and measured milliseconds of each shape, and of ratios to the parent the median over turns."""
    models = [model(pricing, shape) for shape in SHAPES]
    taken: list[list[float]] = [[] for _ in SHAPES]
    for _ in range(chosen.rounds):
        for own, seconds in zip(taken, in_turns(models, chosen.context), strict=True):
            own.extend(seconds)
    rows = []
    for shape, each in zip(SHAPES, taken, strict=True):
        ratios = [own / parent for own, parent in zip(each, taken[0], strict=True)]
        low, _, high = quantiles(ratios, n=4) if shape else (1.0, 1.0, 1.0)
        row = {"shape": describe(shape), "predicted_ms": pricing.cost(shape).latency_ms, "measured_ms": median(each)}
        rows.append(row | {"measured_ratio": median(ratios), "middle_half": [low, high]})
    for row in rows:
        row["predicted_ratio"] = row["predicted_ms"] / rows[0]["predicted_ms"]
        row["error"] = row["predicted_ratio"] / row["measured_ratio"] - 1
    return rows


@torch.no_grad()
def in_turns(models: list[PreTrainedModel], context: int) -> list[list[float]]:
    """Milliseconds of decoding steps after `context` tokens of each model, one step of each in turn."""
    ids, ready = torch.ones(1, context, dtype=torch.long), []
    for child in models:
        name = cache_name(child)
        ready.append({name: decoder(child)(input_ids=ids, use_cache=True)[name]})
    taken: list[list[float]] = [[] for _ in models]
    for _ in range(WARM + STEPS):
        for child, cached, own in zip(models, ready, taken, strict=True):
            started = time.perf_counter()
            child(input_ids=ids[:, :1], use_cache=True, **cached)
            own.append(1e3 * (time.perf_counter() - started))
    return [own[WARM:] for own in taken]


def left_out(table: Table, anatomy: Anatomy) -> list[float]:
    """The error of each of the table's models, as many layers as the parent has, if all but it had been timed."""
    many = Counter(part.name for part in parts(anatomy))
    errors = []
    for index in range(len(next(iter(table.samples.values())))):
        foretold = measured = 0.0
        for name, samples in table.samples.items():
            one, others = samples[index], samples[:index] + samples[index + 1 :]
            foretold += many[name] * Curve.fit(others).at(one.sizes, one.reads)
            measured += many[name] * one.seconds
        errors.append(foretold / measured - 1)
    return errors


def model(pricing: Pricing, shape: Shape) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        child_config(pricing.anatomy, pricing.form(shape)), dtype=torch.float32
    ).eval()


def speed(table: Table, pricing: Pricing) -> float:
    """Seconds to price one of 2,000 shapes, its form given."""
    sizes = itertools.product(range(1024, 1536, 32), (360, 432, 504, 576), range(15, 31), (2, 3))
    shapes = [
        Shape(intermediate_size=ffn, hidden_size=hidden, num_hidden_layers=layers, num_key_value_heads=groups)
        for ffn, hidden, layers, groups in itertools.islice(sizes, 2000)
    ]
    forms = [pricing.form(shape, check_config=False) for shape in shapes]
    started = time.perf_counter()
    for form in forms:
        table.milliseconds(pricing.anatomy, form)
    return (time.perf_counter() - started) / len(forms)


def record(rows: list[dict], others: list[float], chosen: argparse.Namespace, taken: float, each: float) -> dict:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    errors = [abs(row["error"]) for row in rows[1:]]
    return {
        "command": f"python benchmarks/speed/latency_table.py --rounds {chosen.rounds} --context {chosen.context}",
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("nestling", "torch", "transformers")},
        "threads": torch.get_num_threads(),
        "seeds": [0],
        "seconds_to_measure": taken,
        "seconds_per_shape": each,
        "errors_left_out": others,
        "rows": rows,
        "claims": {
            "latency_prediction_error": {
                "value": round(median(errors), 3),
                "spread": [round(min(errors), 3), round(max(errors), 3)],
                "seeds": [0],
                "paper": None,
                "unit": "relative",
                "how": "error of the predicted ratio of a shape's decoding step to SmolLM2's, median and range over "
                f"{len(errors)} shapes; {chosen.rounds} rounds of {STEPS} tokens, by turns",
            }
        },
    }


def show(rows: list[dict]) -> None:
    table = Printed("shape", "predicted ms", "measured ms", "predicted ratio", "measured ratio", "middle half", "error")
    for row in rows:
        low, high = row["middle_half"]
        table.add_row(
            row["shape"],
            f"{row['predicted_ms']:.1f}",
            f"{row['measured_ms']:.1f}",
            f"{row['predicted_ratio']:.2f}",
            f"{row['measured_ratio']:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{row['error']:+.0%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
