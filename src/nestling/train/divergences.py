"""How far a student's distribution over the next token is from its teacher's, whole or over the likeliest tokens.

Minitron, arXiv 2407.14679, section 3 and table 15: L_logits is the mean over tokens of D(p_t, p_s). Forward KL is the
paper's choice; the others are what it was compared with. Each D takes log-probabilities `[tokens, classes]`, so it
works alike on the whole vocabulary and on a teacher's k likeliest tokens (`TopK`), with or without one more class for
all the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Divergence = Callable[[Tensor, Tensor], Tensor]
DIVERGENCES: dict[str, Divergence] = {}


def divergence(name: str) -> Callable[[Divergence], Divergence]:
    """Register a function of the log-probabilities of student and teacher `[tokens, classes]` -> `[tokens]`."""

    def add(function: Divergence) -> Divergence:
        DIVERGENCES[name] = function
        return function

    return add


@divergence("forward_kl")
def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v p_t (log p_t - log p_s): the student covers all that the teacher allows."""
    return (teacher.exp() * (teacher - student)).sum(-1)


@divergence("reverse_kl")
def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) = sum_v p_s (log p_s - log p_t): the student seeks the teacher's modes."""
    return (student.exp() * (student - teacher)).sum(-1)


@divergence("jensen_shannon")
def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    """1/2 KL(p_t || m) + 1/2 KL(p_s || m) with m = (p_t + p_s) / 2: between the two, at most log 2."""
    middle = torch.logaddexp(student, teacher) - math.log(2)
    return 0.5 * (forward_kl(middle, teacher) + forward_kl(middle, student))


@divergence("mse")
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """sum_v (p_t - p_s)^2; the sum and not the mean, so that it does not fade with the size of the vocabulary."""
    return (teacher.exp() - student.exp()).square().sum(-1)


@divergence("cosine")
def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(p_t, p_s)."""
    return 1 - F.cosine_similarity(student.exp(), teacher.exp(), dim=-1)


@divergence("logit_mse")
def logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of the squared difference of logits, whose common shift, which means nothing, is taken off."""
    apart = student - teacher
    return (apart - apart.mean(-1, keepdim=True)).square().mean(-1)


@dataclass(frozen=True)
class TopK:
    """What is kept of a teacher's distribution: its k likeliest tokens.

    indices: which they are `[..., k]`. log_probs: log p_t of each `[..., k]`. rest: log of what all other tokens have
    together `[...]`.
    """

    indices: Tensor
    log_probs: Tensor
    rest: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> TopK:
        """The same with a function applied to each tensor: a choice or view of the leading dimensions."""
        return TopK(function(self.indices), function(self.log_probs), function(self.rest))

    def to(self, device: torch.device, dtype: torch.dtype) -> TopK:
        """On a device, log-probabilities in a dtype."""
        return TopK(self.indices.to(device).long(), self.log_probs.to(device, dtype), self.rest.to(device, dtype))

    def log_distribution(self, with_rest: bool) -> Tensor:
        """Log-probabilities `[..., k + 1]`, the last for the rest, or `[..., k]` without; they add up to 1."""
        kept = torch.cat([self.log_probs, self.rest[..., None]], -1) if with_rest else self.log_probs
        return kept.log_softmax(-1)


def top_k(log_probs: Tensor, k: int) -> TopK:
    """The k likeliest of log-probabilities `[..., vocab]`; all of them if there are fewer."""
    values, indices = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
    return TopK(indices, values, _rest(log_probs, indices))


def at(log_probs: Tensor, indices: Tensor, with_rest: bool) -> Tensor:
    """Log-probabilities `[..., vocab]` as `TopK.log_distribution` has the teacher's: those tokens, and the rest."""
    if not with_rest:
        return log_probs.gather(-1, indices).log_softmax(-1)
    return cast(Tensor, _WithRest.apply(log_probs, indices))


class _WithRest(torch.autograd.Function):
    """Log-probabilities `[..., vocab]` -> those at some indices, and the log of what all others have together.

    In fewer passes over the vocabulary than the parts would take: what backward needs is made in place of what forward
    no longer does.
    """

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, indices: Tensor) -> Tensor:
        others = log_probs.scatter(-1, indices, -math.inf)
        rest = others.logsumexp(-1, keepdim=True)
        shares = others.sub_(rest.clamp_min(torch.finfo(rest.dtype).min)).exp_()  # of each in the rest
        ctx.save_for_backward(shares, indices)
        return torch.cat([log_probs.gather(-1, indices), rest], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        shares, indices = ctx.saved_tensors
        return (shares * gradient[..., -1:]).scatter_(-1, indices, gradient[..., :-1]), None


def _rest(log_probs: Tensor, indices: Tensor) -> Tensor:
    """log of the mass outside of `indices`, summed directly: 1 minus the mass inside would lose its digits."""
    return log_probs.scatter(-1, indices, -math.inf).logsumexp(-1)
