"""Running sums: S_t = alpha_t S_{t-1} + x_t, for all positions at once and differentiable.

With x = omega * (key, value, 1) the mean of a slot after token t is S_t[key] / S_t[1]. The recurrence is computed by
doubling (log2(T) steps of whole tensors) or, on a CPU, by a compiled loop; its gradient is the recurrence backwards:

    h_t = g_t + alpha_{t+1} h_{t+1}      dx_t = h_t      dalpha_t = <h_t, S_{t-1}>      dS_{-1} = alpha_0 h_0
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel import recurrence, usable


def running_sums(alpha: Tensor, terms: Tensor, start: Tensor | None = None) -> Tensor:
    """S `[..., seq, width]` from alpha `[..., seq]`, x `[..., seq, width]` and S_{-1} `[..., width]` (zero if None)."""
    if start is None:
        start = terms.new_zeros(*terms.shape[:-2], terms.shape[-1])
    return _Recurrence.apply(alpha, terms, start)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alpha: Tensor, terms: Tensor, start: Tensor) -> Tensor:
        sums = _run(alpha, terms, start)
        ctx.save_for_backward(alpha, sums, start)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sums, start = ctx.saved_tensors
        later = torch.nn.functional.pad(alpha[..., 1:], (0, 1))
        of_terms = _run(later.flip(-1), gradient.flip(-2), torch.zeros_like(start)).flip(-2)
        earlier = torch.cat([start.unsqueeze(-2), sums[..., :-1, :]], dim=-2)
        return (of_terms * earlier).sum(-1), of_terms, alpha[..., :1] * of_terms[..., 0, :]


def _run(alpha: Tensor, terms: Tensor, start: Tensor) -> Tensor:
    if usable(terms):
        return recurrence(alpha, terms, start)
    return doubling(alpha, terms, start)


def doubling(alpha: Tensor, terms: Tensor, start: Tensor) -> Tensor:
    """The recurrence in log2(seq) steps: after step i every position holds the sum over the last 2^i tokens."""
    sums = terms.clone()
    sums[..., 0, :] += alpha[..., :1] * start
    product, step = alpha.clone(), 1
    while step < alpha.shape[-1]:
        reach = product[..., step:].clone()
        sums[..., step:, :] += reach.unsqueeze(-1) * sums[..., :-step, :].clone()
        product[..., step:] = reach * product[..., :-step].clone()
        step *= 2
    return sums
