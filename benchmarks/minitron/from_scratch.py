"""Pruning and distilling against training from scratch, on models small enough to train here from nothing.

For each seed a parent of 1.3 M parameters is trained on the standard library. It is cut to about half, by width and by
depth at equal parameters, and to three quarters, and each child is trained on `--distill` tokens: from the parent
(KD), on the text alone (plain), and with fresh weights instead of the parent's (random). Then models of the children's
shapes are trained from scratch, each length a run of its own with a whole learning-rate schedule, twice as long each
time, until one reaches the distilled child's held-out loss; the tokens in between are read off in log tokens. What is
recorded already is not trained again.

    python benchmarks/minitron/from_scratch.py [--seeds 0 1] [--parent 204800] [--distill 16384]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedModel

import nestling as nl
from nestling import data, evaluate
from nestling.data import train_tokenizer
from nestling.distill import DistillSettings
from nestling.pretrain import PretrainSettings, build, pretrain

RESULT = Path(__file__).parents[1] / "results/minitron/from_scratch.json"
TEXT, CONTEXT, VOCAB, BATCH, HELD_OUT = "builtin:stdlib", 128, 1024, 8, 16384
PARENT = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SHAPES = {
    "half, width": {"hidden_size": 104, "intermediate_size": 200},
    "half, depth": {"num_hidden_layers": 3},
    "three quarters, width": {"hidden_size": 112, "intermediate_size": 288},
}
FIRST, LAST = 40_960, 327_680  # tokens of the shortest and the longest run from scratch
LEARNING_RATE = {"scratch": 2e-3, "child": 1e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--parent", type=int, default=204_800, help="tokens to train the parent on")
    parser.add_argument("--distill", type=int, default=16_384, help="tokens to train a child on")
    parser.add_argument("--out", type=Path, default=RESULT)
    bench = Bench(parser.parse_args())
    for seed in bench.chosen.seeds:
        bench.run(seed)
    show(bench.rows)


class Bench:
    """The text, the rows so far, and one row at a time."""

    def __init__(self, chosen: argparse.Namespace):
        self.chosen = chosen
        self.rows = json.loads(chosen.out.read_text())["rows"] if chosen.out.exists() else []
        self.tokenizer = train_tokenizer(TEXT, VOCAB)
        self.held_out = data.batches(TEXT, self.tokenizer, context=CONTEXT, tokens=HELD_OUT, split="validation")

    def run(self, seed: int) -> None:
        """The parent, its children, and the runs from scratch that are held against them."""
        parent = self.parent(seed)
        calibration = data.batches(TEXT, self.tokenizer, context=CONTEXT, tokens=16384, seed=seed)
        ranking = nl.rank(parent, calibration)
        for name, shape in SHAPES.items():
            pruned = nl.prune(parent, ranking, nl.Shape(**shape), repair=calibration)
            self.note(seed, name, "pruned", 0, lambda pruned=pruned: pruned)
            for start, loss in (("pruned", "KD"), ("pruned", "plain"), ("random", "KD"), ("random", "plain")):
                if name.startswith("half") or loss == "KD":
                    self.note(
                        seed,
                        name,
                        f"{start} + {loss}",
                        self.chosen.distill,
                        lambda start=start, loss=loss, pruned=pruned: self.child(seed, parent, pruned, start, loss),
                    )
            if name.endswith("width"):
                self.ladder(seed, name, pruned)
        self.save()

    def parent(self, seed: int) -> PreTrainedModel:
        """Trained once and kept beside the result until all is done."""
        folder = Path("runs") / f"from_scratch-parent-{seed}-{self.chosen.parent}"
        if not folder.exists():
            started = time.time()
            model = self.scratch(build(AutoConfig.for_model(**PARENT), self.tokenizer, seed), self.chosen.parent, seed)
            nl.hub.save(model, folder, self.tokenizer)
            self.note(seed, "parent", "scratch", self.chosen.parent, lambda: model, started)
        return nl.load(folder)[0]

    def scratch(self, model: PreTrainedModel, tokens: int, seed: int) -> PreTrainedModel:
        settings = PretrainSettings(
            tokens=tokens, batch_size=BATCH, context=CONTEXT, learning_rate=LEARNING_RATE["scratch"], seed=seed
        )
        return pretrain(model, TEXT, self.tokenizer, settings)

    def child(
        self, seed: int, parent: PreTrainedModel, pruned: PreTrainedModel, start: str, loss: str
    ) -> PreTrainedModel:
        """A child trained on a few tokens of other text than the parent saw first."""
        model = copy.deepcopy(pruned) if start == "pruned" else build(copy.deepcopy(pruned.config), None, seed)
        weights = {"kd_weight": 1.0, "ce_weight": 0.0} if loss == "KD" else {"kd_weight": 0.0, "ce_weight": 1.0}
        rate = LEARNING_RATE["child" if start == "pruned" else "scratch"]
        settings = DistillSettings(
            tokens=self.chosen.distill,
            batch_size=BATCH,
            context=CONTEXT,
            learning_rate=rate,
            seed=seed + 100,
            **weights,
        )
        return nl.distill(model, parent, TEXT, self.tokenizer, settings)

    def ladder(self, seed: int, name: str, pruned: PreTrainedModel) -> None:
        """From scratch, longer and longer, until the distilled child's loss is reached."""
        goal, tokens = self.find(seed, name, "pruned + KD")["loss"], FIRST
        while tokens <= LAST:
            row = self.note(
                seed,
                name,
                "scratch",
                tokens,
                lambda tokens=tokens: self.scratch(build(copy.deepcopy(pruned.config), None, seed), tokens, seed),
            )
            if row["loss"] <= goal:
                return
            tokens *= 2

    def note(self, seed: int, shape: str, arm: str, tokens: int, make, started: float | None = None) -> dict:
        """The row of one model, trained unless it is recorded."""
        found = self.find(seed, shape, arm, tokens)
        if found is None:
            started = started or time.time()
            model = make()
            seconds = round(time.time() - started, 1)
            loss = evaluate.perplexity(model, None, self.held_out).loss
            found = {"seed": seed, "shape": shape, "arm": arm, "tokens": tokens, "loss": round(loss, 4)}
            found |= {"params": model.num_parameters(), "seconds": seconds}
            self.rows.append(found)
            print(found, flush=True)
            self.save()
        return found

    def find(self, seed: int, shape: str, arm: str, tokens: int | None = None) -> dict | None:
        return next(
            (
                row
                for row in self.rows
                if (row["seed"], row["shape"], row["arm"]) == (seed, shape, arm) and tokens in (None, row["tokens"])
            ),
            None,
        )

    def save(self) -> None:
        self.chosen.out.parent.mkdir(parents=True, exist_ok=True)
        self.chosen.out.write_text(json.dumps(record(self.rows, self.chosen), indent=1) + "\n")


