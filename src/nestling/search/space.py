"""The shapes that a search may name: a grid of sizes for every axis, with one axis that fills the budget.

Sizes are those that hardware likes. For any sizes of the other axes the largest `fill` size (FFN neurons) that keeps
all limits is taken, so every candidate uses its budget. In a model whose layers differ a size means "at most so much
in each layer". Nothing is run here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from nestling.anatomy import Anatomy, Axis
from nestling.budget import Budget
from nestling.cost import Cost, cost_of_form
from nestling.errors import ShapeError
from nestling.ranking import Ranking
from nestling.shape import Form, Shape, Value, allows, fit
from nestling.surgery.choose import kept_layers

Latency = Callable[[Form], float]
Sizes = tuple[int, ...]
Priced = tuple[Shape, Cost]
ENUMERABLE = 4_000  # combinations above which a space is searched rather than gone through


@dataclass(frozen=True)
class Pricing:
    """How shapes of one model are priced.

    context, batch: at which caches and FLOPs are counted. ranking: says which layers stay, where layers differ in
    cost; the first ones unless given. latency: milliseconds of a form; not known unless given.
    """

    anatomy: Anatomy
    context: int = 4096
    batch: int = 1
    ranking: Ranking | None = None
    latency: Latency | None = None

    def form(self, shape: Mapping[str, Value], check_config: bool = True) -> Form:
        return fit(self.anatomy, shape, self.layers(shape), check_config)

    def cost(self, shape: Mapping[str, Value], check_config: bool = True) -> Cost:
        """What a shape costs. Raises `ShapeError` for one that cannot be cut."""
        form = self.form(shape, check_config)
        found = cost_of_form(self.anatomy, form, self.context, self.batch)
        return dataclasses.replace(found, latency_ms=self.latency(form)) if self.latency else found

    def layers(self, shape: Mapping[str, Value]) -> list[int] | None:
        """The parent's layers that a shape keeps; None for all of them."""
        depth = shape.get(self.anatomy.depth_field)
        if depth is None:
            return None
        if self.ranking is not None:
            return kept_layers(self.anatomy, self.ranking, depth)
        return list(range(depth)) if isinstance(depth, int) and 1 <= depth <= self.anatomy.num_layers else None

    def capped(self, sizes: Mapping[str, int]) -> Shape:
        """The shape with at most these sizes in each layer; sizes that cut nothing are left out."""
        anatomy = self.anatomy
        layers = self.layers(sizes)
        kept = list(range(anatomy.num_layers)) if layers is None else layers
        shape: dict[str, Value] = {}
        for name, size in sizes.items():
            if name == anatomy.depth_field:
                if size != anatomy.num_layers:
                    shape[name] = size
                continue
            axis = anatomy.axis(name)
            have = [anatomy.value(axis, layer) for layer in ([0] if axis.scope == "model" else kept)]
            values = [min(size, value) for value in have]
            if values != have:
                shape[name] = values[0] if len(set(values)) == 1 else tuple(values)
        return Shape(**shape)


