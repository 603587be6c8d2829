"""What a shape costs: parameters, bytes and FLOPs as functions of (anatomy, shape), without building a model.

Every figure is a sum over the declared layouts, so an architecture's declaration is all that this file needs.
Formulas: parameters are counted once where embeddings are tied; FLOPs per token are 2 per weight of every matrix a
token meets (the output matrix counts, the embedding look-up does not) plus 4 per query channel and attended
position (scores and values) plus 5 per element of a recurrent state (decay, input, output), for one new token after
`context` others. A recurrent state is float32 in any model, as transformers keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
    """As `cost`, for a form that has been fitted already."""
    item = item_bytes(anatomy.config, dtype)
    architecture = anatomy.architecture
    params, active, matmul = 0, 0.0, 0.0
    for spec, sizes in _tensors(anatomy, form):
        tied_copy = anatomy.tied and spec.name == architecture.tied
        count = math.prod(dimension.size(sizes) for dimension in spec.layout)
        used = count * share_used(anatomy, spec, sizes)
        params += 0 if tied_copy else count
        active += 0 if tied_copy else used
        matmul += used if len(spec.layout) > 1 and spec.name != architecture.lookup else 0
    blocks = list(_blocks(anatomy, form))
    attended = [(sizes, block, attended_length(anatomy, layer, context)) for layer, sizes, block in blocks]
    kv = sum(length * products_size(architecture.kv_cache.get(block, ()), sizes) for sizes, block, length in attended)
    attention = sum(
        length * products_size(_one(architecture.attends.get(block)), sizes) for sizes, block, length in attended
    )
    state = sum(products_size(architecture.state.get(block, ()), sizes) for _, sizes, block in blocks)
    recent = sum(products_size(architecture.recent.get(block, ()), sizes) for _, sizes, block in blocks)
    return Cost(
        params=params,
        active_params=round(active),
        weight_bytes=params * item,
        kv_bytes=kv * batch * item,
        state_bytes=(STATE_BYTES * state + item * recent) * batch,
        flops_per_token=round(2 * matmul + 4 * attention + 5 * state),
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


def _tensors(anatomy: Anatomy, form: Form) -> Iterator[tuple[TensorSpec, dict[str, int]]]:
    place = {layer: position for position, layer in enumerate(form.layers)}
    routed = anatomy.architecture.routed
    for spec in anatomy.tensors.values():
        if routed is not None and routed.bias and spec.name.endswith(f".{routed.bias}"):
            continue  # a buffer: set by the loads of the experts, not learned
        if spec.layer is None:
            yield spec, form.sizes[0]
        elif spec.layer in place:
            yield spec, form.sizes[place[spec.layer]]


def _blocks(anatomy: Anatomy, form: Form) -> Iterator[tuple[int, dict[str, int], str]]:
    blocks: dict[int, set[str]] = {}
    for spec in anatomy.tensors.values():
        if spec.layer is not None and spec.block is not None:
            blocks.setdefault(spec.layer, set()).add(spec.block)
    for layer, sizes in zip(form.layers, form.sizes, strict=False):  # no layers, and the sizes of the model's own
        for block in sorted(blocks[layer]):
            yield layer, sizes, block


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


def _one(product: str | None) -> tuple[str, ...]:
    return (product,) if product else ()


def item_bytes(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> int:
    """Bytes of one number in `dtype`, the model's own unless given."""
    own = getattr(config, "dtype", None)
    own = getattr(torch, own) if isinstance(own, str) else own
    return torch.empty((), dtype=dtype or own or torch.float32).element_size()
