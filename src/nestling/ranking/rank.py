"""`rank`: from a model and calibration batches to a `Ranking` of everything that can be cut.

Width units and block influence come from one sweep. Leaving layers out one by one costs passes of its own and is done
only when it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nestling.anatomy import Anatomy, Axis
from nestling.errors import NestlingError
from nestling.ranking.blocks import block_scores, blocks
from nestling.ranking.experts import removal_errors
from nestling.ranking.layers import DAMAGES, Task, greedy, leave_one_out
from nestling.ranking.metrics import Metric, find_metric
from nestling.ranking.ranking import Ranking, Scores
from nestling.ranking.sweep import Batch, Measured, sweep

LAYER_METRICS = ("block_influence", *DAMAGES)
REMOVAL = "output_error"  # of experts: each left out in turn, its tokens routed anew


def rank(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    metric: str | Mapping[str, str] | None = None,
    over_batch: str | None = None,
    over_sequence: str | None = None,
    layers: str = "block_influence",
    greedy_layers: int = 0,
    progress: Callable[[int], None] | None = None,
    layer_block: int = 0,
    task: Task | None = None,
) -> Ranking:
    """Score every axis of the model on calibration batches.

    batches: iterable of `{"input_ids": LongTensor[batch, seq], ...}`; an `attention_mask` leaves padding out.
    metric: importance of width units, `contribution`, `relative`, `activation` (Minitron's), a baseline (`magnitude`,
        `wanda`, `flap`, `taylor`, `random`, ...) or one registered with `nestling.ranking.metric`; or a mapping from
        axis to metric; what the axis declares unless given. A name such as `activation@x` reads the axis at another
        place that its architecture names (`x`, `z` of Mamba-2). For experts also `reap`, `frequency`, `gate`, and
        `output_error`, which leaves out each in turn.
    over_batch, over_sequence: aggregation `mean`, `l2` or `var`; the metric's own unless given.
    layers: `block_influence` (in the same sweep), or `perplexity`, `kl`, `output_error` when each is left out in turn.
    greedy_layers: remove this many layers one after another, scoring anew each time (not for block influence).
    progress: told the number of tokens of each batch of the sweep.
    layer_block: rank layers so that the least missed block of so many neighbours goes first (see `ranking.blocks`).
    task: a function from a model to a score that is better when higher; layers are then scored by what it loses.

    Raises `NestlingError` for an unknown metric, `DataError` when there are no batches.
    """
    check_layer_metric(layers, 0 if task else greedy_layers)
    anatomy = Anatomy.of(model)
    check_greedy(greedy_layers, anatomy.num_layers)
    chosen = dict.fromkeys(anatomy.axes, metric) if isinstance(metric, str) else dict(metric or {})
    names = {axis.field: axis.metric for axis in anatomy.axes.values()} | {
        anatomy.axis(f).field: chosen[f] for f in chosen
    }
    removed = [field for field, name in names.items() if name == REMOVAL and anatomy.axis(field).active]
    metrics = {
        field: _aggregated(anatomy.axis(field), name, over_batch, over_sequence)
        for field, name in names.items()
        if field not in removed
    }
    if layers != "block_influence" or removed or layer_block:
        batches = list(batches)
    measured = sweep(model, batches, metrics, progress)
    scores: dict[str, Scores] = {field: _combined(anatomy, field, measured) for field in metrics}
    scores |= {field: removal_errors(model, batches) for field in removed}
    scores[anatomy.depth_field] = _layer_scores(model, batches, measured, task or layers, greedy_layers, layer_block)
    info = {
        "metric": names,
        "layers": layers if task is None else "task",
        "greedy_layers": greedy_layers,
        "layer_block": layer_block,
        "tokens": measured.tokens,
        "model_type": anatomy.architecture.model_type,
    }
    return Ranking(scores, info)


def check_layer_metric(layers: str, greedy_layers: int = 0) -> None:
    """Raises `NestlingError` for a layer metric that does not exist, or cannot be used greedily."""
    if layers not in LAYER_METRICS:
        raise NestlingError(f"'{layers}' is not a layer metric: choose from {', '.join(LAYER_METRICS)}")
    if greedy_layers < 0:
        raise NestlingError(f"greedy_layers {greedy_layers} is not possible: give at least 0")
    if greedy_layers and layers not in DAMAGES:
        raise NestlingError(f"greedy_layers needs a metric that leaves layers out: choose from {', '.join(DAMAGES)}")


def check_greedy(greedy_layers: int, num_layers: int) -> None:
    """Raises `NestlingError` for more layers to remove one after another than can go."""
    if greedy_layers >= num_layers:
        raise NestlingError(
            f"greedy_layers {greedy_layers} is not possible in a model with {num_layers} layers, of which one has to "
            f"stay: give at most {num_layers - 1}"
        )


def _aggregated(axis: Axis, text: str, over_batch: str | None, over_sequence: str | None) -> Metric:
    """The metric that a text such as `activation` or `activation@x` names for an axis."""
    name, _, at = text.partition("@")
    if at and at not in axis.also_at:
        places = ", ".join(axis.also_at) or "none"
        raise NestlingError(f"'{text}': {axis.field} cannot be read at '{at}' (places with a name: {places})")
    metric = find_metric(name)
    return dataclasses.replace(
        metric,
        over_batch=over_batch or metric.over_batch,
        over_sequence=over_sequence or metric.over_sequence,
        at=at or None,
    )


def _combined(anatomy: Anatomy, field: str, measured: Measured) -> Scores:
    """Per layer as measured, or the sum over the layers that share the units: all, for an axis of the whole model."""
    axis, per_layer = anatomy.axis(field), measured.units[field]
    if axis.scope == "model":
        return torch.stack([scores for scores in per_layer if len(scores)]).sum(0)
    uses = [anatomy.uses(axis, layer) for layer in range(anatomy.num_layers)]
    return tuple(torch.stack([per_layer[use] for use in layers]).sum(0) for layers in uses)


def _layer_scores(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    measured: Measured,
    layers: str | Task,
    greedy_layers: int,
    layer_block: int,
) -> Tensor:
    if layer_block:
        harms = blocks(model, batches, layer_block, layers)
        return block_scores(harms, layer_block, measured.influence)
    if layers == "block_influence":
        return measured.influence
    if greedy_layers:
        return greedy(model, batches, layers, greedy_layers)
    return leave_one_out(model, batches, layers)
