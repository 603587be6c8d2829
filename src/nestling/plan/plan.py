"""Whether a distillation fits on some machines, how it is spread over them, and how long it takes.

Per token the student computes three forward passes' worth (forward, and twice that backward), one more where
activations are recomputed, and the teacher one:

    FLOP per token = T + 3 S (+ S)        T, S: a forward pass, about 2 per weight of every matrix, and attention

so for N weights 2 N_teacher + 6 N_student. Seconds = tokens * FLOP per token / (devices * peak * utilisation), unless
exchanging weights and gradients takes longer than computing; the two overlap. Of the ways to spread the work the
first that fits is taken: whole models on each device, then recomputing activations, then sharding, then both.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nestling.anatomy import Anatomy
from nestling.errors import NestlingError, TargetError
from nestling.plan.devices import Machines
from nestling.plan.memory import Figures, Memory, memory
from nestling.shape import Form, fit
from nestling.train.settings import MICRO_TOKENS_ELSEWHERE

WAYS = ((False, False), (False, True), (True, False), (True, True))  # fsdp, recompute
MOST_DEVICES = 2**14


@dataclass(frozen=True)
class Job:
    """What is to be trained. tokens: all. batch_size: sequences of `context` tokens per step, over all devices."""

    tokens: float
    context: int
    batch_size: int
    utilisation: float

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise NestlingError(f"utilisation {self.utilisation} is not possible: give a part of the peak, say 0.4")

    def rows(self, devices: int) -> int:
        """Sequences that go through a device at once, as training chooses them."""
        share = self.batch_size // devices
        return max(
            n for n in range(1, share + 1) if share % n == 0 and (n == 1 or n * self.context <= MICRO_TOKENS_ELSEWHERE)
        )


@dataclass(frozen=True)
class Plan:
    """How a job is spread, what it needs and how long it takes.

    fits: whether it fits at all; if not, `devices_needed` of this kind would do (None: no number of them does), and the
    rest describes the most sparing way. exchange: time to exchange weights and gradients over time to compute.
    """

    fits: bool
    fsdp: bool
    recompute: bool
    rows: int
    memory: Memory
    usable: float
    flops_per_token: int
    teacher_flops: int
    student_flops: int
    exchange: float
    tokens_per_s: float
    hours: float
    gpu_hours: float
    steps: int
    devices_needed: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"memory_total": self.memory.total}


def plan(anatomy: Anatomy, shape: dict[str, Any] | Form, machines: Machines, job: Job) -> Plan:
    """The plan for cutting a model to a shape and distilling it from the model itself.

    Raises `TargetError` for a batch that the devices cannot share.
    """
    form = shape if isinstance(shape, Form) else fit(anatomy, shape)
    teacher = Figures.of(anatomy, fit(anatomy, {}, check_config=False), job.context)
    student = Figures.of(anatomy, form, job.context)
    if job.batch_size % machines.count:
        raise TargetError(
            f"batch_size {job.batch_size} does not divide by {machines.count} devices: take "
            f"{max(1, job.batch_size // machines.count) * machines.count}"
        )
    fsdp, recompute = next((way for way in WAYS if _fits(student, teacher, machines, job, *way)), WAYS[-1])
    fits = _fits(student, teacher, machines, job, fsdp, recompute)
    rows = job.rows(machines.count)
    flops = teacher.flops + (4 if recompute else 3) * student.flops
    exchange = _exchange(student, teacher, machines, job, fsdp, flops)
    speed = machines.count * machines.device.flops * job.utilisation / flops / max(1.0, exchange)
    hours = job.tokens / speed / 3600
    return Plan(
        fits=fits,
        fsdp=fsdp,
        recompute=recompute,
        rows=rows,
        memory=memory(student, teacher, machines.count, rows * job.context, fsdp, recompute),
        usable=machines.device.usable,
        flops_per_token=flops,
        teacher_flops=teacher.flops,
        student_flops=student.flops,
        exchange=exchange,
        tokens_per_s=speed,
        hours=hours,
        gpu_hours=hours * machines.count,
        steps=-(-int(job.tokens) // (job.batch_size * job.context)),
        devices_needed=machines.count if fits else _needed(student, teacher, machines, job),
    )


def _fits(student: Figures, teacher: Figures, machines: Machines, job: Job, fsdp: bool, recompute: bool) -> bool:
    tokens = job.rows(machines.count) * job.context
    needed = memory(student, teacher, machines.count, tokens, fsdp, recompute)
    return needed.total <= machines.device.usable and (machines.count > 1 or not fsdp)


def _needed(student: Figures, teacher: Figures, machines: Machines, job: Job) -> int | None:
    """The least power of two of these devices on which a sequence at a time fits, sharded and recomputing."""
    count = 2
    while count <= MOST_DEVICES:
        if memory(student, teacher, count, job.context, True, True).total <= machines.device.usable:
            return count
        count *= 2
    return None


def _exchange(student: Figures, teacher: Figures, machines: Machines, job: Job, fsdp: bool, flops: int) -> float:
    """Seconds of communication per second of computation.

    Sharded, every micro-batch gathers the student's layers twice and the rest once in bfloat16, the teacher once, and
    scatters float32 gradients; whole models exchange float32 gradients twice per step (reduce and gather).
    """
    if machines.count == 1:
        return 0.0
    tokens = job.rows(machines.count) * job.context
    if fsdp:
        sent: float = (
            2 * (2 * student.params - student.rest_params) + teacher.item * teacher.params + 4 * student.params
        )
    else:
        sent, tokens = 2 * 4 * student.params, job.batch_size // machines.count * job.context
    sent *= (machines.count - 1) / machines.count
    computing = tokens * flops / (machines.device.flops * job.utilisation)
    return sent / machines.link / computing
