"""`nestling plan`: whether parent and child fit on some machines, and how long distilling takes there; all on paper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from nestling import hub
from nestling.anatomy import Anatomy
from nestling.budget import Budget, amount
from nestling.plan import Job, Machines, Plan, plan
from nestling.recipes.progress import console
from nestling.recipes.settings import at_least, listed
from nestling.report.human import count, figure, flops, size
from nestling.search import Pricing, candidates, describe
from nestling.shape import Shape

WIDTHS = ("hidden_size", "intermediate_size")  # what the papers cut first: heads and layers stay


@dataclass
class PlanSettings:
    """Settings of `plan`.

    Args:
        model: Hub id, folder, GGUF file, or a YAML or JSON file with the fields of a config; no weights are read.
        to: Target: 0.5x, 4B, or named limits; the most even cut of the axes is planned for.
        shape: Plan for this shape instead (FIELD=NUMBER,... or a JSON file).
        axes: Config fields that may be cut, with commas between; hidden_size and intermediate_size unless given.
        gpus: Devices: 8xH100, or 32x8xH100 for 32 nodes of 8 (B200, H200, H100, A100, A100-40GB, L40S, L4, RTX4090,
            MI300X, or any name with --device_flops and --device_memory).
        tokens: Tokens to distill on.
        context: Tokens per sequence.
        batch_size: Sequences per step, over all devices.
        utilisation: Part of the peak that computation reaches, recomputed work included.
        device_flops: Peak bfloat16 FLOP per second of one device, such as 400T.
        device_memory: Bytes of one device, such as 48Gi.
        link: Bytes per second between devices of a node, one direction, such as 450G.
        network: Bytes per second and device between nodes, one direction, such as 50G.
        trust_remote_code: Let the checkpoint run code of its own.
    """

    model: str
    to: str = "0.5x"
    shape: str | None = None
    axes: str | list[str] = ""
    gpus: str = "8xH100"
    tokens: str = "100B"
    context: int = 4096
    batch_size: int = 1152
    utilisation: float = 0.4
    device_flops: str | None = None
    device_memory: str | None = None
    link: str | None = None
    network: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        at_least("context", self.context, 2)
        at_least("batch_size", self.batch_size, 1)

    def machines(self) -> Machines:
        own = {"flops": self.device_flops, "memory": self.device_memory, "link": self.link, "network": self.network}
        return Machines.parse(
            self.gpus, **{name: amount(text) if text is not None else None for name, text in own.items()}
        )


def plan_job(settings: PlanSettings) -> dict[str, Any]:
    """Print the plan; returns it."""
    machines = settings.machines()
    job = Job(amount(settings.tokens), settings.context, settings.batch_size, settings.utilisation)
    anatomy = Anatomy.of(hub.config(settings.model, trust_remote_code=settings.trust_remote_code))
    shape = Shape.parse(settings.shape) if settings.shape else _even_cut(anatomy, settings)
    found = plan(anatomy, dict(shape), machines, job)
    pricing = Pricing(anatomy, settings.context)
    parent, child = pricing.cost({}), pricing.cost(shape)
    console.print(f"{settings.model}: {count(parent.params)} to {count(child.params)} parameters ({describe(shape)})")
    for piece in (*_memory(found, machines), *_times(found, machines, job)):
        console.print(piece)
    console.print(f"\n{_verdict(found, machines)}")
    return {
        "shape": shape.to_dict(),
        "parent": parent.to_dict(),
        "child": child.to_dict(),
        "machines": str(machines),
        "device": asdict(machines.device),
        **found.to_dict(),
    }


def _even_cut(anatomy: Anatomy, settings: PlanSettings) -> Shape:
    """Of the shapes that use up the budget, the one that takes the most even part of every axis."""
    axes = tuple(listed(settings.axes)) or tuple(field for field in WIDTHS if field in anatomy.axes)
    found = candidates(anatomy, Budget.parse(settings.to), settings.context, axes)

    def unevenness(shape: Shape) -> float:
        parts = [_part(anatomy, shape, field) for field in axes]
        return max(parts) - min(parts)

    return min((shape for shape, _ in found), key=unevenness)


def _part(anatomy: Anatomy, shape: Shape, field: str) -> float:
    """What is left of an axis."""
    layers = range(anatomy.num_layers)
    full = len(layers) if field == anatomy.depth_field else max(anatomy.value(anatomy.axis(field), i) for i in layers)
    left = shape.get(field, full)
    return (left if isinstance(left, int) else max(left)) / full


def _memory(found: Plan, machines: Machines) -> Iterator[Any]:
    way = "sharded (fsdp)" if found.fsdp else "whole on each device" if machines.count > 1 else "on one device"
    kept = "recomputed" if found.recompute else "kept"
    yield f"\n[bold]memory of each {machines.device.name}[/]"
    yield f"models {way}, activations {kept}, rows at once: {found.rows}"
    names = {
        "weights": "student, float32" + ("" if found.fsdp else " and bfloat16 copy"),
        "gradients": "gradients",
        "optimizer": "AdamW's moments",
        "teacher": "teacher",
        "gathered": "layers gathered at a time",
        "activations": "activations",
        "logits": "a chunk of logits, head's gradient",
    }
    rows = [(names[name], size(value)) for name, value in asdict(found.memory).items() if value]
    yield _pairs(rows, ("together", size(found.memory.total)), ("there is, less a reserve", size(found.usable)))


def _times(found: Plan, machines: Machines, job: Job) -> Iterator[Any]:
    yield f"\n[bold]time on {machines}, at {job.utilisation:.0%} of the peak[/]"
    passes = f"{4 if found.recompute else 3} x {flops(found.student_flops)}"
    rows = [
        ("work per token: teacher", flops(found.teacher_flops)),
        ("student" + (", recomputing" if found.recompute else ""), passes),
        ("exchange between devices, of computing", f"{found.exchange:.0%}"),
        ("tokens per second", count(found.tokens_per_s)),
    ]
    hours = (f"{count(job.tokens)} tokens, {found.steps:,} steps", f"{figure(found.hours)} hours")
    yield _pairs(rows, hours, ("GPU-hours", count(found.gpu_hours)))


def _pairs(rows: list[tuple[str, str]], *results: tuple[str, str]) -> Table:
    """What and how much, the results under a line of their own."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    for what, value in rows:
        table.add_row(what, value)
    for what, value in results:
        table.add_row(what, value, style="bold")
    return table


def _verdict(found: Plan, machines: Machines) -> str:
    if found.fits:
        flags = [
            f"--distill.fsdp {str(found.fsdp).lower()}",
            f"--distill.gradient_checkpointing {str(found.recompute).lower()}",
        ]
        return f"it fits: --distill.bf16 true {' '.join(flags)}"
    if found.devices_needed is None:
        return "it does not fit on any number of these: a shorter context or a larger device is needed"
    return f"it does not fit: it would on {found.devices_needed} of these, sharded"
