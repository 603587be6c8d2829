"""Memory of routed experts in training: what is kept for the backward pass, the peak of a step, and the least possible.

Four layers of experts with residuals, 4,096 tokens of 256 channels, float32; the shapes are those of `speed.py`, at
equal FLOPs. Needed is what any implementation that computes nothing twice must keep: each layer's input, the up
projection's output of every slot, weights and choices. The peak is the high-water mark of a fresh process, forward and
backward, above its state before (low by what the process still holds of freed memory, some MiB); the least possible
peak has gradients in it too, and no workspace. Linux only.

    python -m benchmarks.moe.memory
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from benchmarks.moe.speed import SHAPES, build
from benchmarks.record import Record, Row, claim, show
from benchmarks.speed.kd_memory import MIB, status
from torch import Tensor, nn

from nestling.experts import NAME

IMPLEMENTATIONS = (NAME, "eager", "grouped_mm")
LAYERS, TOKENS, HIDDEN, FLOAT, SEED = 4, 4096, 256, 4, 0
FIGURES = ("kept_mib", "needed_mib", "peak_mib", "least_peak_mib")


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(measured(*sys.argv[1:])))
        return
    record = Record("moe", "memory")
    for shape, how in product(SHAPES, IMPLEMENTATIONS):
        record.row({"experts": shape, "implementation": how, "seed": SEED}, partial(apart, shape, how))
        record.save(claims(record))
    show(record.rows, ("experts", "implementation"), FIGURES)


def apart(shape: str, how: str) -> Row:
    """The figures of one arm, from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.moe.memory", shape, how]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(shape: str, how: str) -> Row:
    experts, top_k, width = SHAPES[shape]
    layers = stack(shape, how)
    with torch.no_grad():  # in the memory of the process, before it is measured
        weights = [p.mul_(1) for layer in layers for p in layer.parameters()]
    generator = torch.Generator().manual_seed(SEED)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    index = torch.rand(TOKENS, experts, generator=generator).topk(top_k).indices
    shares = torch.rand(TOKENS, top_k, generator=generator).requires_grad_()
    step(layers, hidden[:64], index[:64], shares[:64])
    for layer in layers:
        layer.zero_grad()
    shares.grad = None
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    step(layers, hidden, index, shares)
    peak, kept = status("VmHWM"), kept_bytes(layers, hidden, index, shares)
    slots = TOKENS * top_k
    needed = TOKENS * HIDDEN * FLOAT + slots * (2 * width * FLOAT + FLOAT + index.element_size())
    gradients = sum(weight.numel() for weight in weights) * FLOAT // LAYERS
    stream = TOKENS * HIDDEN * FLOAT
    least = max(LAYERS * needed + gradients, needed + LAYERS * gradients) + stream
    found = {"kept_mib": kept, "needed_mib": LAYERS * needed, "least_peak_mib": least}
    found = {name: round(value / MIB, 1) for name, value in found.items()}
    return found | {"peak_mib": peak - before, "parameters_mib": round(gradients * LAYERS / MIB, 1)}


def stack(shape: str, how: str) -> list[nn.Module]:
    """The experts of so many layers, all with memory of their own."""
    models = [build(*SHAPES[shape]) for _ in range(LAYERS // 2)]
    for model in models:
        model.set_experts_implementation(how)
    return [layer.mlp.experts for model in models for layer in model.model.layers]


def forward(layers: list[nn.Module], hidden: Tensor, index: Tensor, shares: Tensor) -> Tensor:
    for layer in layers:
        hidden = hidden + layer(hidden, index, shares)
    return hidden


def step(layers: list[nn.Module], hidden: Tensor, index: Tensor, shares: Tensor) -> None:
    forward(layers, hidden, index, shares).sum().backward()


def kept_bytes(layers: list[nn.Module], hidden: Tensor, index: Tensor, shares: Tensor) -> int:
    """Bytes that autograd keeps after a forward pass, parameters excepted, memory that tensors share counted once."""
    own = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
    found: dict[int, int] = {}
    alive: list[Any] = []  # what is freed during the pass must not lend its address to another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(layers, hidden, index, shares)
    return sum(found.values())


def claims(record: Record) -> dict[str, Row]:
    """What is kept over what is needed; the peak over the least possible, and over that of eager."""
    rows = {(row["experts"], row["implementation"]): row for row in record.rows}
    found = {}
    for shape in SHAPES:
        ours, eager = rows.get((shape, NAME)), rows.get((shape, "eager"))
        if ours is None or eager is None:
            continue
        name, what = shape.replace(" ", ""), f"{shape}, {LAYERS} layers of experts, {TOKENS:,} tokens"
        for claimed, figure, other, how in (
            ("kept_vs_needed", ours["kept_mib"], ours["needed_mib"], "bytes kept for the backward pass over the least"),
            ("peak_vs_least", ours["peak_mib"], ours["least_peak_mib"], "peak of a step over the least possible"),
            ("peak_vs_eager", ours["peak_mib"], eager["peak_mib"], "peak of a step over that of transformers' eager"),
        ):
            found[f"memory_{claimed}_{name}"] = claim([figure / other], [SEED], f"{how}: {what}", "x")
    return found


if __name__ == "__main__":
    main()
