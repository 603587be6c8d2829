"""Losses between the logits of student and teacher that never hold more than a chunk of `[tokens, vocab]`.

Minitron, arXiv 2407.14679, section 3:
    p(x, tau)  = softmax(x / tau)
    L_logits   = (1 / l) sum_k D(p_t^k, p_s^k)             D: see `nestling.train.divergences`
For each chunk of tokens both heads are applied, the loss is taken and differentiated at once, and the logits are
dropped: what stays is the gradient of the student's last hidden states and of its head. Values and gradients are
those of the plain computation. Knows hidden states and heads, no models.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
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

    def terms(self, student: Tensor, taught: Tensor | TopK | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        """D and cross-entropy of each token `[tokens]`, from float logits `[tokens, vocab]` and targets `[tokens]`.

        taught: what is asked of the student, see `taught`, or what was kept of it. Without it D is 0.
        """
        tau = self.temperature
        log_student = F.log_softmax(student / tau if tau != 1 else student, dim=-1)
        apart = torch.zeros_like(log_student[:, 0]) if taught is None else self._apart(log_student, taught)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.ce_weight > 0):
            log_plain = log_student if tau == 1 else F.log_softmax(student, dim=-1)
            cross_entropy = F.nll_loss(log_plain, targets, reduction="none")
        return apart * tau**2 if self.scale_by_temperature else apart, cross_entropy

    def taught(self, teacher: Tensor) -> Tensor | TopK:
        """The teacher's logits `[tokens, vocab]` as what students are compared with: log-probabilities, or some."""
        log_teacher = F.log_softmax(teacher / self.temperature if self.temperature != 1 else teacher, dim=-1)
        return top_k(log_teacher, self.top_k) if 0 < self.top_k < log_teacher.shape[-1] else log_teacher

    def _apart(self, log_student: Tensor, taught: Tensor | TopK) -> Tensor:
        measure = DIVERGENCES[self.divergence]
        if isinstance(taught, Tensor):
            return measure(log_student, taught)
        rest = self.remaining_mass and taught.indices.shape[-1] < log_student.shape[-1]
        return measure(at(log_student, taught.indices, rest), taught.log_distribution(rest))


CROSS_ENTROPY = Objective(kd_weight=0.0, ce_weight=1.0)


@dataclass(frozen=True)
class Head:
    """A function from hidden states `[..., hidden]` to logits `[..., vocab]`, and the parameters it uses."""

    function: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor] = ()

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.function(hidden)


class Student(NamedTuple):
    """Last states `[..., hidden]`, the head that makes logits of them, and the weight of the loss."""

    hidden: Tensor
    head: Head
    weight: float = 1.0


