"""Routed experts, computed fast on CPUs: the implementation `nestling` of transformers' `ExpertsInterface`.

Tokens are sorted by expert once. Experts go two by two through batched products, each with the one whose load is next
to its own: two small products side by side keep two threads busier than one that is cut between them. The few rows
that the smaller load is short of have weight zero, so nothing is dropped and nothing is added. The backward pass is
written by hand: of a call's activations it keeps the up projection's output alone, and the gate's gradient follows from
W^T dy and the activation, without the experts' outputs. On other devices the work is handed over to transformers'
`grouped_mm`. Knows transformers' expert modules, nothing of this package.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
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
    to each expert; then 1 if there is a row for slots without an expert (`spare`).
    """

    pairs: tuple[range, ...]
    sizes: list[int]
    spare: bool

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    def split(self, rows: Tensor) -> list[Tensor]:
        """The rows of each pair: `[rows, width]` -> `[experts, rows, width]`, views."""
        width = rows.shape[1]
        parts = zip(self.pairs, rows.split(self.sizes), strict=False)
        return [part.view(len(pair), len(part) // len(pair), width) for pair, part in parts]

    def choose(self, matrices: Tensor) -> list[Tensor]:
        """The matrices of each pair: `[experts, a, b]` -> `[2, a, b]`, views."""
        size, (far, *near), start = matrices.shape[1:], matrices.stride(), matrices.storage_offset()
        return [
            matrices.as_strided((len(pair), *size), (far * pair.step, *near), start + far * pair.start)
            for pair in self.pairs
        ]

    def product(self, rows: list[Tensor], matrices: Tensor, out: Tensor) -> list[Tensor]:
        """Each row times its expert's matrix: `[rows, a]` pair by pair, `[experts, a, b]` -> `[rows, b]`."""
        results = self.split(out)
        for part, matrix, result in zip(rows, self.choose(matrices), results, strict=True):
            torch.bmm(part, matrix, out=result)
        if self.spare:
            out[-1] = 0
        return results

    def outer(self, left: list[Tensor], right: list[Tensor], like: Tensor) -> Tensor:
        """Sums of outer products over each expert's rows: `[rows, a]`, `[rows, b]` -> `[experts, a, b]`.

        like: the matrices that it is the gradient of; the result lies in memory as they do, so that autograd keeps it,
        unless they are a window on larger ones.
        """
        turned = like.transpose(1, 2)
        if turned.is_contiguous() and not like.is_contiguous():
            return self.outer(right, left, turned).transpose(1, 2)
        whole = sum(map(len, self.pairs)) == len(like)
        out = _empty(like, *like.shape) if whole else like.new_zeros(like.shape)
        for a, b, result in zip(left, right, self.choose(out), strict=True):
            torch.bmm(a.transpose(1, 2), b, out=result)
        return out

    def sums(self, rows: Tensor, like: Tensor) -> Tensor:
        """Sums over each expert's rows, in float32 within: `[rows, width]` -> `[experts, width]`, as `like` is."""
        out = like.new_zeros(like.shape)
        for pair, part in zip(self.pairs, self.split(rows), strict=True):
            out[pair.start : pair.stop : pair.step] = part.sum(1)
        return out


def plan(index: Tensor, experts: int) -> tuple[Plan, Tensor, Tensor]:
    """Lay out the slots of `index` `[tokens, k]`: the plan, each slot's row `[tokens, k]`, each row's token."""
    flat = index.reshape(-1)
    counts = torch.bincount(flat, minlength=experts)[:experts]
    used = int(counts.sum())
    layout, starts = _paired(counts.tolist(), used < len(flat))
    order = torch.argsort(flat, stable=True)[:used]
    shift = torch.tensor(starts, device=flat.device) - (counts.cumsum(0) - counts)
    row_of = torch.arange(used, device=flat.device) + shift.repeat_interleave(counts)
    row_of_slot = torch.full_like(flat, layout.rows - 1)
    row_of_slot[order] = row_of
    token_of_row = torch.zeros(layout.rows, dtype=flat.dtype, device=flat.device)
    token_of_row[row_of] = order // index.shape[1]
    return layout, row_of_slot.view(index.shape), token_of_row


def _paired(counts: list[int], spare: bool) -> tuple[Plan, list[int]]:
    """The plan in which every expert goes with the one that comes next by load, and the first row of each expert."""
    by_load = sorted((i for i, count in enumerate(counts) if count), key=counts.__getitem__, reverse=True)
    pairs, sizes, starts, row = [], [], [0] * len(counts), 0
    for i in range(0, len(by_load), 2):
        members, most = sorted(by_load[i : i + 2]), counts[by_load[i]]
        pairs.append(range(members[0], members[-1] + 1, max(1, members[-1] - members[0])))
        sizes.append(most * len(members))
        starts[members[0]], starts[members[-1]] = row, row + most * (len(members) - 1)
        row += sizes[-1]
    return Plan(tuple(pairs), sizes + [1] * spare, spare), starts


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
        rows = hidden.index_select(0, token_of_row)
        inner = _empty(hidden, layout.rows, up.shape[2])
        layout.product(layout.split(rows), up, inner)
        expert_of_row = _expert_of_row(layout, row_of_slot, index, len(up)) if up_bias is not None else None
        if up_bias is not None and expert_of_row is not None:
            inner += up_bias.index_select(0, expert_of_row)
        weight = _spread(weights, row_of_slot, layout)
        neurons = _weighed(activated(inner, activate), weight, activate)
        # the sorted inputs are used up: their memory takes the outputs
        out = rows if rows.shape[1] == down.shape[2] else hidden.new_empty(layout.rows, down.shape[2])
        layout.product(layout.split(neurons), down, out)
        if down_bias is not None and expert_of_row is not None:
            out += (down_bias.index_select(0, expert_of_row) * weight).to(out.dtype)
        biases = (up_bias, down_bias, expert_of_row)
        ctx.save_for_backward(hidden, weights, row_of_slot, token_of_row, inner, up, down, *biases)
        ctx.layout, ctx.activate = layout, activate
        return _gather_sum(row_of_slot, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weights, row_of_slot, token_of_row, inner, up, down, *biases = ctx.saved_tensors
        up_bias, down_bias, expert_of_row = biases
        layout: Plan = ctx.layout
        weight = _spread(weights, row_of_slot, layout)
        rows = grad.index_select(0, token_of_row)
        parts, pulled = layout.split(rows), hidden.new_empty(layout.rows, down.shape[1])
        layout.product(parts, down.transpose(1, 2), pulled)
        neurons, pull = _pullback(inner, ctx.activate)
        of_weight = (pulled * neurons).sum(-1)
        if down_bias is not None:
            of_weight = of_weight + (rows * down_bias.index_select(0, expert_of_row)).sum(-1)
        of_down = of_up = of_up_bias = of_down_bias = of_hidden = None
        if ctx.needs_input_grad[4]:
            of_down = layout.outer(layout.split(_weighed(neurons, weight, ctx.activate)), parts, down)
        if ctx.needs_input_grad[6]:
            of_down_bias = layout.sums((rows * weight).to(rows.dtype), down_bias)
        of_inner = pull(pulled.mul_(weight))
        if ctx.needs_input_grad[5]:
            of_up_bias = layout.sums(of_inner, up_bias)
        rows = torch.index_select(hidden, 0, token_of_row, out=_reused(rows, hidden))
        pieces = layout.split(of_inner)
        if ctx.needs_input_grad[3]:
            of_up = layout.outer(layout.split(rows), pieces, up)
        if ctx.needs_input_grad[0]:
            layout.product(pieces, up.transpose(1, 2), rows)
            of_hidden = _gather_sum(row_of_slot, rows)
        of_weights = of_weight[row_of_slot].to(weights.dtype) * (row_of_slot != layout.rows - 1 if layout.spare else 1)
        return of_hidden, of_weights, None, of_up, of_down, of_up_bias, of_down_bias, None


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


def _gather_sum(row_of_slot: Tensor, rows: Tensor) -> Tensor:
    """Each token's rows added up: `[tokens, k]`, `[rows, width]` -> `[tokens, width]`, without a copy of them."""
    return F.embedding_bag(row_of_slot, rows, mode="sum")


def _spread(weights: Tensor, row_of_slot: Tensor, layout: Plan) -> Tensor:
    """The weight of each row `[rows, 1]`, zero for padding."""
    spread = weights.new_zeros(layout.rows)
    spread[row_of_slot.reshape(-1)] = weights.reshape(-1)
    if layout.spare:
        spread[-1] = 0
    return spread[:, None]


def _expert_of_row(layout: Plan, row_of_slot: Tensor, index: Tensor, experts: int) -> Tensor:
    expert_of_row = torch.zeros(layout.rows, dtype=index.dtype, device=index.device)
    expert_of_row[row_of_slot.reshape(-1)] = index.reshape(-1).clamp_max(experts - 1)
    return expert_of_row


def _reused(rows: Tensor, hidden: Tensor) -> Tensor:
    """The memory of `rows` where it fits rows of `hidden`, else new."""
    return rows if rows.shape[1] == hidden.shape[1] else hidden.new_empty(len(rows), hidden.shape[1])
