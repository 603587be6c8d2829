"""A run folder as `compress` would leave it: 30 layers, 9 query heads in 3 groups, four layers dropped."""

import json
import math
import random
from pathlib import Path
from typing import Any

LAYERS, NEURONS, KEPT_NEURONS = 30, 1536, 1152
DROPPED = (11, 17, 20, 25)

COMMAND = (
    "nestling compress builtin:smollm2-135m-instruct --to 0.75x --data builtin:stdlib --seed 0 --out runs/smollm2-100m"
)

SAMPLES = [
    {
        "prompt": "def read_lines(path):",
        "parent": '\n    """Read all lines of a text file."""\n    with open(path) as file:\n        return list(file)',
        "child": '\n    """Return the lines of the file."""\n    with open(path) as f:\n        return f.readlines()',
    },
    {
        "prompt": "The most important thing about a nest is",
        "parent": " that it keeps the eggs warm and out of reach. Birds build it from what is near: twigs, moss, mud.",
        "child": " that it is a safe place for the eggs. The birds use twigs, and <b>they</b> return to it.",
    },
]


def importances(layers: int, units: int, seed: int) -> list[list[float]]:
    """Scores with a heavy tail, larger towards the end of the model, in no order."""
    draw = random.Random(seed)
    return [[math.exp(draw.gauss(0.035 * layer - 1.0, 0.9)) for _ in range(units)] for layer in range(layers)]


def axis(
    field: str, units: int, child: int, layers: int = LAYERS, dropped: tuple[int, ...] = DROPPED
) -> dict[str, Any]:
    sizes = [0 if layer in dropped else child for layer in range(layers)]
    return {
        "field": field,
        "scope": "layer",
        "parent": [units] * layers,
        "child": sizes,
        "importance": importances(layers, units, seed=units),
    }


def cost(params: int, flops: float, kv: int) -> dict[str, int]:
    return {
        "params": params,
        "active_params": params,
        "weight_bytes": 2 * params,
        "kv_bytes": kv,
        "state_bytes": 0,
        "flops_per_token": int(flops),
        "context": 4096,
        "batch": 1,
    }


def evaluation(stdlib: float, wiki: float) -> dict[str, dict[str, float]]:
    figures = {"builtin:stdlib": stdlib, "data/wikitext-103.jsonl": wiki}
    return {
        name: {"perplexity": value, "loss": math.log(value), "tokens": 65536, "context": 512, "stride": 256}
        for name, value in figures.items()
    }


def speed(prefill: float, decode: float) -> dict[str, float]:
    return {
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode,
        "prompt_tokens": 512,
        "new_tokens": 64,
        "batch": 1,
    }


def candidates() -> list[dict[str, Any]]:
    draw = random.Random(3)
    shapes = [
        {"intermediate_size": neurons, "num_hidden_layers": layers, "hidden_size": hidden}
        for neurons, layers, hidden in [
            (1152, 26, 576), (1536, 22, 576), (1024, 28, 576), (896, 30, 576), (1280, 24, 576), (1536, 27, 512),
            (1408, 29, 512), (1280, 30, 512), (768, 30, 576), (1152, 28, 544),
        ]
    ]  # fmt: skip
    return [
        {"shape": shape, "params": 100_000_000 + draw.randrange(-1_600_000, 900_000), "loss": 4.43 + 0.13 * place**0.7}
        for place, shape in enumerate(shapes)
    ]


def summary() -> dict[str, Any]:
    """A complete `summary.json`."""
    draw = random.Random(5)
    importance = [draw.uniform(0.04, 0.16) for _ in range(LAYERS)]
    importance[0], importance[-1] = 0.62, 0.41
    for layer in DROPPED:
        importance[layer] = draw.uniform(0.01, 0.03)
    return {
        "title": "SmolLM2-135M-Instruct to 0.75x",
        "command": COMMAND,
        "created": "2026-11-24T09:12:44+00:00",
        "seed": 0,
        "versions": {"nestling": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
        "machine": "2 cores, 15.6 GiB, Linux x86_64",
        "budget": "0.75x",
        "data": {
            "train": "builtin:stdlib",
            "calibration_tokens": 65536,
            "distill_tokens": 409600,
            "validation": "builtin:stdlib",
        },
        "parent": {
            "name": "builtin:smollm2-135m-instruct",
            "architecture": "llama",
            "config": {"hidden_size": 576},
            "cost": cost(134_515_008, 3.26e8, 94_371_840),
            "evaluation": evaluation(13.82, 24.61),
            "speed": speed(1311.2, 38.41),
        },
        "child": {
            "name": "smollm2-100m",
            "config": {"hidden_size": 576},
            "cost": cost(99_862_848, 2.45e8, 81_788_928),
            "pruned": evaluation(41.07, 83.3),
            "evaluation": evaluation(17.12, 33.9),
            "speed": speed(1733.9, 50.27),
        },
        "shape": {"intermediate_size": KEPT_NEURONS, "num_hidden_layers": 26, "hidden_size": 576},
        "layers": {
            "parent": LAYERS,
            "kept": [layer for layer in range(LAYERS) if layer not in DROPPED],
            "importance": importance,
        },
        "axes": [
            axis("intermediate_size", NEURONS, KEPT_NEURONS),
            axis("num_attention_heads", 9, 6),
            axis("num_key_value_heads", 3, 3),
            {
                "field": "hidden_size",
                "scope": "model",
                "parent": 576,
                "child": 512,
                "importance": importances(1, 576, seed=1)[0],
            },
        ],
        "candidates": candidates(),
        "samples": SAMPLES,
    }


def metrics(steps: int = 400, tokens_per_step: int = 1024) -> list[dict[str, float]]:
    """A training log: a loss that falls with noise, and an evaluation every fifty steps."""
    draw = random.Random(2)
    records: list[dict[str, float]] = [{"step": 0, "eval_loss": 3.715}]
    for step in range(1, steps + 1):
        level = 2.78 + 1.05 * math.exp(-step / 70)
        loss = level + draw.gauss(0, 0.09)
        records.append({"step": step, "tokens": step * tokens_per_step, "loss": loss, "learning_rate": 2e-4})
        if step % 50 == 0:
            records.append({"step": step, "eval_loss": level + 0.05})
    return records


SETTINGS = """model: builtin:smollm2-135m-instruct
to: 0.75x
data: builtin:stdlib
seed: 0
distill:
  tokens: 409600
  learning_rate: 0.0002
  schedule: cosine
"""


def write_run(folder: Path, found: dict[str, Any] | None = None, log: list[dict[str, float]] | None = None) -> Path:
    """Lay a run folder, complete unless told otherwise, with an empty `model/`."""
    (folder / "model").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary() if found is None else found))
    lines = [json.dumps(record) for record in (metrics() if log is None else log)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "run.yaml").write_text(SETTINGS)
    return folder
