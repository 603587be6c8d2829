"""What a shape costs: parameters, bytes and FLOPs as functions of (anatomy, shape), without building a model.

Every figure is a sum over the declared layouts, so an architecture's declaration is all that this file needs.
Formulas: parameters are counted once where embeddings are tied; FLOPs per token are 2 per weight of every matrix a
token meets (the output matrix counts, the embedding look-up does not) plus 4 per query channel and attended
position (scores and values) plus 5 per element of a recurrent state (decay, input, output), for one new token after
`context` others. A recurrent state is float32 in any model, as transformers keeps it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from nestling.anatomy import Anatomy, TensorSpec
from nestling.anatomy.notation import parse
from nestling.shape import Form, fit

STATE_BYTES = 4  # of one element of a recurrent state
ADDS_UP = ("params", "active_params", "weight_bytes", "kv_bytes", "state_bytes", "flops_per_token")


@dataclass(frozen=True)
class Cost:
    """What one shape costs.

    params, active_params: all weights, and those one token uses. weight_bytes: in the model's dtype.
    kv_bytes, state_bytes: for `batch` sequences of `context` tokens; state is what does not grow with them.
    flops_per_token: for one token after `context` others.
    latency_ms: for one step of `batch` tokens on this machine, if it was measured (see `nestling.search.latency`).
    """

    params: int
    active_params: int
    weight_bytes: int
    kv_bytes: int
    state_bytes: int
    flops_per_token: int
    context: int
    batch: int
    latency_ms: float | None = None

    @property
    def memory_bytes(self) -> int:
        """Weights, KV cache and state together."""
        return self.weight_bytes + self.kv_bytes + self.state_bytes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"memory_bytes": self.memory_bytes}


def cost(
    model: PreTrainedModel | PreTrainedConfig | Anatomy,
    shape: Mapping[str, Any] | None = None,
    context: int = 4096,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    layers: Sequence[int] | None = None,
) -> Cost:
    """The cost of a model, or of a shape cut from it.

    shape: None is the model as it is. context: tokens per sequence. batch: sequences. dtype: of weights and cache, the
    model's own unless given. layers: those of the model that a shape with fewer keeps, the first ones unless given; it
    matters where layers differ in kind. Raises `ShapeError` when the shape cannot be cut from the model.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    return cost_of_form(anatomy, fit(anatomy, shape or {}, layers), context, batch, dtype)


def cost_of_form(
    anatomy: Anatomy, form: Form, context: int = 4096, batch: int = 1, dtype: torch.dtype | None = None
) -> Cost:
    """As `cost`, for a form that has been fitted already. Layers that are alike are counted once."""
    item = item_bytes(anatomy.config, dtype)
    total = _Counts.of(anatomy, anatomy.own, form.sizes[0], 0)
    known: dict[Any, _Counts] = {}
    for layer, sizes in zip(form.layers, form.sizes, strict=False):  # without layers, the sizes of one remain
        length = attended_length(anatomy, layer, context)
        copies = anatomy.sharing.is_copy(layer, form.layers)
        key = (anatomy.alike[layer], length, copies, *sizes.items())
        if key not in known:
            there = [spec for spec in anatomy.of_layer[layer] if spec.use is None or spec.use in form.layers]
            known[key] = _Counts.of(anatomy, there, sizes, length, copies)
        total = total + known[key]
    figure = {name: total.sum(terms) for name, terms in figures(item).items()}
    return Cost(
        params=round(figure["params"]),
        active_params=round(figure["active_params"]),
        weight_bytes=round(figure["weight_bytes"]),
        kv_bytes=round(figure["kv_bytes"]) * batch,
        state_bytes=round(figure["state_bytes"]) * batch,
        flops_per_token=round(figure["flops_per_token"]),
        context=context,
        batch=batch,
    )


def cost_by_kind(
    anatomy: Anatomy, form: Form, context: int = 4096, batch: int = 1, dtype: torch.dtype | None = None
) -> dict[str, tuple[int, Cost]]:
    """For each kind of layer how many there are, and what they cost together, without embeddings and final norm.

    A kind is named after the blocks that a layer is made of, norms left out: `mamba`, `attention+mlp`.
    """
    bare = cost_of_form(anatomy, replace(form, layers=(), sizes=form.sizes[:1]), context, batch, dtype)
    kinds: dict[str, list[int]] = {}
    for position, layer in enumerate(form.layers):
        kinds.setdefault(anatomy.kind(layer), []).append(position)
    found = {}
    for kind, positions in kinds.items():
        part = replace(
            form, layers=tuple(form.layers[i] for i in positions), sizes=tuple(form.sizes[i] for i in positions)
        )
        whole = cost_of_form(anatomy, part, context, batch, dtype)
        own = {name: getattr(whole, name) - getattr(bare, name) for name in ADDS_UP}
        found[kind] = (len(positions), replace(whole, **own))
    return found


