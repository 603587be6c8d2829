"""What each part of elastic training is worth: short runs that differ from one in a single word.

`ARMS` is the whole experiment. Parent, data and losses are those of `one_run`; `minus` in the table is an arm's mean
loss over parent and members less that of the run it is held against, in nats, so above zero is worse. Depth is ranked
three ways for members of given shapes that lose layers. Long arms end with a second stage on longer sequences; `more
short` has as many tokens at the first length, the control that the paper lacks.

    python -m benchmarks.elastic.ablations [--work runs/elastic] [--seeds 0 1] [--arms chain heterogeneous ...]

Every arm of every seed is kept in the work folder when it is done, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from benchmarks.elastic.one_run import BUDGETS, DATA, ROWS, TOKENS, Bench, claim
from benchmarks.record import commit
from rich.console import Console
from rich.table import Table

import nestling as nl
from nestling.data import calibration

RESULT = Path(__file__).parents[1] / "results/elastic/ablations.json"
LONG = 4 * ROWS["context"]
DEPTH = {  # five and three of six layers, and neurons that meet the budgets: a router might cut no layer at all
    "0.75x": nl.Shape(num_hidden_layers=5, intermediate_size=208),
    "0.5x": nl.Shape(num_hidden_layers=3, intermediate_size=214),
}


class Arm(NamedTuple):
    """What an arm changes, the arm it is held against, and the paper's word on the pair."""

    settings: dict[str, Any]
    against: str = "plain"
    layers: str = "kl"
    tokens: float = 1.0
    paper: str = ""


ARMS = {
    "plain": Arm({}),
    "uniform weights": Arm({"weights": [1, 1, 1]}, paper="table 5: weights help the parent, cost the smallest little"),
    "paper weights": Arm({"weights": [5, 3, 2]}, paper="table 5: weights help the parent, cost the smallest little"),
    "one member a step": Arm({"members_per_step": 1}, paper="the paper draws one budget for each sample"),
    "trainable teacher": Arm({"teacher": "trainable"}, paper="no figures; a frozen teacher is what it uses"),
    "no teacher": Arm({"teacher": "none"}),
    "fewer layers": Arm({"shapes": DEPTH}),
    "fewer by output error": Arm(
        {"shapes": DEPTH}, "fewer layers", "output_error", paper="what the paper ranks layers by"
    ),
    "fewer by block influence": Arm({"shapes": DEPTH}, "fewer layers", "block_influence"),
    "heterogeneous": Arm({"per_layer": "intermediate_size"}, paper="no figures"),
    "heterogeneous heads too": Arm({"per_layer": "intermediate_size,num_key_value_heads"}, paper="no figures"),
    "no routing": Arm({"routing": 0.0}),
    "heterogeneous no routing": Arm({"per_layer": "intermediate_size", "routing": 0.0}, "heterogeneous"),
    "routing 0.1": Arm({"routing": 0.1}),
    "routing 0.3": Arm({"routing": 0.3}),
    "routing 0.5": Arm({"routing": 0.5}),
    "no probes": Arm({"probe_tokens": 0}),
    "straight through": Arm({"masks": "straight_through"}, paper="equation 50 against 51, no figures"),
    "chain": Arm({"chain": True}),
    "more short": Arm({}, tokens=2.0),
    "short, then long": Arm(
        {"long_context": LONG, "long_weights": [5, 3, 2]},
        against="more short",
        tokens=2.0,
        paper="table 4: long sequences help, the smallest most; without a control",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="runs/elastic", help="folder for what is done")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=80, help="steps of an arm, of 512 tokens each")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="which arms, all unless given")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    wanted = dict.fromkeys([*chosen.arms, *(ARMS[name].against for name in chosen.arms)])
    rows = [row for seed in chosen.seeds for name in wanted for row in rows_of(chosen, name, seed)]
    show(rows, chosen.seeds)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record(rows, chosen), indent=1) + "\n")


class Ablation(Bench):
    """The bench with the depth metric of an arm, and long text where it needs that."""

    def __init__(self, work: Path, steps: int, arm: Arm):
        super().__init__(work, steps, {"routing": 0.2, "weights": [1, 2, 2]})
        self.layers = arm.layers

    def ranking(self) -> nl.Ranking:
        path = self.work / f"ranking-{self.layers}.safetensors"
        if not path.exists():
            text = calibration(self.parent, self.tokenizer, DATA, tokens=4096, context=128, generated=0.0)
            nl.rank(self.parent, text, layers=self.layers).save(path)
        return nl.Ranking.load(path)


def rows_of(chosen: argparse.Namespace, name: str, seed: int) -> list[dict[str, Any]]:
    """The members of one arm; with a second stage, half of its tokens go there."""
    arm = ARMS[name]
    settings, steps = dict(arm.settings), round(chosen.steps * arm.tokens)
    if "long_context" in settings:
        steps //= 2
        settings["long_tokens"] = steps * TOKENS
    bench = Ablation(Path(chosen.work), steps, arm)
    key = f"ablation-{name.replace(' ', '-').replace(',', '')}-{chosen.steps}-{seed}"
    return [row | {"arm": name} for row in bench.kept(key, lambda: bench.elastic(seed, "elastic", **settings))]


def losses(rows: list[dict[str, Any]], arm: str, seed: int) -> dict[str, float]:
    return {row["member"]: row["loss"] for row in rows if row["arm"] == arm and row["seed"] == seed}


def minus(rows: list[dict[str, Any]], arm: str, seed: int) -> float:
    """Mean loss of an arm's members less that of the arm it is held against."""
    own, other = losses(rows, arm, seed), losses(rows, ARMS[arm].against, seed)
    return mean(own[name] - other[name] for name in own)


def show(rows: list[dict[str, Any]], seeds: list[int]) -> None:
    table = Table("arm", "against", "1x", *BUDGETS, "minus", "seconds", title=f"means of {len(seeds)} seeds")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        found = [losses(rows, arm, seed) for seed in seeds]
        apart = [minus(rows, arm, seed) for seed in seeds]
        spread = f"{mean(apart):+.4f} ({min(apart):+.4f} to {max(apart):+.4f})"
        seconds = mean(row["seconds"] for row in rows if row["arm"] == arm)
        cells = [f"{mean(one[member] for one in found):.4f}" for member in ("1x", *BUDGETS)]
        table.add_row(arm, ARMS[arm].against, *cells, spread, f"{seconds:.0f}")
    Console().print(table)


def record(rows: list[dict[str, Any]], chosen: argparse.Namespace) -> dict[str, Any]:
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != ARMS[arm].against]
    return {
        "command": f"python -m benchmarks.elastic.ablations --seeds {' '.join(map(str, chosen.seeds))} "
        f"--steps {chosen.steps}",
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "seeds": chosen.seeds,
        "rows": rows,
        "claims": {
            f"loss_of_{arm.replace(' ', '_').replace(',', '')}": claim(
                [minus(rows, arm, seed) for seed in chosen.seeds],
                chosen.seeds,
                None,
                "nats",
                f"mean held-out loss of parent and members less that of '{ARMS[arm].against}'; {ARMS[arm].paper}",
            )
            for arm in arms
        },
    }


if __name__ == "__main__":
    main()
