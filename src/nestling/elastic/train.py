"""`elastic.train`: from a model, budgets and data to a family.

The model is ranked and sorted once, a router finds the members' shapes while everything learns, then the members
learn on slices, and maybe once more on long sequences. All of it is `nestling.train.fit` with an `ElasticLearner`.
Paper: Nemotron Elastic, arXiv 2511.16664.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.anatomy import Anatomy
from nestling.data import calibration
from nestling.elastic.bill import Bill
from nestling.elastic.family import Entry, Family, sorted_order
from nestling.elastic.harden import check as reached
from nestling.elastic.harden import harden
from nestling.elastic.learner import ElasticLearner, Plan
from nestling.elastic.prior import probed_once
from nestling.elastic.settings import ElasticSettings, listed
from nestling.elastic.space import FLOORS, Space
from nestling.elastic.target import Target
from nestling.elastic.timed import Latency
from nestling.errors import NestlingError, TargetError, UnsupportedArchitecture
from nestling.ranking import Ranking, rank
from nestling.shape import Shape
from nestling.surgery import reorder
from nestling.train import fit
from nestling.train.kept import Cache, kept_teacher

CALIBRATION_TOKENS = 8192


def train(
    model: PreTrainedModel,
    budgets: Sequence[str] = ("0.75x", "0.5x"),
    data: Any = "builtin:stdlib",
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: ElasticSettings | None = None,
    *,
    ranking: Ranking | None = None,
    shapes: Mapping[str, Shape] | None = None,
    latency: Latency | None = None,
    run_dir: str | Path | None = None,
    resume: bool = True,
    cache: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
    **overrides: Any,
) -> Family:
    """Train a family of nested members; `model` becomes its parent, in place.

    data: text by name (needs `tokenizer`), a `datasets.Dataset` with a column `input_ids`, or an iterable of batches
        `{"input_ids": [batch, seq]}`.
    ranking: of the model's units; made on the data unless given. shapes: the members' shapes by budget, to train
        without a router. latency: milliseconds of a form, for budgets of it; see `nestling.search.latency.table`.
    run_dir: for metrics and checkpoints. cache: folder in which the likeliest tokens (`top_k` of them) of the model as
        it is now are kept, computed if they are not there; no copy of it is held as teacher then.
    progress: told the tokens ranked.
    overrides: single settings, such as `per_layer="intermediate_size"`.
    Raises `TargetError`, before any long work, for a budget that no member can keep within 1 %, and what `fit` raises.
    """
    settings = dataclasses.replace(settings or ElasticSettings(), **overrides)
    anatomy = Anatomy.of(model)
    check(anatomy, budgets, settings, latency, cache)
    if not isinstance(data, (str, Path, datasets.Dataset)):
        data = data if isinstance(data, Sequence) else list(data)
    if ranking is None:
        text = _calibration(model, data, tokenizer, settings, CALIBRATION_TOKENS)
        ranking = rank(model, text, layers="kl", progress=progress)
    teacher = copy.deepcopy(model) if settings.teacher == "frozen" and cache is None else None
    rows = data if cache is None else _kept(model, data, tokenizer, settings, cache)
    order = importance(anatomy, reorder(model, ranking))
    plan = make_plan(anatomy, order, budgets, settings, latency)
    fixed = None if shapes is None else [plan.space.sizes_of(shapes[budget]) for budget in budgets]
    probes = _calibration(model, data, tokenizer, settings, 0 if shapes else settings.probe_tokens, generated=0.0)
    known = probed_once(model, plan.space, probes, settings, Path(run_dir) if run_dir else None, resume)
    losses = [known] * len(budgets) if probes else None
    learner = ElasticLearner(model, teacher, plan, settings, fixed, losses, probes)
    named = data if isinstance(data, (str, Path)) else None
    fit(learner, rows, tokenizer, settings, run_dir and Path(run_dir), resume, text=named)
    if not learner.settled:
        learner.settle()
    if settings.long_context:
        learner = _second_stage(learner, teacher, data, tokenizer, settings, run_dir, resume)
    return family_of(learner, settings, tokenizer)


def check(
    anatomy: Anatomy,
    budgets: Sequence[str],
    settings: ElasticSettings,
    latency: Latency | None = None,
    cache: str | Path | None = None,
) -> None:
    """Raises `TargetError` or `ShapeError` for budgets, axes or weights that cannot be had, before any work.

    `UnsupportedArchitecture` where layers share tensors, `NestlingError` for what a teacher cache cannot serve.
    """
    if cache is not None and (settings.teacher != "frozen" or settings.long_context or not settings.top_k):
        raise NestlingError(
            "a teacher cache keeps the likeliest tokens of a frozen teacher, for rows of one length: say how many with "
            "train.top_k, such as 64, leave train.teacher frozen, and have no second stage"
        )
    if not budgets or len(set(budgets)) < len(budgets):
        raise TargetError(f"the budgets {', '.join(budgets) or '(none)'} are not a list: give each budget once")
    if anatomy.sharing.sets:
        raise UnsupportedArchitecture(
            f"the layers of a {anatomy.architecture.model_type} share tensors, which members of an elastic family "
            f"cannot yet: make its models apart, with `nestling family`"
        )
    settings.shares(len(budgets))
    plan = make_plan(anatomy, range(anatomy.num_layers), budgets, settings, latency)
    logits = {field: 0 * knob.sizes for field, knob in plan.space.knobs.items()}
    for target in plan.targets:
        harden(plan.space, target, logits)


def make_plan(
    anatomy: Anatomy,
    order: Iterable[int],
    budgets: Sequence[str],
    settings: ElasticSettings,
    latency: Latency | None = None,
) -> Plan:
    """The choices and targets of a run. Raises `TargetError` for a budget that no choice keeps."""
    order = list(order)
    bill = Bill(anatomy, settings.cost_context)
    targets = tuple(Target.of(budget, bill, latency) for budget in budgets)
    for floor in range(len(FLOORS)):
        space = Space(anatomy, order, listed(settings.per_layer), floor, listed(settings.axes))
        if all(target.of_sizes(space, space.smallest()) < 0.9 for target in targets):
            break
    for target in targets:
        reached(space, target)
    return Plan(space, sorted_order(anatomy, order), tuple(target.on(space) for target in targets))


def importance(anatomy: Anatomy, ranking: Ranking) -> list[int]:
    """Layers, most important first, as `prune` keeps them."""
    return anatomy.by_importance(ranking.order(anatomy.depth_field).tolist())


def family_of(learner: ElasticLearner, settings: ElasticSettings, tokenizer: Any = None) -> Family:
    """The family that a learner has trained."""
    space, plan = learner.plan.space, learner.plan
    entries = {target.name: Entry(space.shape(learner.chosen(i))) for i, target in enumerate(plan.targets)}
    info = {
        "cost_context": settings.cost_context,
        "errors": {t.name: t.of_sizes(space, learner.chosen(i)) - 1 for i, t in enumerate(plan.targets)},
    }
    parent = learner.student.requires_grad_(False).eval()
    return Family(parent, entries, space.rank.argsort().tolist(), info, tokenizer)


def _kept(model: PreTrainedModel, data: Any, tokenizer: Any, settings: ElasticSettings, folder: str | Path) -> Cache:
    """What the model says about the rows it will be trained on."""
    vocab = model.get_output_embeddings().weight.shape[0]
    return kept_teacher(model, data, tokenizer, settings, settings.objective(), folder, vocab)


def _second_stage(
    before: ElasticLearner,
    teacher: PreTrainedModel | None,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: ElasticSettings,
    run_dir: str | Path | None,
    resume: bool,
) -> ElasticLearner:
    """Longer sequences and other weights, with the shapes that the first stage has found."""
    shapes = [before.chosen(number) for number in range(len(before.plan.targets))]
    long = settings.second()
    learner = ElasticLearner(before.student, teacher, before.plan, long, shapes)
    fit(learner, data, tokenizer, long, run_dir and Path(run_dir) / "long", resume)
    return learner


def _calibration(
    model: PreTrainedModel,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: ElasticSettings,
    tokens: int,
    **options: Any,
) -> list[dict[str, Any]]:
    """Batches of the data, about as many tokens."""
    if not tokens:
        return []
    if isinstance(data, (str, Path)):
        if tokenizer is None:
            return []
        length = min(settings.context, 256)
        return calibration(model, tokenizer, data, tokens=tokens, context=length, seed=settings.seed, **options)
    if isinstance(data, datasets.Dataset):
        rows = data.select(range(min(32, len(data)))).with_format("torch")
        batches = [{"input_ids": row["input_ids"][None]} for row in rows]
    else:
        batches = list(islice(data, 8))
    ends = accumulate(batch["input_ids"].numel() for batch in batches)
    return [batch for batch, end in zip(batches, ends, strict=True) if end - batch["input_ids"].numel() < tokens]
