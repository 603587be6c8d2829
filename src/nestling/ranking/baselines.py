"""Importance metrics of other papers, behind the same interface, so that one sweep can hold them against each other.

Each scores a unit where it is read: what of the reading matrix and of its input belongs to the unit. For metrics that
their papers define weight by weight, the scores of the unit's weights are added up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ranking.metrics import Reading, metric


@metric("magnitude", over_batch="mean", over_sequence="mean")
def magnitude(read: Reading) -> Tensor:
    """||W_u||_2 of the weights that read the unit, whatever the text (Han et al., arXiv 1506.02626)."""
    return _everywhere(torch.linalg.vector_norm(read.weight, dim=(0, 2), dtype=_wide(read.weight)), read)


@metric("wanda", over_batch="l2", over_sequence="l2", over_inside="sum")
def wanda(read: Reading) -> Tensor:
    """sum_ij |W_ij| ||a_j||_2 over the unit's columns j, the norm over all tokens (Wanda, arXiv 2306.11695, eq. 1)."""
    return read.activation.abs() * torch.linalg.vector_norm(read.weight, ord=1, dim=0, dtype=_wide(read.weight))


@metric("flap", over_batch="var", over_sequence="each", over_inside="sum")
def flap(read: Reading) -> Tensor:
    """sum_j Var(a_j) ||W_:j||_2^2 over the unit's columns j, the variance over all tokens (FLAP, arXiv 2312.11983)."""
    return read.activation * torch.linalg.vector_norm(read.weight, dim=0, dtype=_wide(read.weight))


@metric("taylor", over_batch="mean", over_sequence="sum", gradients=True)
def taylor(read: Reading) -> Tensor:
    """|a_u . dL/da_u|, signed within a text and not across: the loss's first-order change without the unit.

    For a linear reader it equals |W_u . dL/dW_u|, the vector-wise criterion of LLM-Pruner (arXiv 2305.11627, eq. 3),
    for the weights that read the unit; as a criterion of activations it is Molchanov's (arXiv 1611.06440, eq. 8).
    """
    assert read.gradient is not None
    wide = _wide(read.activation)
    return (read.activation.to(wide) * read.gradient.to(wide)).sum(-1)


@metric("activation_channels", over_batch="l2", over_sequence="mean", over_inside="l2")
def activation_channels(read: Reading) -> Tensor:
    """|a_j| of each channel, aggregated, then the norm over the unit's channels j: Minitron's heads in ModelOpt."""
    return read.activation.abs()


@metric("random", over_batch="mean", over_sequence="mean")
def random(read: Reading) -> Tensor:
    """Nothing but chance: the same for any text, another for another `torch.manual_seed` and another tensor."""
    seed = (torch.initial_seed() + int(read.weight.double().sum().view(torch.int64))) % 2**63
    generator = torch.Generator().manual_seed(seed)
    return _everywhere(torch.rand(read.activation.shape[2], generator=generator).to(read.activation.device), read)


def _everywhere(scores: Tensor, read: Reading) -> Tensor:
    """Scores `[units]` for every token."""
    return scores.expand(*read.activation.shape[:2], -1)


def _wide(values: Tensor) -> torch.dtype:
    """At least float32: sums of half precision overflow."""
    return torch.promote_types(values.dtype, torch.float32)
