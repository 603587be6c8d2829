"""The FFNs of a layer, dense, routed or for all tokens, as plain matrices: found by the letter of their neurons.

Every product in a dimension's notation is one matrix, so gate and up may be one tensor or two, and neurons are rows
here whichever way a tensor has them. What was read of one architecture is written as another's, in the order in which
both declare them: what enters, then what leaves. Knows the anatomy's notation, no names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from nestling.anatomy import Anatomy, Architecture, Axis, TensorSpec
from nestling.errors import UnsupportedArchitecture

Weights = dict[str, Tensor]


def taken(weights: Weights, anatomy: Anatomy, layer: int, letter: str) -> list[Tensor]:
    """The matrices of the FFN with that letter, `[neurons, width]` or `[experts, neurons, width]`, out of `weights`."""
    found: list[Tensor] = []
    for spec, dim in _matrices(anatomy, layer, letter):
        parts = weights.pop(spec.name).chunk(len(spec.layout[dim].parts), dim)
        found += [part.movedim(dim, -2) for part in parts]
    return found


def written(anatomy: Anatomy, layer: int, letter: str, matrices: Iterable[Tensor]) -> Weights:
    """Matrices as `taken` gives them, as the tensors that a layer of this anatomy has for them, by name."""
    left, made = iter(matrices), {}
    for spec, dim in _matrices(anatomy, layer, letter):
        parts = [matrix.movedim(-2, dim) for matrix in islice(left, len(spec.layout[dim].parts))]
        made[spec.name] = torch.cat(parts, dim).contiguous()
    return made


def _matrices(anatomy: Anatomy, layer: int, letter: str) -> Iterator[tuple[TensorSpec, int]]:
    """The matrices that a letter has in a layer, and the dimension in which each has it."""
    for spec in anatomy.of_layer[layer]:
        if letter in spec.letters and len(spec.layout) > 1:
            yield spec, next(dim for dim, letters in enumerate(spec.layout) if letter in letters.letters)


def shared_letter(anatomy: Anatomy, layer: int) -> str | None:
    """The letter of the expert that all tokens of a layer share; None where there is none."""
    routed = anatomy.architecture.routed
    inside = f"{anatomy.layer_path(layer)}.{routed.shared}." if routed and routed.shared else None
    stream = {axis.letter for axis in anatomy.axes.values() if axis.scope == "model"}
    specs = (spec for spec in anatomy.of_layer[layer] if inside and spec.name.startswith(inside))
    return next((letter for spec in specs for letter in sorted(spec.letters - stream)), None)


def expert_axis(architecture: Architecture) -> Axis:
    """The axis of routed experts. Raises `UnsupportedArchitecture` for an architecture without."""
    found = next((axis for axis in architecture.axes if axis.active), None)
    if found is None or architecture.routed is None:
        raise UnsupportedArchitecture(f"{architecture.model_type} models have no routed experts")
    return found


def width_axis(architecture: Architecture) -> Axis:
    """The axis of the neurons in each expert. Raises `UnsupportedArchitecture` where their number is bound."""
    experts = expert_axis(architecture)
    found = next((axis for axis in architecture.axes if experts.letter in axis.within), None)
    if found is None:
        raise UnsupportedArchitecture(
            f"the experts of a {architecture.model_type} model are as wide as its shared ones, so they cannot be split"
        )
    return found


def sizes_of(anatomy: Anatomy) -> tuple[int, int, int]:
    """Experts of the first layer that has them, those of a token, and neurons in each."""
    axis, routed, layer = expert_axis(anatomy.architecture), anatomy.architecture.routed, anatomy.routed_layers()[0]
    assert routed is not None
    return anatomy.units(axis, layer), getattr(anatomy.config, str(axis.active)), anatomy.sizes(layer)[routed.neuron]


def expert_tensors(anatomy: Anatomy, layer: int) -> list[TensorSpec]:
    """The tensors inside a layer's experts, each with the experts in its first dimension; the router's are not."""
    routed = anatomy.architecture.routed
    inside = f"{anatomy.layer_path(layer)}.{routed.experts}." if routed else "."
    return [spec for spec in anatomy.of_layer[layer] if spec.name.startswith(inside)]
