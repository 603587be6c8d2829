"""The tables of Minitron-SSM (arXiv 2504.11409) in shape: which heads, where they are scored, which axis, how deep.

A hybrid of 1 M parameters is trained on the standard library for each seed (kept in --work), cut without training, and
in part distilled for 60,000 tokens. Losses are nats per token on text that neither parent nor children have seen. Every
row is kept as soon as it is there, so a run that stops goes on after its last row.

    python -m benchmarks.hybrid.pruning --seeds 0,1 [--work DIR]
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch
from benchmarks.hybrid.common import WORK, Ground, parent, permuted
from benchmarks.record import Record, claim
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, set_seed

from nestling.anatomy import Anatomy
from nestling.budget import Budget
from nestling.cost import cost
from nestling.ranking import Ranking, nested, rank
from nestling.ranking.layers import greedy, leave_one_out
from nestling.search import Pricing, candidates, pick
from nestling.surgery import prune

HEADS, CHANNELS, STATE, FFN, HIDDEN = (
    "mamba_num_heads",
    "mamba_head_dim",
    "ssm_state_size",
    "intermediate_size",
    "hidden_size",
)
DEPTH = "num_hidden_layers"
HALF = {HEADS: 8, CHANNELS: 8, STATE: 8, FFN: 256, HIDDEN: 64, DEPTH: 4}
QUARTER = {HEADS: 12, CHANNELS: 12, STATE: 12, FFN: 384, HIDDEN: 96, DEPTH: 6}
DRAWS = 3
CANDIDATES, SHORT, LONG = 6, 15_000, 45_000
Row = dict[str, float]
Rows = Iterator[tuple[str, Callable[[], Row]]]  # a row is computed only if it is not kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--skip", default="", help="tables to leave out, with commas between")
    parser.add_argument("--work", type=Path, default=WORK)
    chosen = parser.parse_args()
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    tables = [name for name in TABLES if name not in chosen.skip.split(",")]
    found = {seed: measured(seed, chosen.work, tables) for seed in seeds}
    record = Record("hybrid", "pruning")
    record.rows = merged(found)
    record.save(claims(found), seeds=seeds)
    show(record.rows)


def measured(seed: int, work: Path, tables: list[str]) -> dict[str, dict[str, Row]]:
    """The tables for one parent; rows are kept one by one, and a table as whole when it is."""
    kept = work / f"pruning-{seed}.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    whole = found.setdefault("whole", list(found))
    if set(tables) - set(whole):
        model, tokenizer = parent(seed, work)
        set_seed(seed)
        bench = Bench(model, Ground(tokenizer, seed), seed)
        for name in tables:
            rows = found.setdefault(name, {})
            for line, make in () if name in whole else TABLES[name](bench):
                if line not in rows:
                    rows[line] = make()
                    kept.write_text(json.dumps(found, indent=1))
            whole.append(name)
            kept.write_text(json.dumps(found, indent=1))
    return {name: found[name] for name in tables}


class Bench:
    """One parent, its rankings, and the tables made with them."""

    def __init__(self, model: PreTrainedModel, ground: Ground, seed: int):
        self.model, self.ground, self.seed = model, ground, seed
        self.anatomy = Anatomy.of(model)
        self.ranking = rank(model, ground.calibration, layers="kl")

    def parent(self) -> Rows:
        yield "parent", lambda: {"loss": self.ground.loss(self.model), "params": cost(self.model).params}

    def which_heads(self) -> Rows:
        """The same scores, with heads chosen inside groups, over all groups, or at random."""
        for count in (QUARTER[HEADS], HALF[HEADS]):
            children = {
                "in groups": [self.cut({HEADS: count})],
                "across groups": [self.across(count)],
                "random, in groups": [self.cut({HEADS: count}, self.random(i)) for i in range(DRAWS)],
                "reversed, in groups": [self.cut({HEADS: count}, self.reversed())],
            }
            for name, models in children.items():
                distilled = count == HALF[HEADS] and name != "reversed, in groups"
                yield f"{name}, {count} of 16", partial(self.judged, models, distilled)

    def where(self) -> Rows:
        """Heads and channels by where their activations are read: W_x, W_z, W_O (the paper), FLAP, and ours."""
        shapes = ({HEADS: 12}, {HEADS: 8}, {HEADS: 14, CHANNELS: 14}, {HEADS: 12, CHANNELS: 12}, {CHANNELS: 12})
        for name, ranking in self.rankings():
            for shape in shapes:
                keep = shape.get(CHANNELS)
                made = partial(self.judged, [self.cut(shape, ranking(keep))])
                yield f"{name}, H {shape.get(HEADS, 16)} P {shape.get(CHANNELS, 16)}", made

    def rankings(self) -> Iterator[tuple[str, Callable[[int | None], Ranking]]]:
        for name, metric, over in (
            ("W_x", "activation@x", "l2"),
            ("W_z", "activation@z", "l2"),
            ("W_O", "activation@o", "l2"),
            ("FLAP", "flap", "sum"),
        ):
            base = self.scored({CHANNELS: metric})
            yield name, lambda keep, base=base, over=over: nested(self.anatomy, base, keep, over=over)
            if name == "W_x":
                yield (
                    "W_x, channels per head",
                    lambda keep, base=base: nested(self.anatomy, base, keep, shared=False),
                )
        yield "contribution, channels per head", lambda keep: self.ranking

    def one_axis(self) -> Rows:
        """Each axis alone, to three quarters and to half."""
        shared = nested(self.anatomy, self.ranking)
        for size in (QUARTER, HALF):
            for field, value in size.items():
                yield f"{field} {value}", partial(self.priced, {field: value}, self.ranking)
                if field == CHANNELS:
                    yield f"{field} {value}, shared by heads", partial(self.priced, {field: value}, shared)

    def flap(self) -> Rows:
        """Minitron's L2 of activations against FLAP, for neurons and for heads, before and after distillation."""
        l2 = self.scored({FFN: "activation", CHANNELS: "activation@x"})
        flap = self.scored({FFN: "flap", CHANNELS: "flap"})
        pairs = {"L2": nested(self.anatomy, l2), "FLAP": nested(self.anatomy, flap, over="sum")}
        for name, ranking in pairs.items():
            for shape in ({FFN: 256}, {HEADS: 8}):
                yield f"{name}, {next(iter(shape))} halved", partial(self.judged, [self.cut(shape, ranking)], True)

    def layers(self) -> Rows:
        """Layers by what they are ranked with, one-shot and greedy: loss without the last two and three."""
        text = self.ground.calibration[:4]
        scores = {
            "block influence": rank(self.model, text).scores[DEPTH],
            "KL": leave_one_out(self.model, text, "kl"),
            "normalized MSE": leave_one_out(self.model, text, "output_error"),
            "KL, greedy": greedy(self.model, text, "kl", 3),
            "normalized MSE, greedy": greedy(self.model, text, "output_error", 3),
        }
        for name, values in scores.items():
            for depth in (6, 5):
                ranking = Ranking(dict(self.ranking.scores) | {DEPTH: values})
                yield f"{name}, {depth} of 8", partial(self.judged, [self.cut({DEPTH: depth}, ranking)])

    def joint(self) -> Rows:
        """Shapes of about 0.7 x the parameters: the search over all axes, or one axis alone; then distilled."""
        budget = Budget.parse("0.7x")
        pricing = self.pricing()
        found = candidates(self.anatomy, budget, axes=(HEADS, FFN, HIDDEN, DEPTH), pricing=pricing)
        best = pick(self.model, self.ranking, found, self.ground.calibration[:2], finalists=3)[0].shape
        alone = {
            name: candidates(self.anatomy, budget, axes=(name,), pricing=pricing)[0][0] for name in (FFN, HIDDEN, DEPTH)
        }
        for name, shape in ({"all axes": best} | {f"{name} alone": shape for name, shape in alone.items()}).items():
            yield name, partial(self.priced, shape, self.ranking, distilled=True)

    def candidates(self) -> Rows:
        """Shapes of about 0.7 x the parameters: before training, after a shorter and after a longer distillation."""
        found = candidates(self.anatomy, Budget.parse("0.7x"), axes=(HEADS, FFN, HIDDEN, DEPTH), pricing=self.pricing())
        step = max(1, len(found) // CANDIDATES)
        for shape, _ in found[::step][:CANDIDATES]:
            yield str(dict(shape)), partial(self.trained, shape)

    # ---- children

    def cut(self, shape: dict, ranking: Ranking | None = None) -> PreTrainedModel:
        return prune(self.model, ranking or self.ranking, shape)

    def pricing(self) -> Pricing:
        """Layers differ in size, so costs depend on which stay."""
        return Pricing(self.anatomy, ranking=self.ranking)

    def judged(self, models: list[PreTrainedModel], distilled: bool = False) -> Row:
        """The mean loss of children, and that of the first after distillation."""
        row = {"loss": mean(map(self.ground.loss, models))}
        return row | ({"distilled": self.ground.distilled(models[0], self.model)} if distilled else {})

    def priced(self, shape: dict, ranking: Ranking, distilled: bool = False) -> Row:
        child = self.cut(shape, ranking)
        return self.judged([child], distilled) | {"params": child.num_parameters()}

    def trained(self, shape: dict) -> Row:
        """A candidate before training, after `SHORT` tokens of distillation, and after `LONG`."""
        child = self.cut(shape, self.ranking)
        row = {"loss": self.ground.loss(child), "params": child.num_parameters()}
        return row | {
            name: self.ground.distilled(child, self.model, tokens)
            for name, tokens in (("short", SHORT), ("distilled", LONG))
        }

    def scored(self, metrics: dict[str, str]) -> Ranking:
        return rank(self.model, self.ground.calibration, metric=metrics)

    def random(self, draw: int) -> Ranking:
        generator = torch.Generator().manual_seed(1000 * self.seed + draw)
        return self.with_heads(lambda scores: torch.rand(scores.shape, generator=generator))

    def reversed(self) -> Ranking:
        return self.with_heads(lambda scores: -scores)

    def with_heads(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Ranking:
        heads = tuple(change(layer) for layer in self.ranking.scores[HEADS])
        return Ranking(dict(self.ranking.scores) | {HEADS: heads})

    def across(self, count: int) -> PreTrainedModel:
        """The best heads of all groups together, in order of their scores, dealt out to the groups from the first."""
        moved = copy.deepcopy(self.model)
        groups = self.model.config.n_groups
        scores = []
        for layer, own in enumerate(self.ranking.scores[HEADS]):
            if len(own):
                order = own.argsort(descending=True).tolist()
                best, rest = order[:count], order[count:]
                each, left = count // groups, (len(order) - count) // groups
                heads = [h for g in range(groups) for h in best[g * each :][:each] + rest[g * left :][:left]]
                permuted(moved.model.layers[layer].mixer, heads)
                own = -(torch.arange(len(order)) % (len(order) // groups)).float()
            scores.append(own)
        return prune(moved, Ranking({HEADS: tuple(scores)}), {HEADS: count})


TABLES: dict[str, Callable[[Bench], Rows]] = {
    "parent": Bench.parent,
    "which heads": Bench.which_heads,
    "where Mamba is scored": Bench.where,
    "one axis": Bench.one_axis,
    "L2 against FLAP": Bench.flap,
    "which layers": Bench.layers,
    "all axes or one": Bench.joint,
    "rank order": Bench.candidates,
}


def merged(found: dict[int, dict]) -> list[dict]:
    """One row per line of a table: means over seeds and each seed's values."""
    rows = []
    first = next(iter(found.values()))
    for table, lines in first.items():
        for line in lines:
            seen = [tables[table][line] for tables in found.values() if line in tables[table]]
            row = {"table": table, "what": line, "seeds": len(seen)}
            for name in seen[0]:
                values = [values[name] for values in seen if name in values]
                row |= {name: round(mean(values), 4), f"{name}_seeds": [round(value, 4) for value in values]}
            rows.append(row)
    return rows


def claims(found: dict[int, dict]) -> dict[str, dict]:
    """Differences of held-out loss between two lines of a table, for the tables that were measured."""
    heads = ("which heads", "across groups, 8 of 16", "in groups, 8 of 16")
    what = "held-out loss with half the heads of every Mamba layer: dealt out across groups, minus chosen inside groups"
    one = ("one axis", "mamba_head_dim 8, shared by heads", "mamba_head_dim 8")
    joint = ("all axes or one", "num_hidden_layers alone", "all axes")
    asked = {
        "group_aware_loss_gain": (*heads, "loss", f"{what}; untrained"),
        "group_aware_loss_gain_distilled": (*heads, "distilled", f"{what}; after 60,000 tokens of distillation"),
        "channels_per_head_loss_gain": (
            *one,
            "loss",
            "half the channels: one order for all heads, minus one for each; untrained",
        ),
        "joint_vs_depth_loss_gap": (
            *joint,
            "distilled",
            "0.7 x parameters after 60,000 tokens of distillation: depth alone minus the search over all axes",
        ),
    }
    made = {}
    for name, (table, worse, better, field, how) in asked.items():
        if all(table in tables for tables in found.values()):
            gaps = [tables[table][worse][field] - tables[table][better][field] for tables in found.values()]
            made[name] = claim(gaps, list(found), how, "nats")
    if all("rank order" in tables for tables in found.values()):
        for early, what in (("loss", "before training"), ("short", f"after {SHORT:,} tokens")):
            orders = [agreement(list(tables["rank order"].values()), early) for tables in found.values()]
            how = f"Kendall's tau of {CANDIDATES} shapes of 0.7 x the parameters {what} and after {LONG:,} tokens"
            made[f"rank_order_{early}"] = claim(orders, list(found), how, "tau")
    return made


def agreement(rows: list[Row], early: str) -> float:
    """Kendall's tau between an early figure and the loss after the longer distillation: 1 for the same order."""
    pairs = [(a[early] - b[early]) * (a["distilled"] - b["distilled"]) for a, b in combinations(rows, 2)]
    return sum((pair > 0) - (pair < 0) for pair in pairs) / len(pairs)


def show(rows: list[dict]) -> None:
    table = Table("table", "what", "loss", "short", "distilled", "params", title_justify="left")
    for row in rows:
        values = (f"{row[name]:,.4g}" if name in row else "" for name in ("loss", "short", "distilled", "params"))
        table.add_row(row["table"], row["what"], *values)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