def tokens_to_equal_loss(rows: list[dict], seed: int, shape: str) -> tuple[float, bool]:
    """Tokens from scratch that reach the distilled child's loss, interpolated in log tokens; whether they did."""
    goal = next(r["loss"] for r in rows if (r["seed"], r["shape"], r["arm"]) == (seed, shape, "pruned + KD"))
    runs = sorted(
        (r["tokens"], r["loss"]) for r in rows if (r["seed"], r["shape"], r["arm"]) == (seed, shape, "scratch")
    )
    for (few, before), (many, after) in pairwise(runs):
        if after <= goal < before:
            part = (before - goal) / (before - after)
            return math.exp(math.log(few) + part * (math.log(many) - math.log(few))), True
    return float(runs[-1][0]), runs[-1][1] <= goal


def family_cost(rows: list[dict], seed: int, parent_tokens: int, distill_tokens: int) -> float:
    """Operations of three trainings to equal loss over those of one and two distillations.

    6 per parameter and token trained, 2 more per parameter of the teacher; embeddings counted, as in the paper.
    """
    params = {row["shape"]: row["params"] for row in rows if row["seed"] == seed}
    parent = 6 * params["parent"] * parent_tokens
    children = [shape for shape in SHAPES if shape.endswith("width")]
    apart = parent + sum(6 * params[shape] * tokens_to_equal_loss(rows, seed, shape)[0] for shape in children)
    together = parent + sum((6 * params[shape] + 2 * params["parent"]) * distill_tokens for shape in children)
    return apart / together


