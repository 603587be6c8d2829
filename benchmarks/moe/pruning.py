"""Fewer experts by each criterion: what a quarter or half of them costs, dropped or merged; and after distilling.

Parents are the fine-grained models (64 experts, 8 of a token) that `fine_grained.py` left in the work folder. Figures
are held-out loss above the parent's, before and after distillation from it. `--cost` measures instead what a criterion
costs: processor time of ranking, in forward passes over the same text, in turns.

    python -m benchmarks.moe.pruning --work runs/moe [--steps 800] [--seeds 0 1] [--distill_steps 20]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from benchmarks.moe.small import DATA, gap, held_out, options, parser, texts, tokenizer
from benchmarks.record import Record, Row, show
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling import hub
from nestling.anatomy import Anatomy
from nestling.distill import distill
from nestling.moe import loads, merge
from nestling.ranking import Ranking, rank
from nestling.surgery import prune

CRITERIA = ("reap", "random", "frequency", "gate", "contribution", "output_error")
KEPT = (48, 32)
MERGED = ("reap", "frequency")


def main() -> None:
    given = parser(__doc__, CRITERIA, 800)
    given.add_argument("--distill_steps", type=int, default=20)
    given.add_argument("--cost", action="store_true", help="measure what the criteria cost")
    chosen, record = given.parse_args(), Record("moe", "pruning")
    words = tokenizer(chosen.work)
    for seed in chosen.seeds:
        parent, _ = hub.load(chosen.work / f"small-{chosen.steps}/1x-G8-post-{seed}/model")
        calibration = texts(words)
        if chosen.cost:
            record.row({"steps": chosen.steps, "cost_of": "ranking", "seed": seed}, partial(costs, parent, calibration))
            record.save(claims(record, chosen.steps, chosen.distill_steps))
            continue
        whole = held_out(parent, words)
        for criterion, kept, how in product(chosen.arms, KEPT, ("drop", "merge")):
            if how == "drop" or criterion in MERGED:
                make = partial(made, parent, criterion, kept, how, calibration, seed)
                key = {"steps": chosen.steps, "distill_steps": chosen.distill_steps, "kept": kept}
                key |= {"criterion": criterion, "how": how, "seed": seed}
                record.row(key, partial(damages, parent, make, whole, words, options(chosen.distill_steps, seed, 1e-3)))
                record.save(claims(record, chosen.steps, chosen.distill_steps))
    show(record.rows, ("steps", "distill_steps", "kept", "criterion", "how"), ("damage", "damage_distilled"))


def damages(
    parent: PreTrainedModel,
    make: Callable[[], PreTrainedModel],
    whole: float,
    words: PreTrainedTokenizerBase,
    learn: dict[str, Any],
) -> Row:
    """Held-out loss of the child above the parent's (`whole`), before and after distillation."""
    child = make()
    before = held_out(child, words)
    distill(child, parent, DATA, words, **learn)
    return {"damage": round(before - whole, 5), "damage_distilled": round(held_out(child, words) - whole, 5)}


def costs(parent: PreTrainedModel, calibration: list, rounds: int = 5) -> Row:
    """Median processor time of ranking by each criterion over that of a forward pass."""
    jobs: dict[str, Callable[[], Any]] = {"forward": lambda: loads(parent, calibration)}
    jobs |= {name: partial(ranked, parent, name, calibration, 0) for name in CRITERIA if name != "random"}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for name, job in [*jobs.items()] * rounds:
        started = time.process_time()
        job()
        seconds[name].append(time.process_time() - started)
    one = median(seconds.pop("forward"))
    return {f"{name}_passes": round(median(times) / one, 2) for name, times in seconds.items()}


def ranked(parent: PreTrainedModel, criterion: str, calibration: list, seed: int) -> Ranking:
    if criterion != "random":
        return rank(parent, calibration, metric={"num_experts": criterion})
    generator = torch.Generator().manual_seed(seed)
    return Ranking(
        {"num_experts": tuple(torch.rand(64, generator=generator) for _ in range(Anatomy.of(parent).num_layers))}
    )


def made(parent: PreTrainedModel, criterion: str, kept: int, how: str, calibration: list, seed: int) -> PreTrainedModel:
    """The parent with `kept` experts in each layer, the others dropped or merged into them."""
    ranking = ranked(parent, criterion, calibration, seed)
    if how == "merge":
        return merge(parent, ranking, kept, loads(parent, calibration))
    return prune(parent, Ranking({"num_experts": ranking.scores["num_experts"]}), {"num_experts": kept})


def claims(record: Record, steps: int, distill_steps: int) -> dict[str, Row]:
    """How much better REAP is than chance, and the default than REAP, before and after distillation."""
    found = {}
    for kept, figure in product(KEPT, ("damage", "damage_distilled")):
        after = "distillation" if figure == "damage_distilled" else "no distillation"
        for worse, better in (("random", "reap"), ("reap", "contribution")):
            keys = (
                {"steps": steps, "distill_steps": distill_steps, "kept": kept, "criterion": name, "how": "drop"}
                for name in (worse, better)
            )
            how = f"held-out loss of {worse} minus {better}, {kept} of 64 experts kept, {after}"
            if one := gap(record, *keys, how, figure):
                found[f"{better}_vs_{worse}_loss_gap_{kept}of64" + figure.removeprefix("damage")] = one
    return found


if __name__ == "__main__":
    main()
