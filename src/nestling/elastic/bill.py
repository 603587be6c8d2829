"""What a shape costs, as a function that can be differentiated: the costs of `nestling.cost` for sizes that are not
whole, and for layers that are only partly there.

What counts as what is said there (`tensor_kinds`, `products`, `figures`). Every figure is a sum of monomials in the
sizes of the letters, read off the declared layouts once; a layer's are multiplied by its gate, 1 where the layer stays.
Sizes that routers only expect, E[size], go in as they are, so at a hard choice the figures are those of `cost`. Paper:
Nemotron Elastic, arXiv 2511.16664, section 3.4 (C(a)).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.anatomy import Anatomy, TensorSpec
from nestling.anatomy.notation import Dimension, parse
from nestling.cost import attended_length, figures, item_bytes, products, tensor_kinds
from nestling.errors import TargetError

METRICS = ("params", "active_params", "weight_bytes", "kv_bytes", "state_bytes", "memory_bytes", "flops_per_token")
Letters = tuple[str, ...]
# The size of every letter that may shrink in every layer, `[..., letters, num_layers]`; see `letters_of`. With them go
# gates, the part of each layer that is there, `[..., num_layers]`; a cost is `[...]`, so many shapes cost one call.
Sizes = Tensor


@dataclass(frozen=True)
class Term:
    """A monomial: the product of its letters' sizes, times a factor in each layer `[num_layers]`.

    scope: `model` terms are counted once, with the first layer's sizes and without a gate. capped: letters whose size
    counts up to a limit only, the experts that one token uses.
    """

    scope: str
    letters: Letters
    factor: Tensor
    capped: tuple[tuple[str, float], ...] = ()


class Table:
    """The monomials of one cost, weighted and evaluated at once: a few operations for all terms of all layers.

    Rows of what is multiplied: a line for each letter, for each letter up to its limit, the gates, and ones.
    """

    def __init__(self, terms: Sequence[tuple[float, list[Term]]], letters: Sequence[str]):
        flat = [(factor, term) for factor, part in terms for term in part]
        capped = sorted({line for _, term in flat for line in term.capped})
        self._capped = torch.tensor([letters.index(letter) for letter, _ in capped], dtype=torch.long)
        self._limits = torch.tensor([limit for _, limit in capped], dtype=torch.float64)[:, None]
        rows: list[object] = [*letters, *capped, "gate", "one"]
        place = {row: number for number, row in enumerate(rows)}
        products = [[*t.letters, *t.capped, *(["gate"] if t.scope == "layer" else [])] for _, t in flat]
        longest = max((len(product) for product in products), default=0)
        padded = [product + ["one"] * (longest - len(product)) for product in products]
        index = [[place[row] for row in product] for product in padded]
        self._index = torch.tensor(index, dtype=torch.long).view(len(flat), longest)
        self._factors = torch.stack([f * t.factor for f, t in flat]) if flat else torch.zeros(0, 1, dtype=torch.float64)

    def __call__(self, sizes: Sizes, gates: Tensor) -> Tensor:
        """The cost `[...]`, float64."""
        lines = [sizes, gates[..., None, :], torch.ones_like(gates)[..., None, :]]
        if len(self._capped):
            lines.insert(1, sizes[..., self._capped, :].minimum(self._limits))
        stacked = torch.cat(lines, dim=-2)
        total = self._factors
        for column in self._index.unbind(1):
            total = total * stacked[..., column, :]
        return total.expand(*gates.shape[:-1], *total.shape[-2:]).sum((-2, -1))


class Bill:
    """The costs of shapes cut from one model, in float64.

    context: tokens at which KV cache and FLOPs are counted, for one sequence.
    """

    def __init__(self, anatomy: Anatomy, context: int = 4096):
        self.anatomy, self.context = anatomy, context
        self._letters = letters_of(anatomy)
        sums: dict[str, _Sum] = defaultdict(lambda: _Sum(anatomy))
        for spec in anatomy.tensors.values():
            self._tensor(spec, sums)
        for layer, block in _blocks(anatomy):
            for kind, product, times in products(anatomy, block, attended_length(anatomy, layer, context)):
                for letters in _expanded(parse(f"({product})")):
                    factor, free, capped = self._split(layer, letters)
                    sums[kind].add(layer, factor * times, free, capped)
        self._tables = {
            metric: Table([(factor, sums[kind].terms()) for kind, factor in parts.items()], self._letters)
            for metric, parts in figures(item_bytes(anatomy.config)).items()
        }

    def __call__(self, metric: str, sizes: Sizes, gates: Tensor) -> Tensor:
        """One cost `[...]`, float64. Raises `TargetError` for a metric that is not a function of sizes."""
        if metric not in self._tables:
            raise TargetError(f"'{metric}' cannot be steered to: choose from {', '.join(METRICS)}")
        return self._tables[metric](sizes, gates)

    def whole(self) -> tuple[Sizes, Tensor]:
        """The parent's own sizes and gates."""
        return whole(self.anatomy)

    def _tensor(self, spec: TensorSpec, sums: Mapping[str, _Sum]) -> None:
        anatomy, sizes = self.anatomy, self.anatomy.sizes(spec.layer)
        experts = {
            axis.letter: float(getattr(anatomy.config, axis.active)) / math.prod(sizes[outer] for outer in axis.within)
            for axis in anatomy.axes.values()
            if axis.active and len(spec.layout) > 2 and axis.letter in spec.layout[0].letters
        }
        for kind in tensor_kinds(anatomy, spec):
            for letters in _expanded(spec.layout):
                used = None if kind == "params" else experts
                sums[kind].add(spec.layer, *self._split(spec.layer, letters, used))

    def _split(
        self, layer: int | None, letters: Letters, experts: Mapping[str, float] | None = None
    ) -> tuple[float, Letters, tuple[tuple[str, float], ...]]:
        """A product of letters as (factor of those that never shrink, those that may, those that are capped)."""
        experts = experts or {}
        sizes = self.anatomy.sizes(layer)
        fixed = [letter for letter in letters if letter not in self._letters]
        factor = math.prod(int(letter) if letter.isdigit() else sizes[letter] for letter in fixed)
        free = sorted(letter for letter in letters if letter in self._letters and letter not in experts)
        return float(factor), tuple(free), tuple((letter, experts[letter]) for letter in letters if letter in experts)


