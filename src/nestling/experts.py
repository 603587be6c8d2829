"""Routed experts, computed fast on CPUs: the implementation `nestling` of transformers' `ExpertsInterface`.

Tokens are sorted by expert once. Experts go two by two through batched products, each with the one whose load is next
to its own: two small products side by side keep two threads busier than one that is cut between them. The few rows
that the smaller load is short of have weight zero, so nothing is dropped and nothing is added. Some pairs at a time are
taken from the tokens through both projections and added up, so that the work needs little memory and that stays in the
caches. The backward pass is written by hand: of a call's activations it keeps the up projection's output alone, and the
gate's gradient follows from W^T dy and the activation, without the experts' outputs. On other devices the work is
handed over to transformers' `grouped_mm`. Knows transformers' expert modules, nothing of this package.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.integrations import moe as stock

NAME = "nestling"
MAPPED = 2**25  # bytes from which on glibc maps every block anew
AT_ONCE = 2**21  # bytes of the rows that are computed together


def register_experts() -> None:
    """Make `nestling` known to `set_experts_implementation`."""
    stock.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def use_fast_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model's experts be computed here, unless another implementation than the default was chosen."""
    if model._can_set_experts_implementation() and model.config._experts_implementation in (None, "grouped_mm"):
        model.set_experts_implementation(NAME)
    return model


