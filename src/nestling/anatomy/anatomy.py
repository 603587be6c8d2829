"""One model's anatomy: its declaration applied to its config and checked against its tensors.

`Anatomy.of(model)` is what every method starts from. It knows, for each tensor, the layer it lives in and its layout,
and for each layer the size of every letter. A model whose tensors differ from the declaration is refused, so nothing
is ever cut by guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nestling.anatomy.bypass import bypassed
from nestling.anatomy.declare import ARCHITECTURES, Architecture, Axis, architecture_of
from nestling.anatomy.notation import Layout, parse
from nestling.anatomy.sharing import USE, Sharing
from nestling.errors import ShapeError, UnsupportedArchitecture


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the model: its full name, its layer (None for the model's own), block and layout.

    use: where layers share their tensors, the one layer that this tensor is for; None if it is for all of them.
    pattern: the declared name of such a tensor, with `{use}` for the number of that layer among those that share.
    """

    name: str
    layer: int | None
    block: str | None
    layout: Layout
    use: int | None = None
    pattern: str | None = None

    @property
    def module(self) -> str:
        """Path of the module that owns the tensor."""
        return self.name.rpartition(".")[0]

    @property
    def letters(self) -> frozenset[str]:
        return frozenset().union(*(dimension.letters for dimension in self.layout))

    @property
    def computes(self) -> bool:
        """Whether the tensor's own layer computes with it; what is for another layer only lies there."""
        return self.use is None or self.use == self.layer


@dataclass(frozen=True)
class Place:
    """Where an axis is scored: at the input of the module that owns a tensor, or at a part of that module's output."""

    tensor: str
    part: int | None = None


