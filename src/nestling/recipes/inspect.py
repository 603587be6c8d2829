"""`nestling inspect`: what a model is made of, and what it, or a shape of it, costs. No weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table
from transformers import PreTrainedConfig

from nestling import hub
from nestling.anatomy import Anatomy, Axis
from nestling.cost import Cost, cost, cost_by_kind
from nestling.recipes.progress import console
from nestling.recipes.settings import at_least
from nestling.report.human import count, size
from nestling.shape import Shape, fit
from nestling.surgery.kernels import kernel_word


@dataclass
class InspectSettings:
    """Settings of `inspect`.

    Args:
        model: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        shape: Also show what this shape would cost (FIELD=NUMBER,... or a JSON file).
        context: Tokens per sequence at which KV cache and FLOPs are counted.
        batch: Sequences.
        trust_remote_code: Let the checkpoint run code of its own.
    """

    model: str
    shape: str | None = None
    context: int = 4096
    batch: int = 1
    trust_remote_code: bool = False


def inspect(settings: InspectSettings) -> dict[str, Any]:
    """Print the axes and costs of a model; returns them."""
    for name in ("context", "batch"):
        at_least(name, getattr(settings, name), 1)
    config = hub.config(settings.model, trust_remote_code=settings.trust_remote_code)
    anatomy = Anatomy.of(config)
    whole = cost(anatomy, None, settings.context, settings.batch)
    shape = Shape.parse(settings.shape) if settings.shape else None
    cut = cost(anatomy, shape, settings.context, settings.batch) if shape else None
    console.print(_axes(anatomy, config))
    console.print("")
    console.print(_costs(whole, cut))
    if shape and (word := kernel_word(anatomy, shape)):
        console.print(word)
    kinds = cost_by_kind(anatomy, fit(anatomy, {}), settings.context, settings.batch)
    if len(kinds) > 1:
        console.print("")
        console.print(_kinds(kinds))
    return {
        "architecture": anatomy.architecture.model_type,
        "axes": {field: _sizes(anatomy, field) for field in anatomy.fields},
        "cost": whole.to_dict(),
        "kinds": {kind: {"layers": layers, **price.to_dict()} for kind, (layers, price) in kinds.items()},
        **({"shape": shape.to_dict(), "shape_cost": cut.to_dict()} if shape and cut else {}),
    }


def _sizes(anatomy: Anatomy, field: str) -> int | list[int]:
    if field == anatomy.depth_field:
        return anatomy.num_layers
    axis = anatomy.axis(field)
    sizes = [anatomy.value(axis, layer) for layer in range(anatomy.num_layers)]
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _axes(anatomy: Anatomy, config: PreTrainedConfig) -> Table:
    table = Table(title=f"{config.model_type}: what can shrink", title_justify="left", box=None, pad_edge=False)
    table.add_column("axis")
    table.add_column("size", justify="right")
    table.add_column("where")
    for field, axis in anatomy.axes.items():
        where = "whole model" if axis.scope == "model" else "each layer"
        groups = f", inside {' '.join(_outer(anatomy, axis))}" if axis.within else ""
        table.add_row(field, str(_sizes(anatomy, field)), where + groups)
    table.add_row(anatomy.depth_field, str(anatomy.num_layers), "whole layers")
    return table


def _outer(anatomy: Anatomy, axis: Axis) -> list[str]:
    """What an axis lies within: fields of other axes, or the letters of what cannot shrink."""
    fields = {other.letter: other.field for other in anatomy.axes.values()}
    return [fields.get(letter, letter) for letter in axis.within]


def _kinds(kinds: dict[str, tuple[int, Cost]]) -> Table:
    """What layers of each kind are and cost together."""
    table = Table(title="by kind of layer", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for column in ("layers", "params", "kv_bytes", "state_bytes"):
        table.add_column(column, justify="right")
    for kind, (layers, price) in kinds.items():
        table.add_row(kind, str(layers), count(price.params), size(price.kv_bytes), size(price.state_bytes))
    return table


def _costs(whole: Cost, cut: Cost | None) -> Table:
    table = Table(
        title=f"cost at {whole.context} tokens x {whole.batch}", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("")
    table.add_column("model", justify="right")
    if cut:
        table.add_column("shape", justify="right")
    for name in ("params", "active_params", "weight_bytes", "kv_bytes", "state_bytes", "flops_per_token"):
        figures = [getattr(value, name) for value in (whole, cut) if value]
        if not any(figures) or (name == "active_params" and figures[0] == whole.params):
            continue
        show = size if name.endswith("bytes") else count
        table.add_row(name, *map(show, figures))
    return table
