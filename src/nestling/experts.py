"""Routed experts, computed fast on CPUs: the implementation `nestling` of transformers' `ExpertsInterface`.

Tokens are sorted by expert once. What every expert has of them, up to a common number of rows, goes through one batched
product; the few rows above it go expert by expert. Padding rows have weight zero, so nothing is dropped and nothing is
added. The backward pass is written by hand: of a call's activations it keeps the up projection's output alone, and the
gate's gradient follows from W^T dy and the activation, without the experts' outputs. On other devices the work is
handed over to transformers' `grouped_mm`. Knows transformers' expert modules, nothing of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.integrations import moe as stock

NAME = "nestling"
# Rows whose time the call of one more matrix product takes.
EXTRA_ROWS = 16


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
    return F.silu(gate) * up


def _activation(module: Any) -> Activation | None:
    if not module.has_gate:
        return cast(Activation, module.act_fn)
    plain = type(module)._apply_gate is stock._default_apply_gate
    if plain and isinstance(module.act_fn, nn.SiLU):
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

    Rows are `capacity` for each expert, padded, then those above it, expert by expert as in `rest` (expert, first row,
    end), then one for slots without an expert if `spare`.
    """

    experts: int
    capacity: int
    rest: tuple[tuple[int, int, int], ...]
    rows: int
    spare: bool

    @property
    def batched(self) -> int:
        return self.experts * self.capacity


def plan(index: Tensor, experts: int) -> tuple[Plan, Tensor, Tensor]:
    """Lay out the slots of `index` `[tokens, k]`: the plan, each slot's row `[tokens, k]`, each row's token."""
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)[:experts]
    numbers = counts.tolist()
    capacity, used = _capacity(numbers), sum(numbers)
    rest, row = [], experts * capacity
    for expert, count in enumerate(numbers):
        if count > capacity:
            rest.append((expert, row, row + count - capacity))
            row += count - capacity
    layout = Plan(experts, capacity, tuple(rest), row + (used < len(flat)), used < len(flat))
    expert_of, slots = flat[order[:used]], torch.arange(used, device=flat.device)
    place = slots - (counts.cumsum(0) - counts)[expert_of]
    above = (counts - capacity).clamp_min(0)
    row_of = layout.batched + (above.cumsum(0) - above)[expert_of] + place - capacity
    row_of = torch.where(place < capacity, expert_of * capacity + place, row_of)
    row_of_slot = torch.full_like(flat, layout.rows - 1)
    row_of_slot[order[:used]] = row_of
    token_of_row = torch.zeros(layout.rows, dtype=flat.dtype, device=flat.device)
    token_of_row[row_of] = order[:used] // index.shape[1]
    return layout, row_of_slot.view(index.shape), token_of_row


def _capacity(counts: list[int]) -> int:
    """The rows per expert of the batched product that cost least, padding and single products taken together."""
    ordered = sorted(counts)
    above, left = sum(ordered), sum(count > 0 for count in ordered)
    best, best_cost, before = 0, above + EXTRA_ROWS * left, 0
    for position, count in enumerate(ordered):
        if count == before:
            continue
        above -= (count - before) * (len(ordered) - position)
        before = count
        larger = sum(other > count for other in ordered[position:])
        cost = len(ordered) * count + above + EXTRA_ROWS * (larger + 1)
        if cost < best_cost:
            best, best_cost = count, cost
    return best


def _product(layout: Plan, rows: Tensor, matrices: Tensor, out: Tensor) -> Tensor:
    """Each row times its expert's matrix: `[rows, a]`, `[experts, a, b]` -> `[rows, b]`."""
    if layout.capacity:
        shape = (layout.experts, layout.capacity, -1)
        torch.bmm(rows[: layout.batched].view(shape), matrices, out=out[: layout.batched].view(shape))
    for expert, first, end in layout.rest:
        torch.mm(rows[first:end], matrices[expert], out=out[first:end])
    if layout.spare:
        out[-1] = 0
    return out