class Anatomy:
    """What a model is made of.

    architecture: the declaration. config: the model's config. tensors: every tensor's `TensorSpec`, by name.
    num_layers: decoder layers. tied: whether output and input embeddings are one tensor.
    """

    def __init__(
        self, architecture: Architecture, config: PreTrainedConfig, shapes: dict[str, tuple[int, ...]], tied: bool
    ):
        self.architecture = architecture
        self.config = config
        self.num_layers: int = getattr(config, architecture.depth_field)
        self.tied = tied
        self._sizes = [self._letter_sizes(layer) for layer in range(self.num_layers)]
        self.tensors = {spec.name: spec for spec in self._present(shapes)}
        self._check(shapes)

    @classmethod
    def of(cls, model: PreTrainedModel | PreTrainedConfig) -> Anatomy:
        """The anatomy of a model, or of the model that a config describes (no weights are made).

        Raises `UnsupportedArchitecture` when the type is not declared or the tensors are not as declared.
        """
        config = model.config if isinstance(model, PreTrainedModel) else model
        architecture = architecture_of(config)
        if not isinstance(model, PreTrainedModel):
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        # A config may ask for tied embeddings of a model that does not tie them (Nemotron-H): the model decides.
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return cls(architecture, config, {name: tuple(t.shape) for name, t in model.state_dict().items()}, tied)

    @classmethod
    def known(cls, config: PreTrainedConfig) -> Anatomy | None:
        """As `of`; None for a type that is not declared."""
        return cls.of(config) if config.model_type in ARCHITECTURES else None

    # ---- axes and sizes

    @cached_property
    def axes(self) -> dict[str, Axis]:
        """The width axes that this model has, by the config field that holds their size."""
        letters = frozenset().union(*(spec.letters for spec in self.tensors.values()))
        return {axis.field: axis for axis in self.architecture.axes if axis.letter in letters}

    @property
    def depth_field(self) -> str:
        return self.architecture.depth_field

    @property
    def fields(self) -> tuple[str, ...]:
        """Every config field that a shape may set: the width axes and the number of layers."""
        return (*self.axes, self.depth_field)

    def axis(self, field: str) -> Axis:
        """The axis of that name. Raises `ShapeError` that lists those the model has."""
        if field not in self.axes:
            raise ShapeError(f"'{field}' is not an axis of this model: choose from {', '.join(self.fields)}")
        return self.axes[field]

    def by_letter(self, letter: str) -> Axis:
        return next(axis for axis in self.axes.values() if axis.letter == letter)

    def sizes(self, layer: int | None) -> dict[str, int]:
        """The size of every letter in a layer; those of the first layer for the model's own tensors (None)."""
        return self._sizes[layer or 0]

    def units(self, axis: Axis, layer: int | None) -> int:
        """How many units of an axis a layer holds, in all groups together."""
        sizes = self.sizes(layer)
        return math.prod(sizes[letter] for letter in (*axis.within, axis.letter))

    def value(self, axis: Axis, layer: int | None) -> int:
        """The axis's size as its config field counts it."""
        return self.units(axis, layer) if axis.counts_all else self.sizes(layer)[axis.letter]

    def has(self, axis: Axis, layer: int) -> bool:
        """Whether a layer has that axis at all."""
        return axis.letter in self._letters_in[layer]

    def by_importance(self, order: Iterable[int]) -> list[int]:
        """Layers, most important first, with those at the front that others cannot do without.

        One of every block that must not die out (see `keeps`); and where layers take several shared sets in turn, all
        of these, the first in front, so that those that stay still take them in turn.
        """
        order = list(order)
        if self.sharing.sets > 1:
            return [*self.sharing.takers, *(i for i in order if i not in self.sharing.takers)]
        first = [next((i for i in order if block in self.blocks(i)), None) for block in self.architecture.keeps]
        return [*(i for i in dict.fromkeys(first) if i is not None), *(i for i in order if i not in first)]

    def uses(self, axis: Axis, layer: int) -> tuple[int, ...]:
        """The layers whose units of an axis are those of a layer, because they share the tensors they are in."""
        return self.sharing.sharers(layer) if axis.letter in self._shared_letters else (layer,)

    def home(self, axis: Axis, layer: int) -> int:
        """The layer whose ranking says which units of an axis stay in a layer."""
        return self.uses(axis, layer)[0]

    @cached_property
    def sharing(self) -> Sharing:
        """Which layers share tensors."""
        shared = self.architecture.shared
        block = shared.block if shared else None
        takers = tuple(layer for layer in range(self.num_layers) if block in self.blocks(layer))
        return Sharing(block, takers, shared.count(self.config) if shared else 0, self.tied)

    @cached_property
    def _shared_letters(self) -> frozenset[str]:
        block = self.architecture.shared.block if self.architecture.shared else None
        return frozenset().union(*(spec.letters for spec in self.tensors.values() if block and spec.block == block))

    def blocks(self, layer: int) -> tuple[str, ...]:
        """The named groups of tensors that a layer is made of."""
        architecture = self.architecture
        return (
            architecture.layer_blocks(self.config, layer) if architecture.layer_blocks else tuple(architecture.blocks)
        )

    def kind(self, layer: int) -> str:
        """What a layer is, by the names of its blocks that hold matrices: `mamba`, `attention+mlp`."""
        blocks = self.architecture.blocks
        return "+".join(b for b in self.blocks(layer) if any(" " in spec.strip("()") for spec in blocks[b].values()))

    @cached_property
    def own(self) -> tuple[TensorSpec, ...]:
        """The tensors that are in no layer."""
        return tuple(spec for spec in self.tensors.values() if spec.layer is None)

    @cached_property
    def of_layer(self) -> list[tuple[TensorSpec, ...]]:
        """The tensors of every layer."""
        found: list[list[TensorSpec]] = [[] for _ in range(self.num_layers)]
        for spec in self.tensors.values():
            if spec.layer is not None:
                found[spec.layer].append(spec)
        return [tuple(specs) for specs in found]

    @cached_property
    def alike(self) -> list[int]:
        """A number for every layer, the same for layers that hold the same tensors, laid out alike."""
        known: dict[tuple[Any, ...], int] = {}
        numbers = []
        for layer, specs in enumerate(self.of_layer):
            start = len(self.layer_path(layer))
            key = tuple((spec.name[start:], spec.block, spec.layout) for spec in specs)
            numbers.append(known.setdefault(key, len(known)))
        return numbers

    @cached_property
    def _letters_in(self) -> list[frozenset[str]]:
        letters: list[set[str]] = [set() for _ in range(self.num_layers)]
        for spec in self.tensors.values():
            if spec.layer is not None:
                letters[spec.layer] |= spec.letters
        return [frozenset(group) for group in letters]

    # ---- places in the model

    def layer_path(self, layer: int) -> str:
        return f"{self.architecture.layers}.{layer}"

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The list of decoder layers of a model of this anatomy."""
        return model.get_submodule(self.architecture.layers)  # type: ignore[return-value]

    def readers(self, axis: Axis, layer: int) -> Iterator[str]:
        """Matrices that read an axis in a layer; the axis is their last dimension."""
        places = (place for place in self.places(axis, layer) if place.part is None)
        return (place.tensor for place in places if len(self.tensors[place.tensor].layout) == 2)

    def places(self, axis: Axis, layer: int, at: str | None = None) -> Iterator[Place]:
        """Where an axis is scored in a layer. at: the name of another choice of places, if the axis has such."""
        for text in axis.also_at[at] if at else axis.scored_at:
            module, part = re.fullmatch(r"([^\[]+)(?:\[(\d+)\])?", text).groups()  # type: ignore[union-attr]
            path = f"{self.layer_path(layer)}.{module}"
            for name in (f"{path}.weight", path):  # the latter are parameters of modules without a weight: experts
                if name in self.tensors:
                    yield Place(name, None if part is None else int(part))

    def routed_layers(self) -> list[int]:
        """The layers that have routed experts."""
        routed = self.architecture.routed
        if routed is None:
            return []
        prefixes = (f"{self.layer_path(i)}.{routed.experts}." for i in range(self.num_layers))
        return [i for i, prefix in enumerate(prefixes) if any(name.startswith(prefix) for name in self.tensors)]

    def bypassed(
        self, layer: nn.Module, substitute: Callable[[Tensor], Tensor] | None = None
    ) -> AbstractContextManager[None]:
        """As `nestling.anatomy.bypass.bypassed`, for a layer of this anatomy; it returns what its like return."""
        return bypassed(layer, substitute or (lambda hidden: hidden), as_tuple=self.architecture.layer_tuples)

    # ---- construction

    def _letter_sizes(self, layer: int) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for letter, source in self.architecture.sizes.items():
            sizes[letter] = source(self.config) if callable(source) else getattr(self.config, source)
        for axis in self.architecture.axes:
            total = layer_value(self.config, axis.field, layer)
            if total is None:
                continue
            groups = math.prod(sizes[outer] for outer in axis.within) if axis.counts_all else 1
            if total % groups:
                raise ShapeError(
                    f"{axis.field}={total} in layer {layer} is not a multiple of the {groups} groups it is divided into"
                )
            sizes[axis.letter] = total // groups
        return sizes

    def _present(self, shapes: dict[str, tuple[int, ...]]) -> Iterator[TensorSpec]:
        for name, spec, layer, block, use in self._declared():
            optional = name.endswith("?")
            pattern = name.removesuffix("?")
            name = pattern if use is None else self.sharing.named(pattern, use, range(self.num_layers))
            if name in shapes:
                yield TensorSpec(name, layer, block, parse(spec), use, None if use is None else pattern)
            elif not optional:
                raise UnsupportedArchitecture(
                    f"this {self.architecture.model_type} model has no tensor '{name}', which its declaration names: "
                    f"mark it optional with '?' there or declare the variant as its own architecture"
                )

    def _declared(self) -> Iterator[tuple[str, str, int | None, str | None, int | None]]:
        architecture = self.architecture
        for name, spec in architecture.tensors.items():
            yield name, spec, None, None, None
        for layer in range(self.num_layers):
            for block in self.blocks(layer):
                for name, spec in architecture.blocks[block].items():
                    for use in self.sharing.turns(layer) if USE in name else (None,):
                        yield f"{self.layer_path(layer)}.{name}", spec, layer, block, use

    def _check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        unknown = [name for name in shapes if name not in self.tensors]
        if unknown:
            raise UnsupportedArchitecture(
                f"this {self.architecture.model_type} model has tensors that its declaration does not describe "
                f"({', '.join(unknown[:4])}{', ...' if len(unknown) > 4 else ''}): declare them with their axes"
            )
        for name, spec in self.tensors.items():
            declared = tuple(dimension.size(self.sizes(spec.layer)) for dimension in spec.layout)
            if declared != shapes[name]:
                raise UnsupportedArchitecture(
                    f"tensor '{name}' is {list(shapes[name])} but '{' '.join(map(str, spec.layout))}' with this config "
                    f"gives {list(declared)}: correct the declaration of {self.architecture.model_type}"
                )


def layer_value(config: Any, field: str, layer: int) -> int | None:
    """A config field's value in one layer: from the config's per-layer sizes where it has them."""
    per_layer = getattr(config, "layer_shapes", None) or {}
    return per_layer[field][layer] if field in per_layer else getattr(config, field, None)
