"""SmolLM2-135M pruned and distilled: a plain script (`plain.py`) against Nestling, side by side in one run.

Zero-shot: a quarter and half of the FFN off, 4 and 6 of 30 layers off, from the same calibration text. Distillation:
the child without a quarter of its FFN, 24 steps of 4 x 256 tokens of the same text. Perplexity on text like the
training text (its validation part) and on other texts, which are given by path. Rows that are recorded already are
not computed again, so a long run may be interrupted or split by `--parts` and `--seeds`.

    python benchmarks/minitron/smollm2.py --text A.txt --other B.txt C.txt [--seeds 0 1] [--parts zero-shot distill]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import plain
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, set_seed

import nestling as nl
from nestling import data, evaluate
from nestling.surgery.repair import Repair

RESULT = Path(__file__).parents[1] / "results/minitron/smollm2.json"
MODEL = "builtin:smollm2-135m-instruct"
CONTEXT = 256
CALIBRATION_TOKENS = 8192
BATCH = 4
BUDGETS = {
    "FFN 25 % off": nl.Shape(intermediate_size=1152),
    "FFN 50 % off": nl.Shape(intermediate_size=768),
    "4 layers off": nl.Shape(num_hidden_layers=26),
    "6 layers off": nl.Shape(num_hidden_layers=24),
}
DISTILLED = "FFN 25 % off"
Build = Callable[[], PreTrainedModel]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="file to calibrate, train and validate on")
    parser.add_argument("--other", nargs="+", required=True, help="files of other text")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the calibration and training text")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--steps", type=int, default=24, help="of 4 x 256 tokens, in distillation")
    parser.add_argument("--parts", nargs="+", default=["zero-shot", "distill"], choices=["zero-shot", "distill"])
    parser.add_argument("--tokens", type=int, default=1024, help="evaluation tokens per text")
    parser.add_argument("--work", type=Path, help="folder for checkpoints, from which a distillation of ours goes on")
    bench = Bench(parser.parse_args())
    for seed in bench.chosen.seeds:
        for part in bench.chosen.parts:
            bench.run(seed, part)
    show(recorded())


class Bench:
    """The parent and the texts."""

    def __init__(self, chosen: argparse.Namespace):
        self.chosen = chosen
        model, self.tokenizer = nl.load(MODEL, dtype="float32")
        self.parent = model.eval().requires_grad_(False)

    def run(self, seed: int, part: str) -> None:
        """Add the rows of one part with one seed that are not there yet, and record them one by one."""
        for budget, arm, build in self.arms(seed, part):
            key = {"part": part, "budget": budget, "arm": arm, "seed": seed}
            if part == "distill":
                key["tokens"] = self.chosen.steps * BATCH * CONTEXT
            key["evaluation_tokens"] = self.chosen.tokens
            skipped = self.chosen.arms and arm not in self.chosen.arms
            if skipped or any(key.items() <= row.items() for row in recorded()):
                continue
            set_seed(seed)
            started = time.perf_counter()
            child = build()
            took = time.perf_counter() - started
            row = key | {"seconds": round(took), "params": child.num_parameters()} | self.scores(child)
            record([*recorded(), row], self.chosen)

    def arms(self, seed: int, part: str) -> Iterator[tuple[str, str, Build]]:
        """Budget, arm and how its child is made; the parent is an arm of its own."""
        if seed == self.chosen.seeds[0]:
            yield "none", "parent", lambda: self.parent
        source = Source(self, seed)
        for budget, shape in BUDGETS.items():
            arms: dict[str, Build] = {
                "plain script": partial(source.by_plain_script, shape),
                "nestling, no repair": partial(source.sliced, shape),
                "nestling": partial(source.repaired, shape),
            }
            if part == "distill":
                arms = {name: partial(self.distilled, name, arms[name], seed) for name in ("plain script", "nestling")}
            if part == "zero-shot" or budget == DISTILLED:
                yield from ((budget, arm, build) for arm, build in arms.items())

    def distilled(self, arm: str, build: Build, seed: int) -> PreTrainedModel:
        tokens, child = self.chosen.steps * BATCH * CONTEXT, build()
        if arm == "plain script":
            return plain.distill(child, self.parent, self.text(tokens, seed), BATCH, rate=2e-4)
        folder = self.chosen.work and self.chosen.work / f"seed-{seed}"
        return nl.distill(child, self.parent, self.chosen.text, self.tokenizer, None, folder, tokens=tokens, seed=seed)

    def text(self, tokens: int, seed: int) -> Tensor:
        """Rows `[rows, CONTEXT]` of the training part of the text."""
        parts = data.batches(self.chosen.text, self.tokenizer, context=CONTEXT, tokens=tokens, seed=seed)
        return torch.cat([part["input_ids"] for part in parts])

    def scores(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        found = {}
        for path in [self.chosen.text, *self.chosen.other]:
            split = "validation" if path == self.chosen.text else "all"
            result = evaluate.perplexity(
                model, self.tokenizer, path, context=CONTEXT, tokens=self.chosen.tokens, split=split
            )
            found[Path(path).stem] = round(result.value, 3)
        return {"perplexity": found}


class Source:
    """What the arms of one seed cut by: the same amount of calibration text from the same source."""

    def __init__(self, bench: Bench, seed: int):
        self.bench, self.parent, self.seed = bench, bench.parent, seed + 1000

    @cached_property
    def text(self) -> Tensor:
        return self.bench.text(CALIBRATION_TOKENS, self.seed)

    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        return [{"input_ids": rows} for rows in self.text.split(8)]

    @cached_property
    def ranking(self) -> nl.Ranking:
        return nl.rank(self.parent, self.batches)

    @cached_property
    def mixed(self) -> list[dict[str, Tensor]]:
        """Half of it the parent's own, as `compress` takes it."""
        options = {"tokens": CALIBRATION_TOKENS, "context": CONTEXT, "seed": self.seed}
        return data.calibration(self.parent, self.bench.tokenizer, self.bench.chosen.text, **options)

    @cached_property
    def mixed_ranking(self) -> nl.Ranking:
        return nl.rank(self.parent, self.mixed)

    @cached_property
    def repair(self) -> Repair:
        return Repair(self.parent, self.mixed)

    def by_plain_script(self, shape: nl.Shape) -> PreTrainedModel:
        if (neurons := shape.get("intermediate_size")) is not None:
            return plain.cut_neurons(self.parent, self.text, neurons)
        return plain.cut_layers(
            self.parent, self.text, self.parent.config.num_hidden_layers - shape["num_hidden_layers"]
        )

    def sliced(self, shape: nl.Shape) -> PreTrainedModel:
        return nl.prune(self.parent, self.ranking, shape)

    def repaired(self, shape: nl.Shape) -> PreTrainedModel:
        return nl.prune(self.parent, self.mixed_ranking, shape, repair=self.repair)


