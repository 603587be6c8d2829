"""`nestling elastic train`, `extract` and `inspect`: a family from one training run, and what is in it.

Training keeps its stages in one run folder (ranking.safetensors, checkpoints, family/, summary.json), so an
interrupted job goes on where it was. Extraction needs the family alone: no data, seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from nestling import evaluate, hub, processes
from nestling.anatomy import Anatomy
from nestling.budget import Budget
from nestling.data import batches
from nestling.elastic import WHOLE, ElasticSettings, Family, check, train
from nestling.elastic.controls import random, uniform
from nestling.elastic.timed import Latency
from nestling.elastic.train import importance, make_plan
from nestling.errors import TargetError
from nestling.ranking import Ranking, rank
from nestling.recipes.progress import Stages, bar, console, tries
from nestling.recipes.run import Run, check_folder
from nestling.recipes.settings import CalibrationSettings, ModelSettings, listed
from nestling.recipes.source import Source, in_batches
from nestling.report import write_report
from nestling.report.human import count, size
from nestling.report.members import in_text
from nestling.search import Pricing, pick, reachable
from nestling.search.latency import table
from nestling.search.parts import Work
from nestling.search.timing import PROBES
from nestling.shape import Shape
from nestling.surgery import prune
from nestling.train import documented, split_batch


@documented
@dataclass
class ElasticTrain(CalibrationSettings):
    """Settings of `elastic train`.

    Args:
        model: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        to: Budgets, one word each (0.75x 0.5x), with + between several limits of one (params=0.6x+kv_bytes=0.5x).
        out: Run folder; everything the job makes goes there.
        layers: Importance of layers: kl, block_influence, perplexity or output_error.
        train: Settings of the training.
        evaluation_tokens: Tokens of the validation part on which members are measured; 0 for none.
        compare: Random shapes that the learned ones are compared with before any training, beside uniform scaling and
            what `search` finds; 0 for none of them.
        latency_context: Tokens in the cache before the one whose latency is measured, for budgets of it.
        teacher_cache: Folder in which the likeliest tokens of MODEL (train.top_k of them) are kept, for any number of
            families and students of it; computed if they are not there.
        overwrite: Start anew even if the run folder holds a run.
    """

    model: str
    to: list[str] = field(default_factory=lambda: ["0.75x", "0.5x"])
    out: str = "runs/elastic"
    layers: str = "kl"
    train: ElasticSettings = field(default_factory=ElasticSettings)
    evaluation_tokens: int = 8192
    compare: int = 2
    latency_context: int = 512
    teacher_cache: str | None = None
    overwrite: bool = False


def elastic_train(settings: ElasticTrain) -> dict[str, Any]:
    """Train the family, or go on with it; returns its summary.

    Raises a `NestlingError` for anything wrong with the settings before any long work starts.
    """
    names = budgets(settings.to)
    source = Source.open(replace(settings, device=settings.device or "cpu") if settings.train.fsdp else settings)
    latency = _latency(source, names, settings)
    check(Anatomy.of(source.model), names, settings.train, latency, settings.teacher_cache)
    batches(settings.data, source.tokenizer, context=settings.train.context, tokens=settings.train.context)
    split_batch(settings.train, settings.train.context, source.model.device)
    run = Run("elastic train", settings, settings.out, settings.overwrite)
    stages = Stages(4)
    with stages("rank every axis on calibration text"):
        ranking = run.stage("ranking.safetensors", lambda: _rank(source, settings), _save, Ranking.load)
    with stages(f"train {len(names)} member{'s' if len(names) > 1 else ''} and the parent together"):
        if not run.has("family"):
            options: dict[str, Any] = {"ranking": ranking, "run_dir": run.folder, "latency": latency}
            options["cache"] = settings.teacher_cache
            family = train(source.model, names, settings.data, source.tokenizer, settings.train, **options)
            processes.first(lambda: str(family.save(run.path("family"))))
        family = Family.load(run.path("family"), device=source.model.device)
    with stages("measure members, and compare their shapes"):
        losses = run.values("losses.json", lambda: _losses(family, settings))
        shapes = run.values("shapes.json", lambda: _compared(family, ranking, settings, latency))
    with stages("write the report"):
        summary = run.values("summary.json", lambda: _summary(family, settings, losses, shapes))
        report = processes.first(lambda: str(write_report(run.folder)))
    show(family, losses)
    console.print(f"report: {report}\nfamily: {run.path('family')}")
    return summary


@documented
@dataclass
class ElasticExtract(ModelSettings):
    """Settings of `elastic extract`.

    Args:
        family: Folder of a family, or the run folder that made it.
        member: Budget of the member; one that was not trained gets a shape between its neighbours'.
        out: Folder to write the checkpoint to.
        overwrite: Replace what is there.
    """

    family: str
    member: str
    out: str
    overwrite: bool = False


def elastic_extract(settings: ElasticExtract) -> dict[str, Any]:
    """Write a member as a checkpoint of its own; returns where it is and what it is."""
    check_folder(settings)
    family = _load(settings, settings.family)
    entry, child = family.entry(settings.member), family.extract(settings.member)
    processes.first(lambda: str(hub.save(child, settings.out, family.tokenizer, overwrite=settings.overwrite)))
    note = "" if entry.trained else " (interpolated: no member was trained for this budget)"
    console.print(f"{count(child.num_parameters())} parameters{note}\nmodel: {settings.out}")
    return {"model": settings.out, "trained": entry.trained, "shape": entry.shape.to_dict()}


@documented
@dataclass
class ElasticInspect(ModelSettings):
    """Settings of `elastic inspect`.

    Args:
        family: Folder of a family, or the run folder that made it.
        context: Tokens at which KV cache and FLOPs are counted.
    """

    family: str
    context: int = 4096


def elastic_inspect(settings: ElasticInspect) -> dict[str, Any]:
    """Show a family's members: costs, and what each layer keeps; returns the same as values."""
    family = _load(settings, settings.family)
    show(family, {}, settings.context)
    console.print(in_text(drawn(family)))
    return {
        name: {"shape": family.entry(name).shape.to_dict(), **family.cost(name, settings.context).to_dict()}
        for name in family
    }


