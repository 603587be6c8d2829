"""Windows on a parent's tensors that members learn through, with gradients in the shape of the window.

Autograd's own slices give each window a gradient of the whole tensor's size, twice for a window of rows and columns,
and adds those up. Here all windows of a step on one tensor are the outputs of one function: each member's gradient
keeps its own size until all are there, then they are added into one tensor of the parent's size. That is the parent's
gradient, so whatever works on gradients (accumulation, DDP, clipping, AdamW) sees what it always sees. A window that
rows are looked up in may have a sparse gradient, of those rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from torch.autograd.function import once_differentiable

# For each dimension of a tensor: all of it, one run of elements as (start, length), or the elements one by one.
Window = tuple[tuple[int, int] | LongTensor | None, ...]


def windows(tensor: Tensor, wanted: Sequence[Window]) -> tuple[Tensor, ...]:
    """The kept part of a tensor for each window, differentiable; a view if there is one."""
    return cast(tuple[Tensor, ...], _Windows.apply(tensor, *wanted))


def seen_through(window: Window, tensor: Tensor) -> Tensor:
    """The elements of a tensor that a window keeps, in their order; a view unless some lie in several runs."""
    for dim, kept in enumerate(window):
        if isinstance(kept, tuple):
            tensor = tensor.narrow(dim, *kept)
        elif kept is not None:
            tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor


def runs(index: Tensor) -> list[tuple[int, int]]:
    """Stretches of consecutive numbers in an index, as (start, length)."""
    breaks = (torch.nonzero(index.diff() != 1).flatten() + 1).tolist()
    starts = [0, *breaks]
    ends = [*breaks, len(index)]
    return [(int(index[start]), end - start) for start, end in zip(starts, ends, strict=True)]


def runs_of(kept: tuple[int, int] | Tensor | None, size: int) -> list[tuple[int, int]]:
    """The runs of one dimension of a window."""
    return runs(kept) if isinstance(kept, Tensor) else [kept or (0, size)]


def scattered(window: Window) -> bool:
    """Whether some elements are kept one by one."""
    return any(isinstance(kept, Tensor) for kept in window)


class _Windows(torch.autograd.Function):
    """A tensor -> its windows; gradients of windows -> the sum of them, each in its place."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *wanted: Window) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.wanted, ctx.shape = wanted, tensor.shape
        return tuple(seen_through(window, tensor) for window in wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        total: Tensor | None = None
        there = [
            (window, gradient) for window, gradient in zip(ctx.wanted, gradients, strict=True) if gradient is not None
        ]
        for window, gradient in sorted(there, key=lambda one: one[1].is_sparse):  # those of few rows go on top
            if total is None:
                total = _placed(window, gradient.to_dense() if gradient.is_sparse else gradient, ctx.shape)
            else:
                total = _added(total, window, gradient)
        return total, *(None for _ in ctx.wanted)


def _placed(window: Window, gradient: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of that shape with the gradient in its window and zeros around it, each element written once."""
    if scattered(window):
        return _added(gradient.new_zeros(shape), window, gradient)
    total = place = gradient.new_empty(shape)
    for dim, kept in enumerate(window):
        if kept is not None:
            start, length = cast(tuple[int, int], kept)
            place.narrow(dim, 0, start).zero_()
            place.narrow(dim, start + length, shape[dim] - start - length).zero_()
            place = place.narrow(dim, start, length)
    place.copy_(gradient)
    return total


def _added(total: Tensor, window: Window, gradient: Tensor) -> Tensor:
    """In place: the gradient added where its window lies, run by run, or row by row if it has some of all rows only."""
    if gradient.is_sparse:
        if scattered(window) or window[0] is not None:
            return _added(total, window, gradient.to_dense())
        rows = gradient.coalesce()  # each once, so that the order of a sum is always the same
        seen_through(window, total).index_add_(0, rows.indices()[0], rows.values())
        return total
    for there, here in _pieces(window, total.shape):
        total[there].add_(gradient[here])
    return total


def _pieces(window: Window, shape: torch.Size) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Where each block of consecutive elements lies in the whole tensor, and in the window."""
    found = []
    for kept, size in zip(window, shape, strict=True):
        along = runs_of(kept, size)
        ends = itertools.accumulate(length for _, length in along)
        found.append(
            [(slice(start, start + n), slice(end - n, end)) for (start, n), end in zip(along, ends, strict=True)]
        )
    for block in itertools.product(*found):
        yield tuple(there for there, _ in block), tuple(here for _, here in block)
