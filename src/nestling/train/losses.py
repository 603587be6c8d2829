"""Losses between the logits of student and teacher that never hold more than a chunk of `[tokens, vocab]`.

Minitron, arXiv 2407.14679, section 3:
    p(x, tau)  = softmax(x / tau)
    L_logits   = (1 / l) sum_k D(p_t^k, p_s^k)             D: see `nestling.train.divergences`
For each chunk of tokens both heads are applied, the loss is taken and differentiated at once, and the logits are
dropped: what stays is the gradient of the student's last hidden states and of its head. Values and gradients are
those of the plain computation. Knows hidden states and heads, no models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nestling.errors import NestlingError
from nestling.train.divergences import DIVERGENCES, TopK, at, top_k

IGNORE = -100
# Numbers in one chunk of logits. A CPU is as fast with small ones; other devices need enough to be busy.
CHUNK_NUMBERS = {"cpu": 2**23}
CHUNK_NUMBERS_ELSEWHERE = 2**27


@dataclass(frozen=True)
class Objective:
    """What is asked of the student's logits: kd_weight * D + ce_weight * cross-entropy, the mean over real tokens.

    divergence: a name in `DIVERGENCES`. temperature: tau of the softmax in D; cross-entropy is always at 1.
    scale_by_temperature: multiply D by tau^2, which keeps its gradient's size; the paper and Megatron do not.
    top_k: compare the teacher's k likeliest tokens only; 0 compares all. remaining_mass: together with the mass of all
    others as one more class; otherwise both distributions are renormalized to the k tokens.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    scale_by_temperature: bool = False
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    top_k: int = 0
    remaining_mass: bool = True

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise NestlingError(f"loss '{self.divergence}' is not known: choose from {', '.join(sorted(DIVERGENCES))}")
        if not self.temperature > 0:
            raise NestlingError(f"temperature {self.temperature} is not possible: give a number above 0")
        if self.kd_weight < 0 or self.ce_weight < 0 or self.kd_weight + self.ce_weight == 0:
            raise NestlingError(
                f"kd_weight {self.kd_weight} and ce_weight {self.ce_weight} leave no loss: give weights of at least 0, "
                f"one of them above"
            )
        if self.top_k < 0 or (self.top_k == 1 and not self.remaining_mass):
            raise NestlingError(
                f"top_k {self.top_k} is not possible: give 0 for the whole vocabulary, or at least "
                f"{1 if self.remaining_mass else 2}"
            )

    def terms(self, student: Tensor, teacher: Tensor | TopK | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        """D and cross-entropy of each token `[tokens]`, from float logits `[tokens, vocab]` and targets `[tokens]`.

        teacher: logits, or what was kept of its distribution at this temperature. Without one D is 0.
        """
        tau = self.temperature
        log_student = F.log_softmax(student / tau if tau != 1 else student, dim=-1)
        apart = torch.zeros_like(log_student[:, 0]) if teacher is None else self._apart(log_student, teacher)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.ce_weight > 0):
            log_plain = log_student if tau == 1 else F.log_softmax(student, dim=-1)
            cross_entropy = F.nll_loss(log_plain, targets, reduction="none")
        return apart * tau**2 if self.scale_by_temperature else apart, cross_entropy

    def _apart(self, log_student: Tensor, teacher: Tensor | TopK) -> Tensor:
        measure = DIVERGENCES[self.divergence]
        if isinstance(teacher, Tensor):
            teacher = teacher / self.temperature if self.temperature != 1 else teacher
            log_teacher = F.log_softmax(teacher, dim=-1)
            if not 0 < self.top_k < log_teacher.shape[-1]:
                return measure(log_student, log_teacher)
            teacher = top_k(log_teacher, self.top_k)
        rest = self.remaining_mass and teacher.indices.shape[-1] < log_student.shape[-1]
        return measure(at(log_student, teacher.indices, rest), teacher.log_distribution(rest))


CROSS_ENTROPY = Objective(kd_weight=0.0, ce_weight=1.0)


@dataclass(frozen=True)
class Head:
    """A function from hidden states `[..., hidden]` to logits `[..., vocab]`, and the parameters it uses."""

    function: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor] = ()

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.function(hidden)