def budgets(words: list[str]) -> list[str]:
    """What `--to` says, one budget for each word. Raises `TargetError` when there is none."""
    parts = [part for word in words for part in listed(word)]
    if not parts:
        raise TargetError("no budgets were given: write for instance --to 0.75x 0.5x")
    return [part.replace("+", ",") for part in parts]


def show(family: Family, losses: Mapping[str, float], context: int = 4096) -> None:
    """A line for each member."""
    table = Table(box=None, pad_edge=False)
    table.add_column("member", overflow="fold")
    named = ("params", "of parent", "off budget", "weights", f"KV at {context}", *(["loss"] if losses else []))
    for column in named:
        table.add_column(column, justify="right")
    whole, errors = family.cost(WHOLE).params, family.info.get("errors", {})
    for name in family:
        cost = family.cost(name, context)
        off = f"{errors[name]:+.2%}" if name in errors else ""
        row = [count(cost.params), f"{cost.params / whole:.3f}", off, size(cost.weight_bytes), size(cost.kv_bytes)]
        table.add_row(name, *row, *([f"{losses[name]:.4f}"] if losses else []))
    console.print(table)


def drawn(family: Family) -> dict[str, Any]:
    """For each axis what every member keeps of it in every layer of the parent; None where the layer is gone."""
    anatomy, result = family.anatomy, {}
    for name, axis in anatomy.axes.items():
        layers = [layer for layer in range(anatomy.num_layers) if axis.scope == "layer" and anatomy.has(axis, layer)]
        if axis.scope == "model":
            layers = [0]
        result[name] = {
            "layers": layers if axis.scope == "layer" else [],
            "full": [anatomy.value(axis, layer) for layer in layers],
            "kept": {member: [_kept(family, member, name, layer) for layer in layers] for member in family},
        }
    depth = {member: [len(family.selection(member).form.layers)] for member in family}
    result[anatomy.depth_field] = {"layers": [], "full": [anatomy.num_layers], "kept": depth}
    return result


def _kept(family: Family, member: str, name: str, layer: int) -> int | None:
    form = family.selection(member).form
    if family.anatomy.axis(name).scope == "model":
        return form.values[name][0]
    return form.values[name][form.layers.index(layer)] if layer in form.layers else None


