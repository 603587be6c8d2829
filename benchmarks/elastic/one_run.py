"""One elastic run for three members against one prune + distill run for each, on the same tokens.

The parent is a dense decoder of 0.7 M parameters, pretrained here on 1.28 M tokens of the source of the running Python.
`elastic` trains 0.75x and 0.5x members and the parent together on T tokens. `separate` prunes the parent by the same
ranking to the very shape that the router found and distills it on T tokens, on T/2 and on T/4; `uniform`, `random` and
`searched` are elastic runs with shapes that no router chose, of the same budgets. Losses are of held-out text, nats
per token; seconds are processor time.

    python -m benchmarks.elastic.one_run [--work runs/elastic] [--seeds 0 1] [--budgets 0.85x 0.7x 0.6x 0.5x]

How much is saved grows with the number of members, so `--budgets` takes any; a work folder is of one list of them, and
the record of any other list than the first has their number in its name. Every arm is kept in the work folder when it
is done, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.record import commit
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import nestling as nl
from nestling import hub
from nestling.data import calibration, train_tokenizer
from nestling.elastic import ElasticSettings
from nestling.elastic.controls import random, uniform
from nestling.elastic.harden import harden
from nestling.elastic.space import Space
from nestling.elastic.target import Target
from nestling.elastic.train import importance, make_plan
from nestling.evaluate import perplexity
from nestling.hub.load import load_tokenizer
from nestling.pretrain import architecture_config, build, pretrain
from nestling.search import Budget, Pricing, pick, reachable
from nestling.shape import Shape

RESULT = Path(__file__).parents[1] / "results/elastic/one_run.json"
DATA = "builtin:stdlib"
FIELDS = {
    "model_type": "llama",
    "vocab_size": 768,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
BUDGETS = ("0.75x", "0.5x")
ROWS = {"context": 128, "batch_size": 4, "micro_batch_size": 4, "save_every": 0}
TOKENS = ROWS["context"] * ROWS["batch_size"]
PARENT_STEPS = 2500
RATE = 1e-3
CONTROLS = ("uniform", "random", "searched")
NEAR = 100.0  # how much more than anything else the searched sizes are wished for
PARTS = (1.0, 0.5, 0.25)  # of the elastic run's tokens, for separate runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="runs/elastic", help="folder for what is done")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--controls", nargs="*", default=CONTROLS, help="shapes to compare with")
    parser.add_argument("--steps", type=int, default=160, help="steps of the elastic run, of 512 tokens each")
    parser.add_argument("--routing", type=float, default=0.2, help="part of them in which the router learns")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), help="of the members")
    parser.add_argument("--weights", type=float, nargs="+", help="of the parent and the members; 1 and 2s unless given")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    options = {"routing": chosen.routing, "weights": chosen.weights or [1.0] + [2.0] * len(chosen.budgets)}
    bench = Bench(Path(chosen.work), chosen.steps, options, chosen.budgets)
    rows = [row for seed in chosen.seeds for row in bench.rows(seed, chosen.controls)]
    show(rows)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    usual = tuple(chosen.budgets) == BUDGETS
    path = RESULT if usual else RESULT.with_stem(f"{RESULT.stem}_{len(chosen.budgets)}_members")
    path.write_text(json.dumps(record(rows, chosen.seeds, bench), indent=1) + "\n")


class Bench:
    """The parent and its arms, each done once."""

    def __init__(self, work: Path, steps: int, options: dict[str, Any], budgets: Sequence[str] = BUDGETS):
        self.work, self.steps, self.options, self.budgets = work, steps, options, budgets
        work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = self._tokenizer()
        self.parent = self._parent()

    def rows(self, seed: int, controls: list[str]) -> list[dict[str, Any]]:
        """All arms of one seed."""
        parent = {
            "arm": "parent",
            "seed": seed,
            "member": "1x",
            "loss": self.kept("parent", lambda: self.loss(self.parent)),
        }
        found = self.kept(f"elastic-{seed}", lambda: self.elastic(seed))
        rows = [parent, *found]
        for row in found:
            if row["member"] != "1x":
                for part in PARTS:
                    name = f"separate-{row['member']}-{part:g}-{seed}"
                    rows.append(self.kept(name, lambda row=row, part=part: self.separate(row, part, seed)))
        for arm in controls:
            rows += self.kept(f"{arm}-{seed}", lambda arm=arm: self.elastic(seed, arm))
        return rows

    def elastic(self, seed: int, arm: str = "elastic", **changed: Any) -> list[dict[str, Any]]:
        """One run for all members; shapes by the router, by `search`, the same part of every axis, drawn, or given.

        changed: settings of the run that differ from those of the others.
        """
        parent, started = copy.deepcopy(self.parent), time.process_time()
        shapes = self.shapes(parent, seed, arm) if arm in CONTROLS else changed.pop("shapes", None)
        settings = {"steps": self.steps, "learning_rate": RATE, "seed": seed, "log_every": 20, **ROWS, **self.options}
        family = nl.elastic.train(
            parent, self.budgets, DATA, self.tokenizer, shapes=shapes, ranking=self.ranking(), **(settings | changed)
        )
        seconds = time.process_time() - started
        whole = family.cost("1x").params
        return [
            {
                "arm": arm,
                "seed": seed,
                "member": name,
                "loss": self.loss(family[name]),
                "tokens": self.steps * TOKENS,
                "seconds": seconds,
                "params": family.cost(name).params / whole,
                "shape": family.entry(name).shape.to_dict(),
            }
            for name in family
        ]

    def separate(self, row: dict[str, Any], part: float, seed: int) -> dict[str, Any]:
        """Prune to a member's shape and distill it alone on a part of the tokens."""
        child, started = nl.prune(self.parent, self.ranking(), Shape(**row["shape"])), time.process_time()
        zero_shot, steps = self.loss(child), round(self.steps * part)
        nl.distill(
            child, self.parent, DATA, self.tokenizer, steps=steps, learning_rate=RATE, seed=seed, log_every=20, **ROWS
        )
        seconds = time.process_time() - started
        loss = self.loss(child)
        return {
            **{key: row[key] for key in ("seed", "member", "params", "shape")},
            "arm": "separate",
            "loss": loss,
            "zero_shot": zero_shot,
            "tokens": steps * TOKENS,
            "seconds": seconds,
        }

    def shapes(self, parent: PreTrainedModel, seed: int, arm: str) -> dict[str, Shape]:
        """Shapes that meet the budgets and that no router has learned."""
        anatomy = nl.Anatomy.of(parent)
        plan = make_plan(anatomy, importance(anatomy, self.ranking()), self.budgets, ElasticSettings())
        make = {"uniform": uniform, "random": partial(random, seed=seed), "searched": partial(self.searched, seed=seed)}
        return {target.name: make[arm](plan.space, target) for target in plan.targets}

    def searched(self, space: Space, target: Target, seed: int) -> Shape:
        """What `search` takes, on as much text as members are settled on, and grown from its grid onto the budget."""
        text = calibration(self.parent, self.tokenizer, DATA, tokens=2048, context=128, seed=seed, generated=0.0)
        reached = reachable(Pricing(space.anatomy, 4096, 1, self.ranking()), Budget.parse(target.name))
        found = space.sizes_of(pick(self.parent, self.ranking(), reached, list(text))[0].shape)
        wish = {f: -NEAR * (k.sizes - found[f][:, None]).abs() / k.sizes.amax() for f, k in space.knobs.items()}
        return space.shape(harden(space, target, wish))

    def ranking(self) -> nl.Ranking:
        path = self.work / "ranking.safetensors"
        if not path.exists():
            text = calibration(self.parent, self.tokenizer, DATA, tokens=4096, context=128, generated=0.0)
            nl.rank(self.parent, text, layers="kl").save(path)
        return nl.Ranking.load(path)

    def loss(self, model: PreTrainedModel) -> float:
        return perplexity(model, self.tokenizer, DATA, context=128, tokens=16384).loss

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What was measured under that name, or is now; rows say which commit they are of."""
        path = self.work / f"{name}.json"
        if not path.exists():
            found = make()
            for row in found if isinstance(found, list) else [found]:
                if isinstance(row, dict):
                    row["commit"] = commit()
            path.write_text(json.dumps(found, indent=1))
        return json.loads(path.read_text())

    def _tokenizer(self) -> Any:
        path = self.work / "tokenizer"
        if not path.exists():
            train_tokenizer(DATA, FIELDS["vocab_size"]).save_pretrained(path)
        return load_tokenizer(path)

    def _parent(self) -> PreTrainedModel:
        path = self.work / "parent"
        if not path.exists():
            model = build(architecture_config("dense-3m", FIELDS), self.tokenizer)
            pretrain(model, DATA, self.tokenizer, steps=PARENT_STEPS, learning_rate=3e-3, log_every=50, **ROWS)
            hub.save(model, path, self.tokenizer)
        return hub.load(path)[0]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("arm", "seed", "member", "params", "tokens", "zero-shot", "loss", "seconds", title="one run or many")
    for row in rows:
        cells = (row["arm"], row["seed"], row["member"], row.get("params"), row.get("tokens"), row.get("zero_shot"))
        table.add_row(*map(_cell, (*cells, row["loss"], row.get("seconds"))))
    Console().print(table)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def record(rows: list[dict[str, Any]], seeds: list[int], bench: Bench) -> dict[str, Any]:
    weights = " ".join(f"{weight:g}" for weight in bench.options["weights"])
    return {
        "command": f"python -m benchmarks.elastic.one_run --seeds {' '.join(map(str, seeds))} --steps {bench.steps} "
        f"--routing {bench.options['routing']} --budgets {' '.join(bench.budgets)} --weights {weights}",
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "seeds": seeds,
        "rows": rows,
        "claims": claims(rows, seeds, bench),
    }


def claims(rows: list[dict[str, Any]], seeds: list[int], bench: Bench) -> dict[str, Any]:
    gaps, ratios, count = [], [], len(bench.budgets)
    for seed in seeds:
        here = [row for row in rows if row["seed"] == seed]
        elastic = {row["member"]: row["loss"] for row in here if row["arm"] == "elastic"}
        apart = {(r["member"], r["tokens"]): r["loss"] for r in here if r["arm"] == "separate"}
        whole = bench.steps * TOKENS
        gaps += [elastic[member] / apart[member, whole] - 1 for member in bench.budgets]
        needed = [
            _tokens_for(elastic[member], {t: loss for (name, t), loss in apart.items() if name == member})
            for member in bench.budgets
        ]
        ratios.append(sum(needed) / whole)
    return {
        "member_loss_gap": claim(gaps, seeds, None, "relative", (
            "held-out loss of a member over that of the same shape, pruned and distilled alone on the same tokens, - 1"
        )),
        "tokens_vs_separate_runs": claim(ratios, seeds, 7, "x fewer", (
            f"tokens that separate runs need for the losses of the {count} reduced members, over those of the one run; "
            f"from runs on 1/4, 1/2 and all of its tokens, interpolated in log tokens, at most all, so {count} is the "
            "most there can be; the paper counts search too"
        )),
    }  # fmt: skip


def _tokens_for(loss: float, runs: dict[int, float]) -> float:
    """Tokens at which separate runs reach a loss, from some of them; no more than the longest had."""
    points = sorted(runs.items())
    pairs = list(itertools.pairwise(points))
    (few, high), (many, low) = next((pair for pair in pairs if loss > pair[1][1]), pairs[-1])
    if loss <= low or high <= low:
        return float(points[-1][0])
    return float(min(many, few * (many / few) ** ((high - loss) / (high - low))))


def claim(values: list[float], seeds: list[int], paper: float | None, unit: str, how: str) -> dict[str, Any]:
    mean = sum(values) / len(values)
    return {
        "value": mean,
        "spread": [min(values), max(values)],
        "seeds": seeds,
        "paper": paper,
        "unit": unit,
        "how": how,
    }


if __name__ == "__main__":
    main()