def recorded() -> list[dict[str, Any]]:
    """The rows so far: several runs may add to them at once."""
    return json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []


def record(rows: list[dict[str, Any]], chosen: argparse.Namespace) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    texts = " ".join(Path(path).name for path in chosen.other)
    content = {
        "command": f"python benchmarks/minitron/smollm2.py --text {Path(chosen.text).name} --other {texts}",
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("nestling", "torch", "transformers")},
        "seeds": sorted({row["seed"] for row in rows}),
        "rows": rows,
        "claims": claims(rows),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(content, indent=1) + "\n")


def claims(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For every budget our perplexity over the plain script's, the geometric mean over texts and seeds."""
    found = {}
    for part in ("zero-shot", "distill"):
        for budget in BUDGETS:
            ratios = [
                [us["perplexity"][text] / them["perplexity"][text] for text in us["perplexity"]]
                for us in rows
                for them in rows
                if (us["part"], us["budget"], us["arm"]) == (part, budget, "nestling")
                and (them["part"], them["budget"], them["arm"]) == (part, budget, "plain script")
                and us["seed"] == them["seed"]
            ]
            if ratios:
                every = [ratio for pair in ratios for ratio in pair]
                found[f"perplexity_vs_plain_script, {part}, {budget}"] = {
                    "value": geometric_mean(every),
                    "spread": [min(every), max(every)],
                    "seeds": len(ratios),
                    "paper": None,
                    "unit": "x",
                    "how": "perplexity over the plain script's at equal parameters and tokens; below 1 is better",
                }
    return found


def show(rows: list[dict[str, Any]]) -> None:
    texts = list(rows[0]["perplexity"])
    table = Table("part", "budget", "arm", "seed", "parameters", *texts)
    for row in sorted(rows, key=lambda row: (row["part"] != "zero-shot", *map(str, (row["budget"], row["arm"])))):
        figures = (f"{row['perplexity'][text]:.1f}" for text in texts)
        table.add_row(row["part"], row["budget"], row["arm"], str(row["seed"]), f"{row['params']:,}", *figures)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
