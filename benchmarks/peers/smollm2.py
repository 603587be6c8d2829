"""SmolLM2-135M pruned by others' criteria and by Nestling's defaults, side by side in one run; and distilled.

A quarter and half of the FFN off, 4 and 6 of 30 layers off. Every arm gets as many tokens of calibration text from the
same file; Nestling, as `compress` does, replaces half of them by the parent's own text and repairs the cut. `by` says
what a row is: a peer's package from PyPI, driving each FFN on its own, or its published criterion behind the metric
interface. Perplexity on text like the calibration text (its validation part) and on other texts, given by path.

`--tokens N` distills the children of two budgets on so many tokens of the text, all in the same way, but for what is
hopeless or of no interest then. Rows that are recorded are not computed again.

    python -m benchmarks.peers.smollm2 --text A.txt --other B.txt C.txt [--seeds 0 1]
    python -m benchmarks.peers.smollm2 --text A.txt --other B.txt C.txt --seeds 0 --tokens 8192
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
import torch_pruning as tp
from benchmarks.record import Record, Row, claim
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, set_seed

import nestling as nl
from nestling import data, evaluate
from nestling.surgery.repair import Repair

MODEL = "builtin:smollm2-135m-instruct"
CONTEXT, CALIBRATION_TOKENS, EVALUATION_TOKENS = 256, 4096, 512
GRADIENT_ROWS = 8  # of the 16 of calibration text, which is over three times as much as LLM-Pruner takes
FFN, DEPTH = "intermediate_size", "num_hidden_layers"
BUDGETS = {
    "FFN 25 % off": nl.Shape(intermediate_size=1152),
    "FFN 50 % off": nl.Shape(intermediate_size=768),
    "4 layers off": nl.Shape(num_hidden_layers=26),
    "6 layers off": nl.Shape(num_hidden_layers=24),
}
DISTILLED = ("FFN 25 % off", "4 layers off")
HOPELESS = ("Torch-Pruning, magnitude", "random, ends kept", "nestling, cut alone")  # or of no interest, once distilled
CRITERIA = {"Wanda, summed over columns": "wanda", "FLAP, without its bias": "flap"}  # of neurons: arm -> metric
OURS = "nestling"
Build = Callable[[], PreTrainedModel]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="file to calibrate on, and to judge on by its validation part")
    parser.add_argument("--other", nargs="+", required=True, help="files of other text")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the calibration text")
    parser.add_argument(
        "--tokens", type=int, default=0, help="of distillation, at the mild budgets alone; 0: as pruned"
    )
    chosen, record = parser.parse_args(), Record("peers", "smollm2")
    parent, tokenizer = nl.load(MODEL, dtype="float32")
    judge = Judge(chosen.text, chosen.other, tokenizer)
    record.row({"budget": "none", "arm": "parent", "by": "", "seed": 0, "tokens": 0}, lambda: judge(parent))
    for seed in chosen.seeds:
        peers = Peers(parent, tokenizer, chosen.text, seed)
        for budget, arm, by, build in rows(peers, chosen.tokens):
            key = {"budget": budget, "arm": arm, "by": by, "seed": seed, "tokens": chosen.tokens}
            record.row(key, lambda build=build: judge(build()))
        record.save(claims(record), calibration_tokens=CALIBRATION_TOKENS, evaluation_tokens=EVALUATION_TOKENS)
    show(record)


def rows(peers: Peers, tokens: int) -> Iterator[tuple[str, str, str, Build]]:
    """Budget, arm, what it is of the peer, and how its child is made and, for more than 0 tokens, distilled."""
    for budget, shape in BUDGETS.items():
        for arm, by, build in peers.arms(shape):
            if not tokens:
                yield budget, arm, by, build
            elif budget in DISTILLED and arm not in HOPELESS:
                yield budget, arm, by, lambda build=build: peers.distilled(build(), tokens)


class Judge:
    """Perplexity of a model on every text."""

    def __init__(self, text: str, other: list[str], tokenizer: Any):
        self.texts, self.tokenizer = {text: "validation", **dict.fromkeys(other, "all")}, tokenizer

    def __call__(self, model: PreTrainedModel) -> Row:
        how = {"context": CONTEXT, "tokens": EVALUATION_TOKENS}
        found = {
            Path(path).stem: round(evaluate.perplexity(model, self.tokenizer, path, split=split, **how).value, 3)
            for path, split in self.texts.items()
        }
        return {"params": model.num_parameters(), "perplexity": found}


class Peers:
    """One sample of calibration text, and every arm's child of it."""

    def __init__(self, parent: PreTrainedModel, tokenizer: Any, text: str, seed: int):
        self.parent, self.tokenizer, self.text, self.seed = parent.eval(), tokenizer, text, seed
        options = {"context": CONTEXT, "tokens": CALIBRATION_TOKENS, "seed": seed + 1000}
        self.batches = data.batches(text, tokenizer, **options)
        self._mixed = lambda: data.calibration(parent, tokenizer, text, **options)

    def arms(self, shape: nl.Shape) -> Iterator[tuple[str, str, Build]]:
        """Name, what it is of the peer, and how its child is made."""
        package = f"torch-pruning {version('torch-pruning')}"
        if FFN in shape:
            yield (
                "Torch-Pruning, magnitude",
                package,
                lambda: self.by_package(shape, tp.importance.GroupMagnitudeImportance()),
            )
            yield (
                "Torch-Pruning, Taylor (LLM-Pruner)",
                package,
                lambda: self.by_package(shape, tp.importance.GroupTaylorImportance(), True),
            )
            for arm, metric in CRITERIA.items():
                yield arm, "criterion", lambda metric=metric: self.by_criterion(shape, self.neurons(metric))
            yield "nestling, cut alone", "same text", lambda: nl.prune(self.parent, self.layers(), shape)
        else:
            layers = self.parent.config.num_hidden_layers - shape[DEPTH]
            for arm, scores in {
                "ShortGPT, block influence": lambda: self.layers(),
                "neighbouring layers, by influence": lambda: self.layers(layer_block=layers),
                "random, ends kept": self.random_layers,
            }.items():
                yield arm, "criterion", lambda scores=scores: self.by_criterion(shape, scores())
        yield OURS, "default, repaired", lambda: nl.prune(self.parent, self.mixed_ranking, shape, repair=self.repair)

    def distilled(self, child: PreTrainedModel, tokens: int) -> PreTrainedModel:
        """By `distill`'s defaults, whoever cut the child."""
        return nl.distill(child, self.parent, self.text, self.tokenizer, tokens=tokens, context=CONTEXT, seed=self.seed)

    def by_criterion(self, shape: nl.Shape, ranking: nl.Ranking) -> PreTrainedModel:
        return nl.prune(self.parent, ranking, shape)

    def by_package(self, shape: nl.Shape, importance: Any, gradients: bool = False) -> PreTrainedModel:
        """Each FFN pruned by Torch-Pruning's own graph, groups and importance; the layers stay of one size."""
        child = copy.deepcopy(self.parent).requires_grad_(True)
        for name, parameter in child.named_parameters():
            parameter.grad = self.gradients[name].clone() if gradients else None
        ratio = 1 - shape[FFN] / child.config.intermediate_size
        for layer in child.model.layers:
            example = torch.randn(1, 2, child.config.hidden_size)
            tp.pruner.BasePruner(
                layer.mlp, example, importance, pruning_ratio=ratio, ignored_layers=[layer.mlp.down_proj]
            ).step()
        child.config.intermediate_size = shape[FFN]
        child.zero_grad(set_to_none=True)
        assert {layer.mlp.down_proj.weight.shape[1] for layer in child.model.layers} == {shape[FFN]}
        return child

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Of the loss on half of the calibration text, for every weight: LLM-Pruner's criterion sums |w dL/dw|."""
        self.parent.requires_grad_(True)
        for row in torch.cat([batch["input_ids"] for batch in self.batches])[:GRADIENT_ROWS].split(1):
            self.parent(row, labels=row, use_cache=False).loss.backward()
        found = {name: p.grad for name, p in self.parent.named_parameters()}
        self.parent.zero_grad(set_to_none=True)
        self.parent.requires_grad_(False)
        return found

    @cache  # noqa: B019  as long as the seed's peers
    def neurons(self, metric: str) -> nl.Ranking:
        set_seed(self.seed)
        return nl.rank(self.parent, self.batches, metric={FFN: metric})

    @cache  # noqa: B019
    def layers(self, **how: Any) -> nl.Ranking:
        return nl.rank(self.parent, self.batches, **how)

    def random_layers(self) -> nl.Ranking:
        scores = torch.rand(self.parent.config.num_hidden_layers, generator=torch.Generator().manual_seed(self.seed))
        scores[[0, -1]] = 2.0
        return nl.Ranking({**self.layers().scores, DEPTH: scores})

    @cached_property
    def mixed(self) -> list[dict[str, Tensor]]:
        return self._mixed()

    @cached_property
    def mixed_ranking(self) -> nl.Ranking:
        return nl.rank(self.parent, self.mixed)

    @cached_property
    def repair(self) -> Repair:
        return Repair(self.parent, self.mixed)


