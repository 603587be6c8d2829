"""One sweep over calibration data that scores every unit of every axis, through hooks on the untouched model.

Where an axis is read is declared with it, at the input of a module or at a part of its output; what belongs to a unit
follows from the layout of the tensor there. What is measured of a unit is up to the metric of its axis. The same sweep
compares every layer's input and output (block influence). Paper: Minitron, arXiv 2407.14679, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nestling import processes
from nestling.anatomy import Anatomy, Axis, Place, decoder
from nestling.anatomy.bypass import evaluating
from nestling.anatomy.notation import Dimension, Layout, Sizes
from nestling.errors import DataError
from nestling.ranking.aggregate import Aggregate
from nestling.ranking.experts import ExpertScores
from nestling.ranking.gradients import differentiating, go_back, pieces
from nestling.ranking.metrics import Metric, Reading

Batch = Mapping[str, Tensor]


@dataclass
class Measured:
    """What a sweep saw.

    units: axis field -> per layer `[units]`, the aggregated magnitude, combined over the places where it is read.
    influence: block influence of each layer `[num_layers]`. tokens: how many were seen, padding left out.
    """

    units: dict[str, list[Tensor]] = field(default_factory=dict)
    influence: Tensor = field(default_factory=lambda: torch.zeros(0))
    tokens: int = 0


def sweep(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    metrics: Mapping[str, Metric],
    progress: Callable[[int], None] | None = None,
) -> Measured:
    """Run the backbone over the batches once and measure every axis.

    batches: mappings with `input_ids` `[batch, seq]` and maybe `attention_mask`. metrics: what is measured of each
    axis, by its config field; axes that are not named are left out. progress: told the tokens of each
    batch. Raises `DataError` when there is no batch. Hooks are gone and the training flag is back afterwards.
    """
    if isinstance(batches, Mapping):
        raise DataError("one batch was given where several are expected: put it into a list")
    anatomy = Anatomy.of(model)
    watch = _Watch(anatomy, metrics)
    backward = any(metric.gradients for metric in metrics.values())
    with watch.on(model), evaluating(model), differentiating(model) if backward else nullcontext():
        for batch in processes.share(batches):
            for part in pieces(batch) if backward else (batch,):
                inputs = watch.begin(part, model.device)
                hidden = decoder(model)(**inputs, use_cache=False).last_hidden_state
                if backward:
                    go_back(model, hidden, **inputs)
                if progress is not None:
                    progress(watch.tokens * processes.count())
    watch.merge(model.device)
    if not watch.seen:
        raise DataError("the calibration data has no batches: give at least one with input_ids [batch, seq]")
    return Measured(watch.unit_scores(), watch.influence(), watch.seen)


class _Watch:
    """The hooks of one sweep and what they have added up."""

    def __init__(self, anatomy: Anatomy, metrics: Mapping[str, Metric]):
        self.anatomy = anatomy
        self.metrics = metrics
        self.tokens = 0
        self._mask: Tensor | None = None
        self._shape: tuple[int, int] = (0, 0)
        self._units = {
            (axis, layer, place): self._aggregate(anatomy.axis(axis), layer, place, metric)
            for axis, metric in metrics.items()
            for layer in range(anatomy.num_layers)
            for place in anatomy.places(anatomy.axis(axis), layer, metric.at)
        }
        self._similarity = [torch.zeros((), dtype=torch.float64) for _ in range(anatomy.num_layers)]
        self.seen = 0

    def _aggregate(self, axis: Axis, layer: int, place: Place, metric: Metric) -> Aggregate | ExpertScores:
        layout, sizes = self.anatomy.tensors[place.tensor].layout, self.anatomy.sizes(layer)
        if not _of_experts(layout):
            return Aggregate(metric.over_batch, metric.over_sequence, metric.over_inside)
        units = self.anatomy.units(axis, layer)
        experts = layout[0].size(sizes)
        return ExpertScores(experts, units // experts, metric)

    def begin(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Note the batch's padding; returns what the model is called with."""
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
        mask = inputs.get("attention_mask")
        padded = mask is not None and not bool(mask.all())
        self._mask = mask[..., None].float() if padded and mask is not None else None
        self._shape = (inputs["input_ids"].shape[0], inputs["input_ids"].shape[1])
        self.tokens = int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        self.seen += self.tokens
        return inputs

    @contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[None]:
        with ExitStack() as hooks:
            for place, axes in self._readings().items():
                module = model.get_submodule(self.anatomy.tensors[place.tensor].module)
                hooks.callback(module.register_forward_hook(self._record(place, axes)).remove)
            for layer, module in enumerate(self.anatomy.layers(model)):
                hooks.callback(module.register_forward_hook(self._compare(layer), with_kwargs=True).remove)
            yield

    def _readings(self) -> dict[Place, list[Axis]]:
        """Place -> the axes that are read there."""
        readings: dict[Place, list[Axis]] = {}
        for axis, _, place in self._units:
            readings.setdefault(place, []).append(self.anatomy.axis(axis))
        return readings

    def _read(self, place: Place) -> tuple[Dimension, slice]:
        """The dimension read at a place, and the part of it that is the place's own."""
        spec = self.anatomy.tensors[place.tensor]
        if place.part is None:
            return spec.layout[-1], slice(None)
        return _part(spec.layout[0], place.part, self.anatomy.sizes(spec.layer))

    def _record(self, place: Place, axes: list[Axis]) -> Callable[..., None]:
        spec = self.anatomy.tensors[place.tensor]
        layer, sizes = spec.layer or 0, self.anatomy.sizes(spec.layer)
        if _of_experts(spec.layout):
            return self._record_experts(place, axes)
        read, written = self._read(place)
        views = {axis.field: read.unit_view((*axis.within, axis.letter), sizes) for axis in axes}

        def add(module: nn.Module, source: Tensor, output: Tensor, gradient: Tensor | None) -> None:
            weight = cast(Tensor, module.weight)
            if place.part is not None:
                source, weight = source[..., written], weight[written].T
                gradient = None if gradient is None else gradient[..., written]
            for name, view in views.items():
                metric = self.metrics[name]
                if metric.gradients == (gradient is not None):
                    seen = (by_units(source, *view), output, by_units(weight, *view))
                    reading = Reading(*seen, None if gradient is None else by_units(gradient, *view))
                    scores = self._units[name, layer, place]
                    assert isinstance(scores, Aggregate)
                    scores.add(metric.magnitude(reading), self._mask)

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            source = args[0] if place.part is None else output
            kept = self._by_rows(source.detach()), self._by_rows(output.detach())
            with torch.no_grad():
                add(module, *kept, None)
            if source.requires_grad:
                source.register_hook(lambda gradient: add(module, *kept, self._by_rows(gradient)))

        return hook

    def _by_rows(self, values: Tensor) -> Tensor:
        """`[batch, seq, channels]`, also where a module reads all tokens in one row `[batch x seq, channels]`."""
        return values.view(*self._shape, -1) if values.dim() == 2 else values

    def _record_experts(self, place: Place, axes: list[Axis]) -> Callable[..., None]:
        spec = self.anatomy.tensors[place.tensor]

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            mask = torch.ones(*self._shape, 1, device=output.device) if self._mask is None else self._mask
            for axis in axes:
                scores = self._units[axis.field, spec.layer or 0, place]
                assert isinstance(scores, ExpertScores)
                scores.add(module, args, output, mask, whole=axis.letter in spec.layout[0].letters)

        return hook

    def _compare(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(before.detach().float(), after.detach().float(), dim=-1)
            cosine = cosine if self._mask is None else cosine * self._mask[..., 0]
            self._similarity[layer] = self._similarity[layer] + cosine.sum(dtype=torch.float64).cpu()

        return hook

    def merge(self, device: torch.device) -> None:
        """Add up what all processes saw."""
        self.seen = int(processes.summed(torch.tensor(self.seen)))
        self._similarity = list(processes.summed(torch.stack(self._similarity)))
        for (axis, layer, place), aggregate in self._units.items():
            if isinstance(aggregate, ExpertScores):
                aggregate.merge(device)
                continue
            units = self.anatomy.units(self.anatomy.axis(axis), layer)
            width = self._read(place)[0].size(self.anatomy.sizes(layer))
            aggregate.merge((units, width // units) if self.metrics[axis].over_inside else (units,), device)

    def unit_scores(self) -> dict[str, list[Tensor]]:
        """Axis field -> for each layer the sum or product of its places' scores (empty where it is not read)."""
        scores = {field: [torch.zeros(0)] * self.anatomy.num_layers for field in self.metrics}
        for (axis, layer, _), aggregate in self._units.items():
            before, found = scores[axis][layer], aggregate.score()
            if len(before):
                found = found * before if self.anatomy.axis(axis).combine == "product" else found + before
            scores[axis][layer] = found
        return scores

    def influence(self) -> Tensor:
        """Block influence, 1 - E[cos(input, output)] `[num_layers]` (ShortGPT, arXiv 2403.03853)."""
        return 1 - torch.stack(self._similarity) / max(1, self.seen)


def _of_experts(layout: Layout) -> bool:
    """Whether a tensor holds one matrix for each routed expert."""
    return len(layout) == 3


def _part(dimension: Dimension, number: int, sizes: Sizes) -> tuple[Dimension, slice]:
    """One product of a sum of products, and the elements that are its own."""
    lengths = [Dimension((part,)).size(sizes) for part in dimension.parts]
    start = sum(lengths[:number])
    return Dimension((dimension.parts[number],)), slice(start, start + lengths[number])


def by_units(tensor: Tensor, view: tuple[int, ...], inside: tuple[int, ...]) -> Tensor:
    """The last dimension of a tensor seen by units: `[..., dim]` -> `[..., units, inside]`."""
    lead = tensor.dim() - 1
    outside = [i for i in range(len(view)) if i not in inside]
    split = tensor.reshape(*tensor.shape[:-1], *view)
    ordered = split.permute(*range(lead), *(lead + i for i in outside), *(lead + i for i in inside))
    return ordered.reshape(*tensor.shape[:-1], math.prod(view[i] for i in outside), -1)