@dataclass
class Space:
    """All sizes of the free axes down to `floor` times the parent's, within a budget.

    axes: config fields that may change, all unless given. options: field -> its sizes, largest first, without the
    filling axis. fill, fill_sizes: that axis and its sizes.
    """

    pricing: Pricing
    budget: Budget
    axes: tuple[str, ...] = ()
    floor: float = 0.5
    options: dict[str, list[int]] = field(init=False)
    fill: str | None = field(init=False)
    fill_sizes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        anatomy = self.pricing.anatomy
        free = self.axes or anatomy.fields
        for name in self.axes:
            if name != anatomy.depth_field:
                anatomy.axis(name)
        self.parent = self.pricing.cost({}, check_config=False)
        self.budget.check(self.parent)
        self.fill = next((name for name in fillers(anatomy) if name in free), None)
        self.options = {name: grid(anatomy, axis, self.floor) for name, axis in anatomy.axes.items() if name in free}
        self.fill_sizes = grid(anatomy, anatomy.axes[self.fill], self.floor / 2) if self.fill else []
        if self.fill:
            del self.options[self.fill]
        if anatomy.depth_field in free:
            lowest = max(1, round(anatomy.num_layers * max(self.floor, 0.1)))
            self.options[anatomy.depth_field] = list(range(anatomy.num_layers, lowest - 1, -1))
        self._allowed: dict[str, bool] = {}
        self._found: dict[Sizes, Priced | None] = {}

    def __len__(self) -> int:
        """Combinations of the axes that do not fill."""
        return math.prod(len(sizes) for sizes in self.options.values())

    @property
    def enumerable(self) -> bool:
        """Whether all combinations can be gone through."""
        return len(self) <= ENUMERABLE

    def combinations(self) -> Iterator[Sizes]:
        return product(*self.options.values())

    def reachable(self) -> bool:
        """Whether the smallest size of everything keeps the budget; if not, no combination does."""
        smallest = {name: sizes[-1] for name, sizes in self.options.items()}
        smallest |= {self.fill: self.fill_sizes[-1]} if self.fill else {}
        try:
            price = self.pricing.cost(self.pricing.capped(smallest), check_config=False)
        except ShapeError:  # the smallest sizes do not go together: each combination must be looked at
            return True
        return self.budget.met_by(price, self.parent)

    def largest(self, sizes: Sizes) -> Priced | None:
        """The shape of these sizes with the largest filling one that keeps the budget.

        None if none does, or if the architecture does not take the sizes.
        """
        if sizes not in self._found:
            self._found[sizes] = self._largest(sizes)
        return self._found[sizes]

    def _largest(self, sizes: Sizes) -> Priced | None:
        rest = dict(zip(self.options, sizes, strict=True))
        if not self._takes(rest):
            return None

        def at(index: int) -> Priced:
            shape = self.pricing.capped(rest | ({self.fill: self.fill_sizes[index]} if self.fill else {}))
            return shape, self.pricing.cost(shape, check_config=False)

        low, high = 0, max(0, len(self.fill_sizes) - 1)
        if not self.budget.met_by(at(high)[1], self.parent):
            return None
        while low < high:  # sizes fall with the index: find the first that fits
            middle = (low + high) // 2
            low, high = (low, middle) if self.budget.met_by(at(middle)[1], self.parent) else (middle + 1, high)
        return at(low)

    def _takes(self, rest: Mapping[str, int]) -> bool:
        """Whether the architecture takes the sizes; the depth has no part in that where all layers are alike."""
        shape = self.pricing.capped(rest)
        uniform = {name: value for name, value in shape.items() if isinstance(value, int)}
        if len(uniform) == len(shape):
            shape = Shape(**{name: v for name, v in uniform.items() if name != self.pricing.anatomy.depth_field})
        key = repr(shape)
        if key not in self._allowed:
            self._allowed[key] = allowed(self.pricing, shape)
        return self._allowed[key]


def grid(anatomy: Anatomy, axis: Axis, floor: float) -> list[int]:
    """Sizes of an axis from the parent's largest down to `floor` times it.

    Multiples of the largest power of two that leaves a choice; every size for heads and groups.
    """
    pricing = Pricing(anatomy)
    full = max(anatomy.value(axis, layer) for layer in range(anatomy.num_layers))
    lowest = max(1, round(full * floor))
    if axis.field not in fillers(anatomy) and axis.scope == "layer":
        # The config class may refuse a number of heads at one width and take it at another, so it is asked later.
        every = range(full, lowest - 1, -1)
        return [n for n in every if n == full or allowed(pricing, pricing.capped({axis.field: n}), check_config=False)]
    for step in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        sizes = [size for size in range(full - full % step, lowest - 1, -step) if size > 0]
        enough = 9 if axis.scope == "layer" else 5
        if step > 1 and sum(size >= full / 2 for size in sizes) < enough:
            continue  # asking the config class is slow, and can only make them fewer
        sizes = [n for n in sizes if n == full or allowed(pricing, pricing.capped({axis.field: n}))]
        if step == 1 or sum(size >= full / 2 for size in sizes) >= enough:
            return sizes if full in sizes else [full, *sizes]
    return [full]


def fillers(anatomy: Anatomy) -> list[str]:
    """Axes of one layer without groups and without query heads inside them, widest first: FFN neurons."""
    outer = {letter for axis in anatomy.axes.values() for letter in axis.within}
    lone = [
        axis for axis in anatomy.axes.values() if axis.scope == "layer" and not axis.within and axis.letter not in outer
    ]
    return [axis.field for axis in sorted(lone, key=lambda axis: -_widest(anatomy, axis))]


def allowed(pricing: Pricing, shape: Mapping[str, Value], check_config: bool = True) -> bool:
    """Whether a shape can be cut, and, unless that is left out, whether the architecture's config class takes it."""
    try:
        if check_config:
            return allows(pricing.anatomy, shape, pricing.layers(shape))
        pricing.form(shape, check_config=False)
    except ShapeError:
        return False
    return True


def nominal(value: Value) -> int:
    """The one size by which a field's value is known: the largest, where layers differ."""
    return value if isinstance(value, int) else max(value)


def _widest(anatomy: Anatomy, axis: Axis) -> int:
    return max(anatomy.value(axis, layer) for layer in range(anatomy.num_layers))


def full_size(anatomy: Anatomy, name: str) -> int:
    """The parent's size of a field, the largest where layers differ."""
    return anatomy.num_layers if name == anatomy.depth_field else _widest(anatomy, anatomy.axis(name))


def distinct(found: Sequence[Priced], pricing: Pricing) -> list[Priced]:
    """Shapes that mean the same only once, largest first."""
    unique = {str(pricing.form(shape, check_config=False).values): (shape, cost) for shape, cost in found}
    return sorted(unique.values(), key=lambda item: -item[1].params)