# ---- what counts as what


def figures(item: int) -> dict[str, dict[str, float]]:
    """Each figure as a sum over kinds of numbers, those that `tensor_kinds` and `products` name, for one sequence.

    item: bytes of a number in the model's dtype.
    """
    state: dict[str, float] = {"state": STATE_BYTES, "recent": item}
    return {
        "params": {"params": 1},
        "active_params": {"active": 1},
        "weight_bytes": {"params": item},
        "kv_bytes": {"kv": item},
        "state_bytes": state,
        "memory_bytes": {"params": item, "kv": item, **state},
        "flops_per_token": {"matmul": 2, "attention": 4, "state": 5},
    }


def tensor_kinds(anatomy: Anatomy, spec: TensorSpec, shared_copy: bool = False) -> tuple[str, ...]:
    """What the elements of a tensor count as: `params`, and as far as one token uses them `active` and `matmul`.

    shared_copy: whether another layer has the same tensor already.
    """
    made = anatomy.architecture
    if made.routed is not None and made.routed.bias and spec.name.endswith(f".{made.routed.bias}"):
        return ()  # a buffer: set by the loads of the experts, not learned
    same = shared_copy or (anatomy.tied and spec.name == made.tied)
    at_work = len(spec.layout) > 1 and spec.name != made.lookup and spec.computes
    return (*(() if same else ("params", "active")), *(("matmul",) if at_work else ()))


def products(anatomy: Anatomy, block: str, length: int) -> Iterator[tuple[str, str, int]]:
    """What a block keeps and attends to: its kind, a product of letters, and how often, for `length` positions."""
    made = anatomy.architecture
    attends = made.attends.get(block)
    yield from (("kv", product, length) for product in made.kv_cache.get(block, ()))
    yield from (("attention", product, length) for product in ([attends] if attends else []))
    yield from (("state", product, 1) for product in made.state.get(block, ()))
    yield from (("recent", product, 1) for product in made.recent.get(block, ()))


@dataclass(frozen=True)
class _Counts:
    """What some tensors, and the blocks that they make up, add to each kind of numbers; see `figures`."""

    params: int = 0
    active: float = 0.0
    matmul: float = 0.0
    kv: int = 0
    attention: int = 0
    state: int = 0
    recent: int = 0

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def sum(self, terms: Mapping[str, float]) -> float:
        return sum(factor * getattr(self, kind) for kind, factor in terms.items())

    @classmethod
    def of(
        cls,
        anatomy: Anatomy,
        specs: Iterable[TensorSpec],
        sizes: Mapping[str, int],
        length: int,
        copies: bool = False,
    ) -> _Counts:
        """copies: whether another layer has the weights of the shared block already."""
        found: dict[str, float] = defaultdict(int)
        for spec in specs:
            count = math.prod(dimension.size(sizes) for dimension in spec.layout)
            used = count * share_used(anatomy, spec, sizes)
            for kind in tensor_kinds(anatomy, spec, copies and spec.block == anatomy.sharing.block):
                found[kind] += count if kind == "params" else used
        for block in {spec.block for spec in specs if spec.layer is not None and spec.block is not None}:
            for kind, product, times in products(anatomy, block, length):
                found[kind] += times * products_size((product,), sizes)
        return cls(**found)  # type: ignore[arg-type]


def share_used(anatomy: Anatomy, spec: TensorSpec, sizes: Mapping[str, int]) -> float:
    """The part of a tensor that one token uses: experts are chosen, everything else is used whole."""
    share = 1.0
    for axis in anatomy.axes.values():
        if axis.active and len(spec.layout) > 2 and axis.letter in spec.layout[0].letters:
            units = math.prod(sizes[letter] for letter in (*axis.within, axis.letter))
            share *= min(1.0, getattr(anatomy.config, axis.active) / units)
    return share


def attended_length(anatomy: Anatomy, layer: int, context: int) -> int:
    """Positions that a layer's attention keeps: all, or a window."""
    config = anatomy.config
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and kinds[layer] != "sliding_attention"):
        return context
    return min(context, window)


def products_size(products: tuple[str, ...], sizes: Mapping[str, int]) -> int:
    """The sum of products of letters, such as `kv d` and `kv d`, at these sizes."""
    return sum(parse(f"({product})")[0].size(sizes) for product in products)


def item_bytes(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> int:
    """Bytes of one number in `dtype`, the model's own unless given."""
    own = getattr(config, "dtype", None)
    own = getattr(torch, own) if isinstance(own, str) else own
    return torch.empty((), dtype=dtype or own or torch.float32).element_size()