def letters_of(anatomy: Anatomy) -> list[str]:
    """The letters that may shrink, in the order of `Sizes`."""
    return sorted(axis.letter for axis in anatomy.axes.values())


def whole(anatomy: Anatomy) -> tuple[Sizes, Tensor]:
    """The parent's own sizes and gates."""
    layers = [anatomy.sizes(layer) for layer in range(anatomy.num_layers)]
    sizes = [[line.get(letter, 0) for line in layers] for letter in letters_of(anatomy)]
    return torch.tensor(sizes, dtype=torch.float64), torch.ones(len(layers), dtype=torch.float64)


class _Sum:
    """Monomials with equal letters, added up layer by layer."""

    def __init__(self, anatomy: Anatomy):
        self._layers = anatomy.num_layers
        self._factors: dict[tuple[str, Letters, tuple[tuple[str, float], ...]], Tensor] = {}

    def add(self, layer: int | None, factor: float, letters: Letters, capped: tuple[tuple[str, float], ...]) -> None:
        key = "model" if layer is None else "layer", letters, capped
        line = self._factors.setdefault(key, torch.zeros(self._layers, dtype=torch.float64))
        line[layer or 0] += factor

    def terms(self) -> list[Term]:
        return [Term(scope, letters, factor, capped) for (scope, letters, capped), factor in self._factors.items()]


def _expanded(layout: tuple[Dimension, ...]) -> Iterator[Letters]:
    """A product of sums of products, multiplied out: the letters of each monomial."""
    products: list[Letters] = [()]
    for dimension in layout:
        products = [before + part for before in products for part in dimension.parts]
    return iter(products)


def _blocks(anatomy: Anatomy) -> list[tuple[int, str]]:
    return sorted({(s.layer, s.block) for s in anatomy.tensors.values() if s.layer is not None and s.block is not None})
