"""How far the latency table is from the clock: predicted against measured step times of shapes of SmolLM2-135M.

The table is measured anew, not read. Then models of several shapes (random weights; the speed does not depend on them)
decode in turns in one process, and the ratio of each one's step to the parent's is compared with the ratio that the
table predicts, because a limit such as latency=0.7x is a ratio. Both are in processor time of one thread, which other
work on the machine stretches little. Also: how long it takes to price thousands of shapes.

    python benchmarks/speed/latency_table.py [--rounds 5] [--context 512]
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table as Printed
from transformers import AutoModelForCausalLM, PreTrainedModel

from nestling import hub
from nestling.anatomy import Anatomy, cache_name, decoder
from nestling.search import Pricing, describe
from nestling.search.latency import Table
from nestling.search.parts import Work
from nestling.search.timing import measure
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
    parser.add_argument("--rounds", type=int, default=5, help="rounds of decoding that count")
    parser.add_argument("--context", type=int, default=256, help="tokens before those that are timed")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    anatomy = Anatomy.of(hub.config(MODEL))
    started = time.perf_counter()
    work = Work(1, chosen.context)
    table = Table(work, measure(anatomy, torch.device("cpu"), torch.float32, work, clock=time.process_time))
    taken = time.perf_counter() - started
    pricing = Pricing(anatomy, latency=lambda form: table.milliseconds(anatomy, form))
    rows = compare(pricing, chosen)
    each = speed(table, pricing)
    show(rows)
    Console().print(f"table: {taken:.0f} s; pricing a shape: {1e3 * each:.2f} ms")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record(rows, chosen, taken, each), indent=1) + "\n")


def compare(pricing: Pricing, chosen: argparse.Namespace) -> list[dict]:
    """Predicted and measured milliseconds of each shape, measured in turns."""
    models = {describe(shape): model(pricing, shape) for shape in SHAPES}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(chosen.rounds):
        for name in models if turn % 2 == 0 else reversed(models):
            taken[name].append(step(models[name], chosen.context))
    rows = []
    for shape in SHAPES:
        each, predicted = taken[describe(shape)], pricing.cost(shape).latency_ms
        row = {"shape": describe(shape), "predicted_ms": predicted, "measured_ms": median(each)}
        rows.append(row | {"range_ms": [min(each), max(each)]})
    for row in rows:
        row["predicted_ratio"] = row["predicted_ms"] / rows[0]["predicted_ms"]
        row["measured_ratio"] = row["measured_ms"] / rows[0]["measured_ms"]
        row["error"] = row["predicted_ratio"] / row["measured_ratio"] - 1
    return rows


@torch.no_grad()
def step(child: PreTrainedModel, context: int, steps: int = 12) -> float:
    """Milliseconds of a decoding step after `context` tokens, median of a few."""
    ids = torch.ones(1, context, dtype=torch.long)
    name = cache_name(child)
    cached = decoder(child)(input_ids=ids, use_cache=True)[name]
    seconds = []
    for _ in range(2 + steps):
        started = time.process_time()
        child(input_ids=ids[:, :1], use_cache=True, **{name: cached})
        seconds.append(time.process_time() - started)
    return 1e3 * median(seconds[2:])


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


def record(rows: list[dict], chosen: argparse.Namespace, taken: float, each: float) -> dict:
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
        "rows": rows,
        "claims": {
            "latency_prediction_error": {
                "value": round(median(errors), 3),
                "spread": [round(min(errors), 3), round(max(errors), 3)],
                "seeds": [0],
                "paper": None,
                "unit": "relative",
                "how": "error of the predicted ratio of a shape's decoding step to SmolLM2's, median and range over "
                f"{len(errors)} shapes; {chosen.rounds} rounds in turns, processor time",
            }
        },
    }


def show(rows: list[dict]) -> None:
    table = Printed("shape", "predicted ms", "measured ms", "range", "predicted ratio", "measured ratio", "error")
    for row in rows:
        low, high = row["range_ms"]
        table.add_row(
            row["shape"],
            f"{row['predicted_ms']:.1f}",
            f"{row['measured_ms']:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{row['predicted_ratio']:.2f}",
            f"{row['measured_ratio']:.2f}",
            f"{row['error']:+.0%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