class LogitLosses(NamedTuple):
    """Means over real tokens, scalars: the weighted loss (differentiable), and the plain values of its two parts.

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
    students = [Student(hidden, head)]
    return shared_losses(
        students, teacher_hidden, teacher_head, targets, objective, count=count, chunk_tokens=chunk_tokens
    )[0]


def shared_losses(
    students: Sequence[Student],
    teacher_hidden: Tensor | TopK | None,
    teacher_head: Callable[[Tensor], Tensor],
    targets: Tensor,
    objective: Objective | None = None,
    *,
    count: Tensor | float | None = None,
    chunk_tokens: int | None = None,
) -> list[LogitLosses]:
    """As `logit_losses`, of several students of one teacher, whose distributions are made once for all of them."""
    counted = targets != IGNORE
    wanted = targets[counted]
    if isinstance(teacher_hidden, TopK):
        teacher_rows: Tensor | TopK | None = teacher_hidden.map(lambda kept: kept[counted])
    else:
        teacher_rows = teacher_hidden.detach()[counted] if teacher_hidden is not None else None
    work = _Work(
        heads=[student.head for student in students],
        weights=[student.weight for student in students],
        teacher=teacher_rows,
        teacher_head=teacher_head,
        targets=wanted,
        objective=objective or Objective(),
        count=count if count is not None else max(1, len(wanted)),
        chunk_tokens=chunk_tokens,
        differentiate=torch.is_grad_enabled(),
    )
    given = itertools.chain.from_iterable((one.hidden[counted], *one.head.parameters) for one in students)
    found = iter(_Chunked.apply(work, *given))
    return [
        LogitLosses(loss, apart, cross_entropy, each.new_zeros(targets.shape).masked_scatter(counted, each))
        for loss, apart, cross_entropy, each in zip(found, found, found, found, strict=True)
    ]


@dataclass(frozen=True)
class _Work:
    """Everything of one call that is not differentiated; rows are real tokens only."""

    heads: Sequence[Head]
    weights: Sequence[float]
    teacher: Tensor | TopK | None
    teacher_head: Callable[[Tensor], Tensor]
    targets: Tensor
    objective: Objective
    count: Tensor | float
    chunk_tokens: int | None
    differentiate: bool

    def run(self, tensors: Sequence[Tensor], learns: Sequence[bool]) -> list[_Sums]:
        """What comes of each student, from its rows `[tokens, hidden]` and its head's parameters, one after another.

        learns: which of them want a gradient.
        """
        sums, place = [], 0
        for head, weight in zip(self.heads, self.weights, strict=True):
            end = place + 1 + len(head.parameters)
            wanted = [tensors[i] for i in range(place + 1, end) if learns[i]]
            sums.append(_Sums(tensors[place], head, weight, wanted))
            place = end
        wide = functools.reduce(torch.promote_types, (_wide(own.rows.dtype) for own in sums))
        for start, stop in pairwise(self._bounds(sums[0].rows)):
            taught, dtype = self._taught(start, stop, wide)
            for own in sums:
                own.add(self, start, stop, taught, dtype)
        return sums

    @torch.no_grad()
    def _taught(self, start: int, stop: int, wide: torch.dtype) -> tuple[Tensor | TopK | None, torch.dtype]:
        """What some rows are compared with, and the dtype to compute their losses in."""
        if self.teacher is None:
            return None, wide
        if isinstance(self.teacher, TopK):
            kept = self.teacher.map(lambda tensor: tensor[start:stop])
            return kept.to(self.targets.device, torch.promote_types(wide, kept.log_probs.dtype)), wide
        logits = self.teacher_head(self.teacher[start:stop])
        wide = torch.promote_types(wide, _wide(logits.dtype))
        return self.objective.taught(logits.to(wide)), wide

    def _bounds(self, hidden: Tensor) -> list[int]:
        """Where chunks begin and end: as few as the limit allows, all of about the same size."""
        sizes = [parameter.shape[0] for head in self.heads for parameter in head.parameters]
        numbers = CHUNK_NUMBERS.get(hidden.device.type, CHUNK_NUMBERS_ELSEWHERE)
        chunks = -(-len(hidden) // (self.chunk_tokens or max(1, numbers // max(sizes, default=2**16))))
        return [len(hidden) * i // chunks for i in range(chunks + 1)] if chunks else []


class _Sums:
    """One student's rows, and what has come of them so far.

    means: loss, D and cross-entropy `[3]`. each: D of each row. of_rows, of_wanted: gradients of the rows, and of those
    of its head's parameters that learn.
    """

    def __init__(self, rows: Tensor, head: Head, weight: float, wanted: Sequence[Tensor]):
        self.rows, self.head, self.weight, self.wanted = rows, head, weight, wanted
        self.means = torch.zeros(3, dtype=_wide(rows.dtype), device=rows.device)
        self.each = torch.zeros(len(rows), dtype=self.means.dtype, device=rows.device)
        self.of_rows = torch.zeros_like(rows)
        self.of_wanted: list[Tensor] = []

    def add(self, work: _Work, start: int, stop: int, taught: Tensor | TopK | None, wide: torch.dtype) -> None:
        """The loss of some rows, differentiated at once; their logits are gone afterwards."""
        objective, differentiate = work.objective, work.differentiate
        with torch.set_grad_enabled(differentiate):
            rows = self.rows[start:stop].detach().requires_grad_(differentiate)
            apart, cross_entropy = objective.terms(self.head(rows).to(wide), taught, work.targets[start:stop])
            parts = apart.sum() / work.count, cross_entropy.sum() / work.count
            loss = self.weight * (objective.kd_weight * parts[0] + objective.ce_weight * parts[1])
            if differentiate:
                self.of_rows[start:stop], *others = torch.autograd.grad(loss, [rows, *self.wanted])
                self.of_wanted = _added(self.of_wanted, others)
        self.each[start:stop] = apart.detach()
        self.means += torch.stack([term.detach() for term in (loss, *parts)])

    def gradients(self) -> list[Tensor]:
        return [self.of_rows, *(self.of_wanted or map(torch.zeros_like, self.wanted))]


class _Chunked(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits are there, and hands them out in backward.

    A student's rows and its head's parameters, then the next one's -> loss, D, cross-entropy, and D of each row.
    """

    @staticmethod
    def forward(ctx: Any, work: _Work, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows = set(accumulate((1 + len(head.parameters) for head in work.heads[:-1]), initial=0))
        ctx.learns = [place in rows or wants for place, wants in enumerate(ctx.needs_input_grad[1:])]
        sums = work.run(tensors, ctx.learns)
        ctx.gradients = [own.gradients() for own in sums] if work.differentiate else None
        ctx.dtypes = [tensor.dtype for tensor, learns in zip(tensors, ctx.learns, strict=True) if learns]
        outputs, plain = [], []
        for own in sums:
            loss, *rest = (mean.clone() for mean in own.means)  # no views: callers may scale them in place
            outputs += [loss, *rest, own.each]
            plain += [*rest, own.each]
        ctx.mark_non_differentiable(*plain)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss can be differentiated once: call it again for another backward pass")
        found, ctx.gradients = ctx.gradients, None
        scaled = []
        for gradients, scale in zip(found, scales[::4], strict=True):  # a loss and three values for each student
            if scale != 1:  # a pass over the head's whole gradient that is rarely needed
                gradients = [gradient.mul_(scale) for gradient in gradients]
            scaled += gradients
        rest = iter([gradient.to(dtype) for gradient, dtype in zip(scaled, ctx.dtypes, strict=True)])
        return None, *(next(rest) if learns else None for learns in ctx.learns)


def _added(totals: list[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of all chunks so far, at least float32; the first chunk's become the totals."""
    if not totals:
        return [part.to(_wide(part.dtype)).contiguous() for part in parts]
    return [total.add_(part) for total, part in zip(totals, parts, strict=True)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32: what losses and gradients are summed in."""
    return torch.promote_types(dtype, torch.float32)
