"""Importance metrics for width units: what one token says about one unit.

A metric is a function of a `Reading` (one module's input, output and weight, seen by units) that returns
magnitudes `[batch, seq, units]`; `Aggregate` then reduces them. Register your own with `@metric("name", ...)` and it
works for every axis of every architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.errors import NestlingError


@dataclass(frozen=True)
class Reading:
    """What a metric sees of one call of the module that reads an axis, or of one that writes it.

    activation: the module's input by units, `[batch, seq, units, inside]` (inside: channels of a head, 1 for neurons).
    output: what the module returned, `[batch, seq, out]`. weight: its weight by units, `[out, units, inside]`.
    At a module that writes the axis, activation is the axis's part of the output and weight is `[in, units, inside]`.
    gradient: of the loss on the text (its sum over tokens) with respect to activation, for metrics that ask for it.
    gate: the router's weight `[batch, seq, 1]`, where one routed expert is read on the tokens that chose it; the
    activation is multiplied by it already, and `output` is that of all experts together.
    """

    activation: Tensor
    output: Tensor
    weight: Tensor
    gradient: Tensor | None = None
    gate: Tensor | None = None


@dataclass(frozen=True)
class Metric:
    """A magnitude per token and unit, and the aggregation it is meant for (batch, sequence).

    at: another choice of places to read the axis at, by the name its declaration gives it. over_inside: how a unit's
    channels are put together when the magnitude is `[batch, seq, units, inside]`, at the very end. gradients: whether
    the sweep goes backward too. per_use: of routed experts, aggregate over the tokens
    that chose the expert.
    """

    magnitude: Callable[[Reading], Tensor]
    over_batch: str
    over_sequence: str
    at: str | None = None
    over_inside: str | None = None
    gradients: bool = False
    per_use: bool = False


METRICS: dict[str, Metric] = {}


def metric(
    name: str,
    over_batch: str = "l2",
    over_sequence: str = "mean",
    over_inside: str | None = None,
    gradients: bool = False,
    per_use: bool = False,
) -> Callable:
    """Register a function `Reading -> [batch, seq, units]` as a metric; `[..., inside]` with over_inside.

    per_use: of routed experts, aggregate over the tokens that chose the expert; else the others count as zeros.
    """

    def register(magnitude: Callable[[Reading], Tensor]) -> Callable[[Reading], Tensor]:
        METRICS[name] = Metric(magnitude, over_batch, over_sequence, None, over_inside, gradients, per_use)
        return magnitude

    return register


def find_metric(name: str) -> Metric:
    """The metric of that name. Raises `NestlingError` that lists those there are."""
    if name not in METRICS:
        raise NestlingError(f"'{name}' is not an importance metric: choose from {', '.join(METRICS)}")
    return METRICS[name]


@metric("activation")
def activation(read: Reading) -> Tensor:
    """Minitron: the size of the unit's activation, |a| or ||a||_2 (arXiv 2407.14679, section 2.2)."""
    if read.activation.shape[-1] == 1:
        return read.activation[..., 0]
    return torch.linalg.vector_norm(read.activation, dim=-1, dtype=_wide(read.activation))


@metric("contribution", over_batch="l2", over_sequence="l2")
def contribution(read: Reading) -> Tensor:
    """The unit's share in what its reader writes: ||W_u a_u||_2 / ||W a||_2 for each token.

    Dividing by the token's own output keeps the few tokens with massive activations from deciding alone.
    """
    return _written(read) / _size(read.output)


def _written(read: Reading) -> Tensor:
    """Length of what each unit alone makes the reader write, ||W_u a_u||_2 `[batch, seq, units]`."""
    wide = _wide(read.activation)
    if read.activation.shape[-1] == 1:
        size = read.activation[..., 0].abs() * torch.linalg.vector_norm(read.weight[..., 0], dim=0, dtype=wide)
    elif read.activation.shape[-2] == 1:
        size = torch.linalg.vector_norm(read.activation[..., 0, :] @ read.weight[:, 0].T, dim=-1, dtype=wide)[..., None]
    else:
        parts, weight = read.activation.to(wide), read.weight.to(wide)
        gram = torch.einsum("oui,ouj->uij", weight, weight)
        size = torch.einsum("bsui,uij,bsuj->bsu", parts, gram, parts).clamp_min(0).sqrt()
    return size


@metric("relative", over_batch="l2", over_sequence="l2")
def relative(read: Reading) -> Tensor:
    """The unit's activation against what its reader writes: ||a_u||_2 / ||W a||_2 for each token."""
    return activation(read).abs() / _size(read.output)


@metric("reap", over_batch="mean", over_sequence="mean", per_use=True)
def reap(read: Reading) -> Tensor:
    """Length of what the unit writes; of an expert the mean of g ||f(x)|| over its tokens (REAP, arXiv 2510.13999)."""
    return _written(read)


@metric("frequency", over_batch="mean", over_sequence="mean")
def frequency(read: Reading) -> Tensor:
    """One for each token that the unit was used for: of experts, the part of all tokens that chose them."""
    return torch.ones_like(read.activation[..., 0], dtype=_wide(read.activation))


@metric("gate", over_batch="mean", over_sequence="mean", per_use=True)
def gate(read: Reading) -> Tensor:
    """The router's weight for an expert, over the tokens that chose it (CP of arXiv 2605.28207); 1 of other units."""
    ones = frequency(read)
    return ones if read.gate is None else ones * read.gate


def _size(output: Tensor) -> Tensor:
    """Length of each token's output `[batch, seq, 1]`."""
    return torch.linalg.vector_norm(output, dim=-1, keepdim=True, dtype=_wide(output)).clamp_min(1e-20)


def _wide(values: Tensor) -> torch.dtype:
    """At least float32: squares of half precision overflow."""
    return torch.promote_types(values.dtype, torch.float32)
