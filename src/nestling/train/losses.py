"""Losses between the logits of student and teacher that never hold more than a chunk of `[tokens, vocab]`.

Minitron, arXiv 2407.14679, section 3:
    p(x, tau)  = softmax(x / tau)
    L_logits   = (1 / l) sum_k D(p_t^k, p_s^k)             forward KL: D = sum_v p_t (log p_t - log p_s)
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

IGNORE = -100
# Numbers in one chunk of logits. A CPU is as fast with small ones; other devices need enough to be busy.
CHUNK_NUMBERS = {"cpu": 2**23}
CHUNK_NUMBERS_ELSEWHERE = 2**27

Divergence = Callable[[Tensor, Tensor], Tensor]
DIVERGENCES: dict[str, Divergence] = {}


def divergence(name: str) -> Callable[[Divergence], Divergence]:
    """Register a function of the log-probabilities of student and teacher `[tokens, vocab]` -> `[tokens]`."""

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


@dataclass(frozen=True)
class Objective:
    """What is asked of the student's logits: kd_weight * D + ce_weight * cross-entropy, the mean over real tokens.

    divergence: a name in `DIVERGENCES`. temperature: tau of the softmax in D; cross-entropy is always at 1.
    scale_by_temperature: multiply D by tau^2, which keeps its gradient's size; the paper and Megatron do not.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    scale_by_temperature: bool = False
    kd_weight: float = 1.0
    ce_weight: float = 0.0

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

    def terms(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over tokens of (loss, D, cross-entropy) from float logits `[tokens, vocab]` and targets `[tokens]`.

        Without a teacher there is cross-entropy alone, and D is 0.
        """
        if teacher is None:
            cross_entropy = F.cross_entropy(student, targets, reduction="sum")
            return self.ce_weight * cross_entropy, torch.zeros_like(cross_entropy), cross_entropy
        tau = self.temperature
        log_student = F.log_softmax(student / tau if tau != 1 else student, dim=-1)
        log_teacher = F.log_softmax(teacher / tau if tau != 1 else teacher, dim=-1)
        apart = DIVERGENCES[self.divergence](log_student, log_teacher).sum()
        if self.scale_by_temperature:
            apart = apart * tau**2
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.ce_weight > 0):
            cross_entropy = F.nll_loss(
                log_student if tau == 1 else F.log_softmax(student, dim=-1), targets, reduction="sum"
            )
        return self.kd_weight * apart + self.ce_weight * cross_entropy, apart, cross_entropy


@dataclass(frozen=True)
class Head:
    """A function from hidden states `[..., hidden]` to logits `[..., vocab]`, and the parameters it uses."""

    function: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor] = ()

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.function(hidden)


class LogitLosses(NamedTuple):
    """Means over real tokens, scalars: the loss (differentiable), and the values of its two parts, without weights."""

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor


def logit_losses(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor | None,
    teacher_head: Callable[[Tensor], Tensor],
    targets: Tensor,
    objective: Objective | None = None,
    *,
    count: Tensor | float | None = None,
    chunk_tokens: int | None = None,
) -> LogitLosses:
    """The loss of the student's logits against the teacher's and the targets, chunk by chunk.

    hidden: the student's last states `[..., hidden]`. teacher_hidden: the teacher's, same leading dimensions; no
    gradient flows there; None for an objective of cross-entropy alone. targets: the token that follows each position
    `[...]`, -100 where the position counts for nothing. count: what sums are divided by (all real tokens of an
    accumulated batch); the targets here unless given. chunk_tokens: tokens whose logits exist at once.
    """
    counted = (targets != IGNORE).flatten()
    rows = hidden.flatten(0, -2)[counted]
    teacher_rows = teacher_hidden.detach().flatten(0, -2)[counted] if teacher_hidden is not None else None
    wanted = targets.flatten()[counted]
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
    return LogitLosses(*_Chunked.apply(work, rows, *head.parameters))


@dataclass(frozen=True)
class _Work:
    """Everything of one call that is not differentiated; rows are real tokens only."""

    head: Head
    teacher: Tensor | None
    teacher_head: Callable[[Tensor], Tensor]
    targets: Tensor
    objective: Objective
    count: Tensor | float
    chunk_tokens: int | None
    differentiate: bool

    def run(self, hidden: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Means (loss, D, cross-entropy) `[3]` and the gradients of `hidden` and of the tensors `wanted`."""
        sums = torch.zeros(3, dtype=_wide(hidden.dtype), device=hidden.device)
        of_hidden = torch.zeros_like(hidden)
        of_wanted: list[Tensor] = []
        for start, stop in pairwise(self._bounds(hidden)):
            with torch.set_grad_enabled(self.differentiate):
                rows = hidden[start:stop].detach().requires_grad_(self.differentiate)
                terms = self._terms(rows, start, stop)
                if self.differentiate:
                    first, *others = torch.autograd.grad(terms[0], [rows, *wanted])
                    of_hidden[start:stop] = first
                    of_wanted = _added(of_wanted, others)
            sums += torch.stack([term.detach() for term in terms])
        return sums, [of_hidden, *(of_wanted or map(torch.zeros_like, wanted))]

    def _terms(self, rows: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        logits, teacher = self.head(rows), None
        wide = _wide(logits.dtype)
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher_head(self.teacher[start:stop])
            wide = torch.promote_types(wide, _wide(teacher.dtype))
            teacher = teacher.to(wide)
        terms = self.objective.terms(logits.to(wide), teacher, self.targets[start:stop])
        return tuple(term / self.count for term in terms)

    def _bounds(self, hidden: Tensor) -> list[int]:
        """Where chunks begin and end: as few as the limit allows, all of about the same size."""
        vocab = max((parameter.shape[0] for parameter in self.head.parameters), default=2**16)
        numbers = CHUNK_NUMBERS.get(hidden.device.type, CHUNK_NUMBERS_ELSEWHERE)
        chunks = -(-len(hidden) // (self.chunk_tokens or max(1, numbers // vocab)))
        return [len(hidden) * i // chunks for i in range(chunks + 1)] if chunks else []


class _Chunked(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits are there, and hands them out in backward."""

    @staticmethod
    def forward(ctx: Any, work: _Work, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.learns = list(ctx.needs_input_grad[2:])
        wanted = [parameter for parameter, learns in zip(parameters, ctx.learns, strict=True) if learns]
        means, gradients = work.run(hidden, wanted)
        ctx.gradients = gradients if work.differentiate else None
        ctx.dtypes = [hidden.dtype, *(parameter.dtype for parameter in wanted)]
        loss, apart, cross_entropy = (mean.clone() for mean in means)  # no views: callers may scale them in place
        ctx.mark_non_differentiable(apart, cross_entropy)
        return loss, apart, cross_entropy

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
