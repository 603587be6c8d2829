"""The summary of a finished job: everything the report and the model card show, as plain values."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import nestling
from nestling import processes
from nestling.anatomy import Anatomy
from nestling.cost import cost
from nestling.ranking import Ranking
from nestling.recipes.child import Child
from nestling.report import write_model_card, write_report
from nestling.shape import Form
from nestling.surgery import choose


def heading(settings: Any, name: str, parent: PreTrainedModel) -> dict[str, Any]:
    """What was run, when, where and with what: the part that every job's summary has. name: of the target."""
    model = str(settings.model).rstrip("/").rpartition("/")[2]
    return origin(f"{model} to {name}", settings.seed, parent) | {"budget": name}


def origin(title: str, seed: int, model: PreTrainedModel) -> dict[str, Any]:
    """The same for a job without a target."""
    return {
        "title": title,
        "command": shlex.join(["nestling", *sys.argv[1:]]) if sys.argv[1:] else "",
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "versions": {
            "nestling": nestling.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{platform.machine()}, {_threads()}, {model.device.type}",
    }


def reported(child: Child, results: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A child's summary, kept in its run, and the file of the report that is made of it; a model card is written too.

    results: what `Child.evaluate` returned. Of several processes the first does it, while the others wait.
    """

    def make() -> tuple[dict[str, Any], str]:
        summary = child.run.values("summary.json", lambda: summarize(child, results))
        write_model_card(child.run.folder)
        return summary, str(write_report(child.run.folder))

    summary, report = processes.first(make)
    return summary, report


def summarize(made: Child, results: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, what was cut, and what came of it; ready for JSON.

    Figures compare with the parent; layers and axes are those of the model that the child was cut from.
    """
    settings, parent, child = made.parent.settings, made.parent.model, made.model
    anatomy, ranking, shape = Anatomy.of(made.origin.model), made.origin.ranking, made.shape
    form = choose(anatomy, ranking, shape).form
    scores, speed = results["scores"], results["speed"]
    name = str(settings.model).rstrip("/").rpartition("/")[2]
    return heading(settings, made.name, parent) | {
        "needs_nestling": child.config.model_type.startswith("nestling_"),
        "data": {
            "train": settings.data,
            "calibration_tokens": settings.calibration_tokens,
            "distill_tokens": settings.distill.sized().all_tokens(),
            "validation": settings.data,
        },
        "parent": {
            "name": str(settings.model),
            "architecture": anatomy.architecture.model_type,
            "config": parent.config.to_diff_dict(),
            "cost": cost(parent, context=settings.cost_context, batch=settings.cost_batch).to_dict(),
            "evaluation": scores["parent"],
            "speed": speed["parent"],
        },
        "child": {
            "name": f"{name}-{made.name}",
            "config": child.config.to_diff_dict(),
            "cost": cost(child, context=settings.cost_context, batch=settings.cost_batch).to_dict(),
            "pruned": scores["pruned"],
            "evaluation": scores["child"],
            "speed": speed["child"],
        },
        "shape": shape.to_dict(),
        "layers": {
            "parent": anatomy.num_layers,
            "kept": list(form.layers),
            "importance": _numbers(ranking.scores.get(anatomy.depth_field)),
        },
        "axes": [_axis(anatomy, form, ranking, field) for field in anatomy.axes if field in ranking.scores],
        "candidates": made.candidates,
        "samples": results["samples"],
    }


def _axis(anatomy: Anatomy, form: Form, ranking: Ranking, field: str) -> dict[str, Any]:
    """Units before and after, and the importance of each, for one axis."""
    axis, scores = anatomy.axis(field), ranking.scores[field]
    if axis.scope == "model":
        parent: Any = anatomy.value(axis, None)
        child: Any = form.values[field][0]
    else:
        parent = [anatomy.value(axis, layer) for layer in range(anatomy.num_layers)]
        place = {layer: position for position, layer in enumerate(form.layers)}
        child = [form.values[field][place[layer]] if layer in place else 0 for layer in range(anatomy.num_layers)]
    importance = _numbers(scores) if isinstance(scores, Tensor) else [_numbers(layer) for layer in scores]
    return {"field": field, "scope": axis.scope, "parent": parent, "child": child, "importance": importance}


def _numbers(scores: Any) -> list[float]:
    """Scores with as many digits as a picture needs."""
    return [float(f"{value:.4g}") for value in scores.tolist()] if scores is not None else []


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"