class LogitLosses(NamedTuple):
    """Means over real tokens, scalars: the loss (differentiable), and the values of its two parts, without weights.

    tokens: D of each position, in the shape of the targets, not divided by the count; 0 where it does not count.
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    tokens: Tensor


def logit_losses(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor | TopK | None,
    teacher_head: Callable[[Tensor], Tensor],
    targets: Tensor,
    objective: Objective | None = None,
    *,
    count: Tensor | float | None = None,
    chunk_tokens: int | None = None,
) -> LogitLosses:
    """The loss of the student's logits against the teacher's and the targets, chunk by chunk.

    hidden: the student's last states `[..., hidden]`. teacher_hidden: the teacher's, same leading dimensions; no
    gradient flows there; or what was kept of its distributions, which needs no head; None for an objective of
    cross-entropy alone. targets: the token that follows each position `[...]`, -100 where the position counts for
    nothing. count: what sums are divided by (all real tokens of an accumulated batch); the targets here unless given.
    chunk_tokens: tokens whose logits exist at once.
    """
    counted = targets != IGNORE
    rows, wanted = hidden[counted], targets[counted]
    if isinstance(teacher_hidden, TopK):
        teacher_rows: Tensor | TopK | None = teacher_hidden.map(lambda kept: kept[counted])
    else:
        teacher_rows = teacher_hidden.detach()[counted] if teacher_hidden is not None else None
    work = _Work(
        head=head,
        teacher=teacher_rows,
        teacher_head=teacher_head,
        targets=wanted,
        objective=objective or Objective(),
        count=count if count is not None else max(1, len(wanted)),
        chunk_tokens=chunk_tokens,
        differentiate=torch.is_grad_enabled(),
    )
    loss, apart, cross_entropy, each = _Chunked.apply(work, rows, *head.parameters)
    return LogitLosses(loss, apart, cross_entropy, each.new_zeros(targets.shape).masked_scatter(counted, each))


@dataclass(frozen=True)
class _Work:
    """Everything of one call that is not differentiated; rows are real tokens only."""

    head: Head
    teacher: Tensor | TopK | None
    teacher_head: Callable[[Tensor], Tensor]
    targets: Tensor
    objective: Objective
    count: Tensor | float
    chunk_tokens: int | None
    differentiate: bool

    def run(self, hidden: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Means (loss, D, cross-entropy) `[3]`, D of each row, the gradients of `hidden` and of those `wanted`."""
        sums = torch.zeros(3, dtype=_wide(hidden.dtype), device=hidden.device)
        each = torch.zeros(len(hidden), dtype=sums.dtype, device=hidden.device)
        of_hidden = torch.zeros_like(hidden)
        of_wanted: list[Tensor] = []
        for start, stop in pairwise(self._bounds(hidden)):
            with torch.set_grad_enabled(self.differentiate):
                rows = hidden[start:stop].detach().requires_grad_(self.differentiate)
                apart, cross_entropy = self._terms(rows, start, stop)
                parts = apart.sum() / self.count, cross_entropy.sum() / self.count
                loss = self.objective.kd_weight * parts[0] + self.objective.ce_weight * parts[1]
                if self.differentiate:
                    first, *others = torch.autograd.grad(loss, [rows, *wanted])
                    of_hidden[start:stop] = first
                    of_wanted = _added(of_wanted, others)
            each[start:stop] = apart.detach()
            sums += torch.stack([term.detach() for term in (loss, *parts)])
        return sums, each, [of_hidden, *(of_wanted or map(torch.zeros_like, wanted))]

    def _terms(self, rows: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        logits = self.head(rows)
        teacher, wide = self._taught(start, stop, _wide(logits.dtype))
        return self.objective.terms(logits.to(wide), teacher, self.targets[start:stop])

    @torch.no_grad()
    def _taught(self, start: int, stop: int, wide: torch.dtype) -> tuple[Tensor | TopK | None, torch.dtype]:
        """The teacher's logits of some rows, or what was kept of them, and the dtype to compute the loss in."""
        if self.teacher is None:
            return None, wide
        if isinstance(self.teacher, TopK):
            kept = self.teacher.map(lambda tensor: tensor[start:stop])
            return kept.to(self.targets.device, torch.promote_types(wide, kept.log_probs.dtype)), wide
        logits = self.teacher_head(self.teacher[start:stop])
        wide = torch.promote_types(wide, _wide(logits.dtype))
        return logits.to(wide), wide

    def _bounds(self, hidden: Tensor) -> list[int]:
        """Where chunks begin and end: as few as the limit allows, all of about the same size."""
        vocab = max((parameter.shape[0] for parameter in self.head.parameters), default=2**16)
        numbers = CHUNK_NUMBERS.get(hidden.device.type, CHUNK_NUMBERS_ELSEWHERE)
        chunks = -(-len(hidden) // (self.chunk_tokens or max(1, numbers // vocab)))
        return [len(hidden) * i // chunks for i in range(chunks + 1)] if chunks else []


class _Chunked(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits are there, and hands them out in backward."""

    @staticmethod
    def forward(ctx: Any, work: _Work, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.learns = list(ctx.needs_input_grad[2:])
        wanted = [parameter for parameter, learns in zip(parameters, ctx.learns, strict=True) if learns]
        means, each, gradients = work.run(hidden, wanted)
        ctx.gradients = gradients if work.differentiate else None
        ctx.dtypes = [hidden.dtype, *(parameter.dtype for parameter in wanted)]
        loss, apart, cross_entropy = (mean.clone() for mean in means)  # no views: callers may scale them in place
        ctx.mark_non_differentiable(apart, cross_entropy, each)
        return loss, apart, cross_entropy, each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss can be differentiated once: call it again for another backward pass")
        gradients, ctx.gradients = ctx.gradients, None
        if scale != 1:  # a pass over the head's whole gradient that is rarely needed
            gradients = [gradient.mul_(scale) for gradient in gradients]
        scaled = [gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
        of_hidden, rest = scaled[0], iter(scaled[1:])
        return None, of_hidden, *(next(rest) if learns else None for learns in ctx.learns)


def _added(totals: list[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of all chunks so far, at least float32; the first chunk's become the totals."""
    if not totals:
        return [part.to(_wide(part.dtype)).contiguous() for part in parts]
    return [total.add_(part) for total, part in zip(totals, parts, strict=True)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32: what losses and gradients are summed in."""
    return torch.promote_types(dtype, torch.float32)