def experts_forward(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each token's experts `[tokens, hidden]`.

    hidden: `[tokens, hidden]`. index: the experts of each token `[tokens, k]`; a number that is no expert counts as
    none. weights: of their outputs `[tokens, k]`. module: transformers' experts, whose parameters have the expert as
    first dimension.
    """
    experts = Experts.of(module)
    if experts is None or _elsewhere(hidden, experts):
        return stock.grouped_mm_experts_forward(module, hidden, index, weights)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, experts = hidden.to(dtype), experts.to(dtype)
    if len(hidden) == 1 and not torch.is_grad_enabled():
        return _one_token(experts, hidden, index, weights)
    if not index.numel():
        return torch.zeros_like(hidden)
    up, down, up_bias, down_bias = experts.up, experts.down, experts.up_bias, experts.down_bias
    return cast(Tensor, _Compute.apply(hidden, weights, index, up, down, up_bias, down_bias, experts.activate))


Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Experts:
    """The tensors of an experts module, as plain matrices.

    up: `[experts, in, inner]` (inner: gate and up together where there is a gate). down: `[experts, neurons, out]`.
    up_bias: `[experts, inner]`. down_bias: `[experts, out]`. activate: `[rows, inner]` -> `[rows, neurons]`; None for
    SiLU(gate) * up.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activate: Activation | None

    @classmethod
    def of(cls, module: Any) -> Experts | None:
        """Read a module; None when it computes more than two projections and an activation."""
        if getattr(module, "has_post_expert_norm", True):
            return None
        name = "gate_up_proj" if module.has_gate else "up_proj"
        up, down = getattr(module, name), module.down_proj
        if not module.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        up_bias = getattr(module, f"{name}_bias") if module.has_bias else None
        down_bias = module.down_proj_bias if module.has_bias else None
        return cls(up, down, up_bias, down_bias, _activation(module))

    def to(self, dtype: torch.dtype) -> Experts:
        up_bias, down_bias = (None if b is None else b.to(dtype) for b in (self.up_bias, self.down_bias))
        return Experts(self.up.to(dtype), self.down.to(dtype), up_bias, down_bias, self.activate)

    def apply(self, rows: Tensor, expert: int) -> Tensor:
        """What one expert's neurons are for its rows: `[rows, in]` -> `[rows, neurons]`, before the down projection."""
        inner = rows @ self.up[expert]
        if self.up_bias is not None:
            inner = inner + self.up_bias[expert]
        return activated(inner, self.activate)


def activated(inner: Tensor, activate: Activation | None) -> Tensor:
    """Neurons from the up projection's output: `[rows, inner]` -> `[rows, neurons]`."""
    if activate is not None:
        return activate(inner)
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _activation(module: Any) -> Activation | None:
    if not module.has_gate:
        return cast(Activation, module.act_fn)
    plain = type(module)._apply_gate is stock._default_apply_gate
    if plain and isinstance(module.act_fn, nn.SiLU | SiLUActivation):
        return None
    return cast(Activation, module._apply_gate)


def _elsewhere(hidden: Tensor, experts: Experts) -> bool:
    """Whether `grouped_mm` takes the work: while compiling, and off the CPU for widths that it allows."""
    if torch.compiler.is_compiling():
        return True
    widths = (experts.up.shape[2], experts.down.shape[1], hidden.shape[-1])
    return hidden.device.type != "cpu" and all(width * hidden.element_size() % 16 == 0 for width in widths)


def _one_token(experts: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Decoding: two matrix-vector products per expert, nothing to sort."""
    chosen = [(slot, expert) for slot, expert in enumerate(index[0].tolist()) if expert < len(experts.up)]
    inner = hidden.new_zeros(index.shape[1], experts.up.shape[2])
    for slot, expert in chosen:
        torch.mv(experts.up[expert].T, hidden[0], out=inner[slot])
        if experts.up_bias is not None:
            inner[slot] += experts.up_bias[expert]
    neurons = (activated(inner, experts.activate) * weights[0, :, None]).to(hidden.dtype)
    total = hidden.new_zeros(experts.down.shape[2])
    for slot, expert in chosen:
        total.addmv_(experts.down[expert].T, neurons[slot])
        if experts.down_bias is not None:
            total += (experts.down_bias[expert] * weights[0, slot]).to(hidden.dtype)
    return total[None]


# ---- the layout of rows


@dataclass(frozen=True)
class Plan:
    """Where each token's slots stand among the rows.

    pairs: experts that go together; one that no token chose is in none. sizes: their rows, in this order, half of them
    to each expert.
    """

    pairs: tuple[range, ...]
    sizes: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    def groups(self, most: int) -> Iterator[tuple[slice, Plan]]:
        """Pairs that follow one another, no more than `most` rows of them at once or one pair, and their rows."""
        first = row = 0
        while first < len(self.pairs):
            last, rows = first + 1, self.sizes[first]
            while last < len(self.pairs) and rows + self.sizes[last] <= most:
                rows, last = rows + self.sizes[last], last + 1
            yield slice(row, row + rows), Plan(self.pairs[first:last], self.sizes[first:last])
            first, row = last, row + rows

    def split(self, rows: Tensor) -> list[Tensor]:
        """The rows of each pair: `[rows, width]` -> `[experts, rows, width]`, views."""
        width = rows.shape[1]
        parts = zip(self.pairs, rows.split(self.sizes), strict=True)
        return [part.view(len(pair), len(part) // len(pair), width) for pair, part in parts]

    def choose(self, matrices: Tensor) -> list[Tensor]:
        """The matrices of each pair: `[experts, a, b]` -> `[2, a, b]`, views."""
        size, (far, *near), start = matrices.shape[1:], matrices.stride(), matrices.storage_offset()
        return [
            matrices.as_strided((len(pair), *size), (far * pair.step, *near), start + far * pair.start)
            for pair in self.pairs
        ]

    def product(self, rows: list[Tensor], matrices: Tensor, out: Tensor) -> Tensor:
        """Each row times its expert's matrix: `[rows, a]` pair by pair, `[experts, a, b]` -> `[rows, b]`, which is
        written to `out`."""
        for part, matrix, result in zip(rows, self.choose(matrices), self.split(out), strict=True):
            torch.bmm(part, matrix, out=result)
        return out

    def outer(self, left: list[Tensor], right: list[Tensor], out: Tensor) -> None:
        """Sums of outer products over each expert's rows: `[rows, a]`, `[rows, b]` -> `[experts, a, b]`, into `out`."""
        if out.stride(-1) != 1:
            left, right, out = right, left, out.transpose(1, 2)
        for a, b, result in zip(left, right, self.choose(out), strict=True):
            torch.bmm(a.transpose(1, 2), b, out=result)

    def sums(self, rows: Tensor, out: Tensor) -> None:
        """Sums over each expert's rows, in float32 within: `[rows, width]` -> `[experts, width]`, into `out`."""
        for pair, part in zip(self.pairs, self.split(rows), strict=True):
            out[pair.start : pair.stop : pair.step] = part.sum(1)


def plan(index: Tensor, experts: int) -> tuple[Plan, Tensor, Tensor]:
    """Lay out the slots of `index` `[tokens, k]`: the plan, each slot's row `[tokens, k]`, each row's token.

    A slot without an expert has the row after the last.
    """
    flat = index.reshape(-1)
    counts = torch.bincount(flat, minlength=experts)[:experts]
    layout, starts = _paired(counts.tolist())
    order = torch.argsort(flat, stable=True)[: int(counts.sum())]
    shift = torch.tensor(starts, device=flat.device) - (counts.cumsum(0) - counts)
    row_of = torch.arange(len(order), device=flat.device) + shift.repeat_interleave(counts)
    row_of_slot = torch.full_like(flat, layout.rows)
    row_of_slot[order] = row_of
    token_of_row = torch.zeros(layout.rows, dtype=flat.dtype, device=flat.device)
    token_of_row[row_of] = order // index.shape[1]
    return layout, row_of_slot.view(index.shape), token_of_row


def _paired(counts: list[int]) -> tuple[Plan, list[int]]:
    """The plan in which every expert goes with the one that comes next by load, and the first row of each expert."""
    by_load = sorted((i for i, count in enumerate(counts) if count), key=counts.__getitem__, reverse=True)
    pairs, sizes, starts, row = [], [], [0] * len(counts), 0
    for i in range(0, len(by_load), 2):
        members, most = sorted(by_load[i : i + 2]), counts[by_load[i]]
        pairs.append(range(members[0], members[-1] + 1, max(1, members[-1] - members[0])))
        sizes.append(most * len(members))
        starts[members[0]], starts[members[-1]] = row, row + most * (len(members) - 1)
        row += sizes[-1]
    return Plan(tuple(pairs), tuple(sizes)), starts


# ---- forward and backward


class _Compute(torch.autograd.Function):
    """y_t = sum_j w_tj W2_e act(W1_e x_t), e the j-th expert of token t."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weights: Tensor,
        index: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        activate: Activation | None,
    ) -> Tensor:
        layout, row_of_slot, token_of_row = plan(index, len(up))
        expert_of_row = None if up_bias is None else _spread(index, row_of_slot, layout)
        weight = _spread(weights, row_of_slot, layout)[:, None]
        inner = _empty(hidden, layout.rows, up.shape[2])
        total = _zeros(hidden, len(hidden), down.shape[2])
        for at, group in layout.groups(_rows_at_once(hidden)):
            rows = hidden.index_select(0, token_of_row[at])
            group.product(group.split(rows), up, inner[at])
            if up_bias is not None and expert_of_row is not None:
                inner[at] += up_bias.index_select(0, expert_of_row[at])
            neurons = _weighed(activated(inner[at], activate), weight[at], activate)
            # the sorted inputs are used up: their memory takes the outputs
            out = rows if rows.shape[1] == down.shape[2] else rows.new_empty(group.rows, down.shape[2])
            group.product(group.split(neurons), down, out)
            if down_bias is not None and expert_of_row is not None:
                out += (down_bias.index_select(0, expert_of_row[at]) * weight[at]).to(out.dtype)
            total.index_add_(0, token_of_row[at], out.to(total.dtype))
        biases = (up_bias, down_bias, expert_of_row)
        ctx.save_for_backward(hidden, weights, row_of_slot, token_of_row, inner, up, down, *biases)
        ctx.layout, ctx.activate = layout, activate
        return total.to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weights, row_of_slot, token_of_row, inner, up, down, *biases = ctx.saved_tensors
        down_bias, expert_of_row = biases[1:]
        layout: Plan = ctx.layout
        weight = _spread(weights, row_of_slot, layout)[:, None]
        needs = ctx.needs_input_grad
        of_hidden = _zeros(hidden, *hidden.shape) if needs[0] else None
        of_weight = grad.new_zeros(layout.rows + 1)
        of_up, of_down, of_up_bias, of_down_bias = (
            _gradient(tensor, layout) if needed else None
            for tensor, needed in zip((up, down, *biases), needs[3:7], strict=False)
        )
        for at, group in layout.groups(_rows_at_once(hidden)):
            rows = grad.index_select(0, token_of_row[at])
            parts, pulled = group.split(rows), rows.new_empty(group.rows, down.shape[1])
            group.product(parts, down.transpose(1, 2), pulled)
            neurons, pull = _pullback(inner[at], ctx.activate)
            of_weight[at] = (pulled * neurons).sum(-1)
            if down_bias is not None:
                of_weight[at] += (rows * down_bias.index_select(0, expert_of_row[at])).sum(-1)
            if of_down is not None:
                group.outer(group.split(_weighed(neurons, weight[at], ctx.activate)), parts, of_down)
            if of_down_bias is not None:
                group.sums((rows * weight[at]).to(rows.dtype), of_down_bias)
            of_inner = pull(pulled.mul_(weight[at]))
            if of_up_bias is not None:
                group.sums(of_inner, of_up_bias)
            pieces = group.split(of_inner)
            if of_up is not None:
                group.outer(group.split(hidden.index_select(0, token_of_row[at])), pieces, of_up)
            if of_hidden is not None:
                back = group.product(pieces, up.transpose(1, 2), hidden.new_empty(group.rows, hidden.shape[1]))
                of_hidden.index_add_(0, token_of_row[at], back.to(of_hidden.dtype))
        of_hidden = None if of_hidden is None else of_hidden.to(hidden.dtype)
        return of_hidden, of_weight[row_of_slot].to(weights.dtype), None, of_up, of_down, of_up_bias, of_down_bias, None


def _pullback(inner: Tensor, activate: Activation | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The neurons `[rows, neurons]`, and the function from their gradient, which it uses up, to that of `inner`.

    With SiLU the neurons lie where their gradient will be written, so they last until then.
    """
    if activate is not None:
        with torch.enable_grad():
            leaf = inner.detach().requires_grad_()
            neurons = activate(leaf)
        return neurons.detach(), lambda grad: torch.autograd.grad(neurons, leaf, grad)[0]
    gate, up = inner.chunk(2, dim=-1)
    opened, out = F.silu(gate), torch.empty_like(inner)
    of_gate, of_up = out.chunk(2, dim=-1)

    def pull(grad: Tensor) -> Tensor:
        torch.mul(grad, opened, out=of_up)
        torch.ops.aten.silu_backward(grad.mul_(up), gate, grad_input=of_gate)
        return out

    return torch.mul(opened, up, out=of_up), pull


def _weighed(neurons: Tensor, weight: Tensor, activate: Activation | None) -> Tensor:
    """Neurons times the weights of their rows: in place, unless an activation of the model's may still need them."""
    return neurons.mul_(weight) if activate is None else (neurons * weight).to(neurons.dtype)


def _empty(like: Tensor, *shape: int) -> Tensor:
    """New memory of a dtype and device; what is large is asked for in huge pages.

    The allocator maps blocks of that size anew each time, and to touch their small pages for the first time takes as
    long as the product that fills them.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < MAPPED or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=like.dtype).view(shape)


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """Where rows are added up: in float32 at least, since there are many of them to a token."""
    return like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _gradient(like: Tensor, layout: Plan) -> Tensor:
    """Memory for the gradient of what has the expert as first dimension; zero where an expert has no rows.

    It lies as the parameter does, so that autograd keeps it, unless that is a window on larger ones.
    """
    if like.dim() == 3 and (turned := like.transpose(1, 2)).is_contiguous() and not like.is_contiguous():
        return _gradient(turned, layout).transpose(1, 2)
    whole = sum(map(len, layout.pairs)) == len(like)
    return _empty(like, *like.shape) if whole else like.new_zeros(like.shape)


def _rows_at_once(hidden: Tensor) -> int:
    """Rows of a group: so few that what is computed of them stays in a core's cache."""
    return max(1, AT_ONCE // (hidden.shape[1] * hidden.element_size()))


def _spread(values: Tensor, row_of_slot: Tensor, layout: Plan) -> Tensor:
    """What slots have, for their rows: `[tokens, k]` -> `[rows]`, zero for padding."""
    spread = values.new_zeros(layout.rows + 1)
    spread[row_of_slot.reshape(-1)] = values.reshape(-1)
    return spread[:-1]
