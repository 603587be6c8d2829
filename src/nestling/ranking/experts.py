"""Routed experts, and the neurons in them, read while they run: what each wrote for the tokens that chose it.

Experts are parameters of a module without a weight, so there is no module whose input is one expert's activation: it is
computed once more here, expert by expert, from what the experts' module is called with. `removal_errors` leaves one
expert out after the other instead, and routes its tokens anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nestling import processes
from nestling.anatomy import Anatomy, decoder
from nestling.anatomy.bypass import evaluating
from nestling.anatomy.routing import narrowed
from nestling.errors import NestlingError
from nestling.experts import Experts
from nestling.ranking.aggregate import Aggregate
from nestling.ranking.metrics import Metric, Reading

# Part of a routing weight by which it may differ and count as the same.
SAME = 1e-4


class ExpertScores:
    """The scores of one axis in one layer's experts: an aggregate for each expert, of all its units.

    experts: how many there are. units: in each, 1 where the expert itself is scored.
    """

    def __init__(self, experts: int, units: int, metric: Metric):
        if metric.gradients:
            raise NestlingError("a metric of gradients cannot score experts: name another for their axes")
        over = (metric.over_batch, metric.over_sequence, metric.over_inside)
        self.units, self.metric = units, metric
        self._of = [Aggregate(*over) for _ in range(experts)]
        self._shape: tuple[int, ...] = (units,)

    def add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor, mask: Tensor, whole: bool) -> None:
        """Add one call of the experts' module.

        args: hidden states `[tokens, hidden]`, the experts of each token and their weights `[tokens, k]`. mask:
        `[batch, seq, 1]`, 0 at padding. whole: score the experts, not their neurons.
        """
        for expert, (tokens, reading) in enumerate(readings(module, args, output, whole)):
            real = mask.flatten()[tokens] > 0
            magnitude = self.metric.magnitude(reading)[0]  # [tokens, units], maybe [tokens, units, inside]
            self._shape = magnitude.shape[1:]
            if not self.metric.per_use:
                dense = magnitude.new_zeros(mask.numel(), *self._shape).index_copy(0, tokens, magnitude)
                self._of[expert].add(dense.view(*mask.shape[:2], *self._shape), None if bool(mask.all()) else mask)
            elif real.any():
                self._of[expert].add(magnitude[real, None])

    def merge(self, device: torch.device) -> None:
        """Add up what all processes have collected."""
        for of in self._of:
            of.merge(self._shape, device)

    def score(self) -> Tensor:
        """`[experts * units]`; zero for experts that no token chose."""
        return torch.cat([of.score().nan_to_num(0.0) for of in self._of])


def readings(
    module: nn.Module, args: tuple[Tensor, ...], output: Tensor, whole: bool
) -> Iterator[tuple[Tensor, Reading]]:
    """For each expert its tokens `[n]` and what it did for them; see `ExpertScores.add`."""
    experts = _experts(module)
    hidden, index, weights = args
    for expert in range(len(experts.up)):
        tokens, slot = torch.where(index == expert)
        gate = weights[tokens, slot, None]
        neurons = experts.apply(hidden[tokens], expert) * gate.to(hidden.dtype)
        matrix = experts.down[expert].T
        if whole and experts.down_bias is not None:  # the bias is one more neuron, always at one
            neurons = torch.cat([neurons, gate.to(neurons.dtype)], dim=-1)
            matrix = torch.cat([matrix, experts.down_bias[expert, :, None]], dim=-1)
        neurons, matrix = (neurons[:, None], matrix[:, None]) if whole else (neurons[..., None], matrix[..., None])
        yield tokens, Reading(neurons[None], output[tokens][None], matrix, gate=gate[None])


def removal_errors(
    model: PreTrainedModel, batches: Iterable[Any], progress: Callable[[int], None] | None = None
) -> tuple[Tensor, ...]:
    """For each layer what leaving out each expert does to its block's output `[experts]`; empty without experts.

    The tokens whose routing changes are routed among the others, and the squared change of the output, against its
    square, is summed over them and divided by the number of all tokens. progress: told the tokens of each batch.
    """
    anatomy = Anatomy.of(model)
    layers = anatomy.routed_layers()
    sums = {layer: _zeros(model, anatomy, layer) for layer in layers}
    seen = torch.zeros((), dtype=torch.float64)
    with ExitStack() as hooks, evaluating(model):
        for layer in layers:
            _watch_removals(model, anatomy, layer, sums, hooks)
        for batch in processes.share(batches):
            inputs = {k: batch[k].to(model.device) for k in ("input_ids", "attention_mask") if k in batch}
            decoder(model)(**inputs, use_cache=False)
            seen += inputs["input_ids"].numel()
            if progress is not None:
                progress(inputs["input_ids"].numel() * processes.count())
    seen = processes.summed(seen)
    mean = {layer: processes.summed(total).cpu() / seen for layer, total in sums.items()}
    return tuple(mean.get(layer, torch.zeros(0)) for layer in range(anatomy.num_layers))


def _zeros(model: PreTrainedModel, anatomy: Anatomy, layer: int) -> Tensor:
    axis = next(axis for axis in anatomy.axes.values() if axis.active)
    return torch.zeros(anatomy.units(axis, layer), dtype=torch.float64, device=model.device)


def _watch_removals(
    model: PreTrainedModel, anatomy: Anatomy, layer: int, sums: dict[int, Tensor], hooks: ExitStack
) -> None:
    routed = anatomy.architecture.routed
    assert routed is not None
    router = model.get_submodule(f"{anatomy.layer_path(layer)}.{routed.router}")
    experts = model.get_submodule(f"{anatomy.layer_path(layer)}.{routed.experts}")
    read: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        read[:] = [args[0].reshape(-1, args[0].shape[-1])]

    def measure(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        with torch.no_grad():
            errors = _errors(router, module, read[0], args, output)
        sums[layer] += errors

    hooks.callback(router.register_forward_hook(note).remove)
    hooks.callback(experts.register_forward_hook(measure).remove)


def _errors(router: nn.Module, module: nn.Module, read: Tensor, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    hidden, index, weights = args
    count = len(_experts(module).up)
    size = output.double().square().sum(-1).clamp_min(1e-30)
    errors = torch.zeros(count, dtype=torch.float64, device=output.device)
    for expert in range(count):
        kept = torch.tensor([i for i in range(count) if i != expert], device=output.device)
        _, others, chosen = narrowed(router, kept)(read)  # type: ignore[arg-type]
        moved = (index == expert).any(-1) | _changed(weights, others)
        if moved.any():
            without = type(module).forward(module, hidden[moved], chosen[moved], others[moved])
            change = (without - output[moved]).double().square().sum(-1)
            errors[expert] = (change / size[moved]).sum()
    return errors


def _changed(weights: Tensor, others: Tensor) -> Tensor:
    """Tokens for which the same experts have other weights: without a norm over the chosen, that is all of them."""
    before, after = weights.sort(-1).values.float(), others.sort(-1).values.float()
    return ((before - after).abs() > SAME * before.abs().amax(-1, keepdim=True)).any(-1)


def _experts(module: nn.Module) -> Experts:
    experts = Experts.of(module)
    if experts is None:
        raise NestlingError(f"the experts of {type(module).__name__} normalize their outputs and cannot be scored")
    return experts