def _outer(layout: Plan, left: Tensor, right: Tensor) -> Tensor:
    """Sums of outer products over each expert's rows: `[rows, a]`, `[rows, b]` -> `[experts, a, b]`."""
    out = left.new_empty(layout.experts, left.shape[1], right.shape[1])
    if layout.capacity:
        shape = (layout.experts, layout.capacity, -1)
        torch.bmm(left[: layout.batched].view(shape).transpose(1, 2), right[: layout.batched].view(shape), out=out)
    else:
        out.zero_()
    for expert, first, end in layout.rest:
        out[expert].addmm_(left[first:end].T, right[first:end])
    return out


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
        inner = _product(layout, rows, up, hidden.new_empty(layout.rows, up.shape[2]))
        expert_of_row = _expert_of_row(layout, row_of_slot, index) if up_bias is not None else None
        if up_bias is not None and expert_of_row is not None:
            inner += up_bias.index_select(0, expert_of_row)
        weight = _spread(weights, row_of_slot, layout)
        neurons = (activated(inner, activate) * weight).to(hidden.dtype)
        if rows.shape[1] != down.shape[2]:
            rows = hidden.new_empty(layout.rows, down.shape[2])
        out = _product(layout, neurons, down, rows)  # the sorted inputs are used up: their memory takes the outputs
        if down_bias is not None and expert_of_row is not None:
            out += (down_bias.index_select(0, expert_of_row) * weight).to(out.dtype)
        ctx.save_for_backward(hidden, weights, row_of_slot, token_of_row, inner, up, down, down_bias, expert_of_row)
        ctx.layout, ctx.activate = layout, activate
        return _gather_sum(row_of_slot, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weights, row_of_slot, token_of_row, inner, up, down, down_bias, expert_of_row = ctx.saved_tensors
        layout: Plan = ctx.layout
        weight = _spread(weights, row_of_slot, layout)
        rows = grad.index_select(0, token_of_row)
        pulled = _product(layout, rows, down.transpose(1, 2), hidden.new_empty(layout.rows, down.shape[1]))
        neurons, pull = _pullback(inner, ctx.activate)
        of_weight = (pulled * neurons).sum(-1)
        if down_bias is not None:
            of_weight = of_weight + (rows * down_bias.index_select(0, expert_of_row)).sum(-1)
        of_down = of_up = of_up_bias = of_down_bias = None
        if ctx.needs_input_grad[4]:
            of_down = _outer(layout, (neurons * weight).to(rows.dtype), rows)
        if ctx.needs_input_grad[6]:
            of_down_bias = _by_expert(rows * weight, expert_of_row, len(up))
        of_inner = pull((pulled * weight).to(inner.dtype))
        if ctx.needs_input_grad[5]:
            of_up_bias = _by_expert(of_inner, expert_of_row, len(up))
        rows = torch.index_select(hidden, 0, token_of_row, out=_reused(rows, hidden))
        if ctx.needs_input_grad[3]:
            of_up = _outer(layout, rows, of_inner)
        of_hidden = None
        if ctx.needs_input_grad[0]:
            of_hidden = _gather_sum(row_of_slot, _product(layout, of_inner, up.transpose(1, 2), rows))
        of_weights = of_weight[row_of_slot].to(weights.dtype) * (row_of_slot != layout.rows - 1 if layout.spare else 1)
        return of_hidden, of_weights, None, of_up, of_down, of_up_bias, of_down_bias, None


def _pullback(inner: Tensor, activate: Activation | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The neurons `[rows, neurons]`, and the function from their gradient to that of `inner`."""
    if activate is not None:
        with torch.enable_grad():
            leaf = inner.detach().requires_grad_()
            neurons = activate(leaf)
        return neurons.detach(), lambda grad: torch.autograd.grad(neurons, leaf, grad)[0]
    gate, up = inner.chunk(2, dim=-1)
    opened = F.silu(gate)

    def pull(grad: Tensor) -> Tensor:
        out = torch.empty_like(inner)
        of_gate, of_up = out.chunk(2, dim=-1)
        torch.mul(grad, opened, out=of_up)
        torch.ops.aten.silu_backward(grad.mul_(up), gate, grad_input=of_gate)
        return out

    return opened * up, pull


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


def _expert_of_row(layout: Plan, row_of_slot: Tensor, index: Tensor) -> Tensor:
    experts = torch.arange(layout.experts, device=index.device).repeat_interleave(layout.capacity)
    experts = F.pad(experts, (0, layout.rows - layout.batched))
    experts[row_of_slot.reshape(-1)] = index.reshape(-1).clamp_max(layout.experts - 1)
    return experts


def _by_expert(rows: Tensor, expert_of_row: Tensor, experts: int) -> Tensor:
    return rows.new_zeros(experts, rows.shape[1]).index_add_(0, expert_of_row, rows)


def _reused(rows: Tensor, hidden: Tensor) -> Tensor:
    """The memory of `rows` where it fits rows of `hidden`, else new."""
    return rows if rows.shape[1] == hidden.shape[1] else hidden.new_empty(len(rows), hidden.shape[1])