def _load(settings: ModelSettings, folder: str) -> Family:
    options = {"dtype": settings.dtype, "device": settings.device, "trust_remote_code": settings.trust_remote_code}
    return Family.load(folder, **options)


def _rank(source: Source, settings: ElasticTrain) -> Ranking:
    text = source.calibration(settings, settings.calibration_tokens)
    with bar("ranking, tokens", text.numel()) as advance:
        return rank(source.model, in_batches(text), layers=settings.layers, progress=advance)


def _save(ranking: Ranking, path: Path) -> None:
    ranking.save(path)


def _losses(family: Family, settings: ElasticTrain) -> dict[str, float]:
    if not settings.evaluation_tokens:
        return {}
    return {name: _loss(family[name], family, settings) for name in family}


def _loss(model: PreTrainedModel, family: Family, settings: ElasticTrain) -> float:
    return evaluate.perplexity(
        model, family.tokenizer, settings.data, context=settings.context, tokens=settings.evaluation_tokens
    ).loss


def _latency(source: Source, names: list[str], settings: ElasticTrain) -> Latency | None:
    """Milliseconds of a form on this machine, measured now or before, if any budget limits them."""
    if not any(Budget.parse(name).timed for name in names):
        return None
    anatomy, model = Anatomy.of(source.model), source.model
    with bar("timing blocks, models", PROBES) as advance:
        times = table(anatomy, model.device, model.dtype, Work(1, settings.latency_context), advance)
    return partial(times.milliseconds, anatomy)


def _searched(
    source: Source, ranking: Ranking, name: str, settings: ElasticTrain, latency: Latency | None
) -> list[Shape]:
    """The shape that `search` takes for a budget, on a quarter of the calibration text; none if its grid has none."""
    pricing = Pricing(Anatomy.of(source.model), settings.train.cost_context, 1, ranking, latency)
    text = in_batches(source.calibration(replace(settings, generated=0.0), -(-settings.calibration_tokens // 4)))
    try:
        space = reachable(pricing, Budget.parse(name), tuple(listed(settings.train.axes)))
        found = pick(source.model, ranking, space, text, progress=tries())
    except TargetError:  # grids of a search are coarser, and end at half of each size
        return []
    return [found[0].shape]


def _compared(family: Family, ranking: Ranking, settings: ElasticTrain, latency: Latency | None) -> dict[str, Any]:
    """Losses of the original model cut to the learned shapes and to others of the same budget, without training."""
    if not settings.compare or not settings.evaluation_tokens:
        return {}
    source = Source.open(settings)
    model, anatomy = source.model, Anatomy.of(source.model)
    plan = make_plan(anatomy, importance(anatomy, ranking), list(family.entries), settings.train, latency)
    result = {}
    for target in plan.targets:
        arms: dict[str, list[Shape]] = {
            "learned": [family.entry(target.name).shape],
            "searched": _searched(source, ranking, target.name, settings, latency),
            "uniform": [uniform(plan.space, target)],
            "random": [random(plan.space, target, settings.seed + i) for i in range(settings.compare)],
        }
        result[target.name] = {
            arm: [
                {"shape": shape.to_dict(), "loss": _loss(prune(model, ranking, shape), family, settings)}
                for shape in shapes
            ]
            for arm, shapes in arms.items()
        }
    return result


def _summary(
    family: Family, settings: ElasticTrain, losses: Mapping[str, float], shapes: Mapping[str, Any]
) -> dict[str, Any]:
    whole = family.cost(WHOLE, settings.train.cost_context)
    members = {}
    for name in family:
        cost = family.cost(name, settings.train.cost_context)
        members[name] = {
            "shape": family.entry(name).shape.to_dict(),
            "of_parent": cost.params / whole.params,
            "budget_error": family.info["errors"].get(name),
            "loss": losses.get(name),
            **cost.to_dict(),
        }
    title = f"{str(settings.model).rstrip('/').rpartition('/')[2]}, a family of {len(family)}"
    return {"title": title, "members": members, "drawn": drawn(family), "compared": dict(shapes)}
