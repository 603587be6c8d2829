"""The parts of a model whose time is taken apart, and what each of them reads in a step.

In every layer each block that one module computes (attention, an MLP, a mixer) and what is left of the layer; then the
head, and what is left of the model. All of it follows from the anatomy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from nestling.anatomy import Anatomy, TensorSpec
from nestling.cost import attended_length, products_size, share_used

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Work:
    """A step that is timed: one new token in each of `batch` sequences that have `context` tokens before it."""

    batch: int = 1
    context: int = 512


@dataclass(frozen=True)
class Part:
    """A timed part of a model: its tensors, and the module that computes it (None for what others leave)."""

    name: str
    module: str | None
    layer: int | None
    block: str | None
    tensors: tuple[TensorSpec, ...]

    @cached_property
    def letters(self) -> tuple[str, ...]:
        return tuple(sorted(frozenset().union(*(spec.letters for spec in self.tensors))))

    def reads(self, anatomy: Anatomy, sizes: Sizes, work: Work) -> tuple[float, float]:
        """Numbers that a step reads: weights, and cache or state."""
        weights = sum(
            math.prod(dimension.size(sizes) for dimension in spec.layout) * share_used(anatomy, spec, sizes)
            for spec in self.tensors
        )
        if self.block is None or self.layer is None:
            return weights, 0.0
        made = anatomy.architecture
        length = attended_length(anatomy, self.layer, work.context)
        kept = length * products_size(made.kv_cache.get(self.block, ()), sizes)
        state = (*made.state.get(self.block, ()), *made.recent.get(self.block, ()))
        return weights, work.batch * (kept + products_size(state, sizes))


# ---- parts of a model


def parts(anatomy: Anatomy) -> list[Part]:
    """What is timed: in every layer each block that one module computes and the rest, then the head and the rest."""
    found = getattr(anatomy, "_latency_parts", None)
    if found is None:
        found = [part for layer in range(anatomy.num_layers) for part in _layer_parts(anatomy, layer)]
        own = [spec for spec in anatomy.tensors.values() if spec.layer is None]
        head = [spec for spec in own if spec.name == anatomy.architecture.tied]
        rest = [spec for spec in own if spec not in head and spec.name != anatomy.architecture.lookup]
        found += [Part("head", spec.module, None, None, (spec,)) for spec in head]
        found.append(Part("rest of the model", None, None, None, tuple(rest)))
        anatomy.__dict__["_latency_parts"] = found
    return found


def _layer_parts(anatomy: Anatomy, layer: int) -> Iterator[Part]:
    blocks: dict[str, list[TensorSpec]] = {}
    for spec in anatomy.tensors.values():
        if spec.layer == layer and spec.computes:
            blocks.setdefault(str(spec.block), []).append(spec)
    kind = _kind(anatomy, layer)
    rest: list[TensorSpec] = []
    for block, specs in blocks.items():
        modules = {spec.name.removeprefix(f"{anatomy.layer_path(layer)}.").partition(".")[0] for spec in specs}
        if len(modules) == 1 and any(len(spec.layout) > 1 for spec in specs):
            module = f"{anatomy.layer_path(layer)}.{modules.pop()}"
            yield Part(f"{block}{kind}", module, layer, block, tuple(specs))
        else:
            rest += specs
    yield Part(f"rest of {' and '.join(sorted(blocks))}{kind}", None, layer, None, tuple(rest))


def _kind(anatomy: Anatomy, layer: int) -> str:
    """What the config says of a layer beyond its sizes, such as the kind of its attention."""
    values = [getattr(anatomy.config, name, None) for name in anatomy.architecture.per_layer_fields]
    return "".join(f", {value[layer]}" for value in values if value)