def claims(record: Record) -> dict[str, Row]:
    """Our perplexity over that of the peer which is best at the budget, over all texts and seeds, for each length."""
    found = {}
    for tokens in sorted({row["tokens"] for row in record.rows}):
        for budget in BUDGETS:
            same = [row for row in record.rows if (row["budget"], row["tokens"]) == (budget, tokens)]
            if any(row["arm"] == OURS for row in same):
                name = f"perplexity_vs_best_peer, {budget}" + (f", {tokens:,} tokens" if tokens else "")
                trained = f"each distilled on {tokens:,} tokens" if tokens else "no training"
                found[name] = against_best(same, f"SmolLM2-135M, {budget}, {trained}")
    return found


def against_best(rows: list[Row], what: str) -> Row:
    arms: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], {})[row["seed"]] = row["perplexity"]
    means = {
        arm: geometric_mean([p for texts in seeds.values() for p in texts.values()]) for arm, seeds in arms.items()
    }
    best = min((arm for arm in arms if not arm.startswith(OURS)), key=means.__getitem__)
    seeds = sorted(arms[OURS].keys() & arms[best].keys())
    ratios = [arms[OURS][s][text] / arms[best][s][text] for s in seeds for text in arms[OURS][s]]
    value = claim(ratios, seeds, f"perplexity over that of the best peer ({best}), {what}; below 1 is better", "x")
    return value | {"value": round(geometric_mean(ratios), 4)}


def show(record: Record) -> None:
    texts = list(record.rows[0]["perplexity"])
    table = Table("budget", "tokens", "arm", "by", "seed", *texts)
    for row in sorted(record.rows, key=lambda row: (row["budget"], row["tokens"], row["arm"], row["seed"])):
        figures = (f"{row['perplexity'][text]:.1f}" for text in texts)
        table.add_row(row["budget"], str(row["tokens"]), row["arm"], row["by"], str(row["seed"]), *figures)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