def claims(rows: list[dict], chosen: argparse.Namespace) -> dict:
    """Whatever the rows so far give, over the seeds that are whole."""
    last = ("three quarters, width", "scratch")
    seeds = sorted({r["seed"] for r in rows if (r["shape"], r["arm"]) == last} & set(chosen.seeds))
    if not seeds:
        return {}

    def loss(seed: int, shape: str, arm: str) -> float:
        return next(r["loss"] for r in rows if (r["seed"], r["shape"], r["arm"]) == (seed, shape, arm))

    def claim(values: list[float], paper: float | None, unit: str, how: str) -> dict:
        values = [round(value, 4) for value in values]
        return {
            "value": mean(values),
            "spread": [min(values), max(values)],
            "seeds": seeds,
            "paper": paper,
            "unit": unit,
            "how": how,
        }

    reached = all(tokens_to_equal_loss(rows, seed, "half, width")[1] for seed in seeds)
    short = f"parent of 1.3 M parameters and {chosen.parent:,} tokens, child of about half, {chosen.distill:,} tokens"
    return {
        "tokens_to_equal_loss": claim(
            [tokens_to_equal_loss(rows, seed, "half, width")[0] / chosen.distill for seed in seeds],
            40.0,
            "x",
            f"tokens from scratch over tokens of distillation at equal held-out loss ({short}; "
            f"{'read off between two runs' if reached else 'not reached by the longest run: a lower bound'})",
        ),
        "family_cost_ratio": claim(
            [family_cost(rows, seed, chosen.parent, chosen.distill) for seed in seeds],
            1.8,
            "x",
            "operations of training parent, 0.73x and 0.55x apart to the losses that distillation reached, over those "
            "of the parent and two distillations; the teacher's forward passes counted",
        ),
        "kd_vs_plain_loss_gap": claim(
            [loss(s, "half, width", "pruned + plain") - loss(s, "half, width", "pruned + KD") for s in seeds],
            None,
            "nats",
            f"pruned child on text alone minus from its parent, equal tokens ({short})",
        ),
        "width_vs_depth_loss_gap": claim(
            [loss(s, "half, depth", "pruned + KD") - loss(s, "half, width", "pruned + KD") for s in seeds],
            0.106,
            "nats",
            f"3 of 6 layers off minus width cut to the same parameters, both distilled ({short})",
        ),
    }


def record(rows: list[dict], chosen: argparse.Namespace) -> dict:
    seeds = " ".join(map(str, chosen.seeds))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "command": f"python benchmarks/minitron/from_scratch.py --seeds {seeds} --parent {chosen.parent} "
        f"--distill {chosen.distill}",
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("nestling", "torch", "transformers")},
        "seeds": chosen.seeds,
        "rows": rows,
        "claims": claims(rows, chosen),
    }


def show(rows: list[dict]) -> None:
    table = Table("seed", "shape", "arm", "tokens", "parameters", "held-out loss", "seconds")
    for row in rows:
        values = (f"{row['tokens']:,}", f"{row['params']:,}", f"{row['loss']:.4f}", f"{row['seconds']:.0f}")
        table.add_row(str(row["seed"]), row["shape"], row["arm"], *values)
    Console().print(table)


if __name__ == "__main__":
    main()
