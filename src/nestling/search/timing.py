"""Timing the parts of models of different sizes, on this machine and now.

Each model has random weights, sizes drawn from the search grid, and as many layers as it takes to leave the processor's
caches. It decodes a few tokens while hooks note how long each part takes.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from nestling.anatomy import Anatomy, cache_name, decoder
from nestling.anatomy.bypass import evaluating
from nestling.search.parts import Part, Work, parts
from nestling.search.space import Pricing, allowed, grid
from nestling.shape import child_config

PROBES = 16  # models that are timed
ROUNDS = 2  # passes over them, the second in reverse; the faster one counts
TIMED = PROBES * ROUNDS  # how often `measure` tells its progress
STEPS = 12  # tokens decoded in each
LAYER_BYTES = 256 << 20  # weights of a probe's layers, if the parent has so many: more than processors keep close


@dataclass(frozen=True)
class Sample:
    """One part at one size: the sizes of its letters, what it reads, and how long it took."""

    sizes: tuple[int, ...]
    reads: tuple[float, float]
    seconds: float


def measure(
    anatomy: Anatomy,
    device: torch.device,
    dtype: torch.dtype,
    work: Work,
    progress: Callable[[int], None] | None = None,
    count: int = PROBES,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Sample]]:
    """Part -> its times at the sizes of each of some models.

    progress: told of each model that was timed, in each round.
    clock: gives seconds; with one thread on a machine that others use, `time.process_time` tells more.
    """
    layers = _layers(anatomy, dtype)
    shapes = probes(anatomy, layers, count)
    fastest: dict[tuple[int, str], Sample] = {}
    for turn in range(ROUNDS):
        order = list(enumerate(shapes))
        for number, shape in order if turn % 2 == 0 else reversed(order):
            for name, sample in _timed(anatomy, shape, layers, (device, dtype), work, clock).items():
                known = fastest.get((number, name))
                if known is None or sample.seconds < known.seconds:
                    fastest[number, name] = sample
            if progress is not None:
                progress(1)
    samples: dict[str, list[Sample]] = {}
    for (_, name), sample in sorted(fastest.items(), key=lambda item: item[0]):
        samples.setdefault(name, []).append(sample)
    return samples


def _layers(anatomy: Anatomy, dtype: torch.dtype) -> int:
    """How many of the first layers a probe has: every kind of part, and more weights than a cache holds."""
    names = {part.name for part in parts(anatomy)}
    for count in range(1, anatomy.num_layers + 1):
        seen = {part.name for part in parts(anatomy) if part.layer is None or part.layer < count}
        weights = sum(
            math.prod(dimension.size(anatomy.sizes(spec.layer)) for dimension in spec.layout)
            for spec in anatomy.tensors.values()
            if spec.layer is not None and spec.layer < count
        )
        if seen == names and weights * dtype.itemsize >= LAYER_BYTES:
            return count
    return anatomy.num_layers


def probes(anatomy: Anatomy, layers: int, count: int) -> list[dict[str, int]]:
    """Sizes to time: everything whole, everything smallest, and draws from the grid between them."""
    options = {name: grid(anatomy, axis, 0.25) for name, axis in anatomy.axes.items()}
    rng, pricing = random.Random(0), Pricing(anatomy)
    drawn = [{name: sizes[end] for name, sizes in options.items()} for end in (0, -1)]
    drawn += [{name: rng.choice(sizes) for name, sizes in options.items()} for _ in range(50 * count)]
    found: list[dict[str, int]] = []
    for sizes in drawn:
        shape = sizes | {anatomy.depth_field: layers}
        if len(found) < count and shape not in found and allowed(pricing, pricing.capped(shape)):
            found.append(shape)
    return found


def _timed(
    anatomy: Anatomy,
    sizes: dict[str, int],
    layers: int,
    kept: tuple[torch.device, torch.dtype],
    work: Work,
    clock: Callable[[], float],
) -> dict[str, Sample]:
    """Build a model of these sizes and time its parts, each by the median over steps and layers."""
    pricing = Pricing(anatomy)
    config = child_config(anatomy, pricing.form(pricing.capped(sizes), check_config=False))
    with torch.random.fork_rng(enabled=True), kept[0]:
        model = AutoModelForCausalLM.from_config(config, dtype=kept[1]).eval()
    child = Anatomy.of(model)
    taken = _decode(model, child, work, clock)
    medians: dict[str, list[float]] = {}
    for part, seconds in taken.items():
        medians.setdefault(part.name, []).extend(seconds)
    samples = {}
    for part in parts(child):
        here = child.sizes(part.layer)
        letters = tuple(here[letter] for letter in part.letters)
        typical = max(1e-9, statistics.median(medians[part.name]))
        samples[part.name] = Sample(letters, part.reads(child, here, work), typical)
    return samples


def _decode(
    model: PreTrainedModel, anatomy: Anatomy, work: Work, clock: Callable[[], float]
) -> dict[Part, list[float]]:
    """Seconds of every part in each of a few steps of decoding."""
    prompt = torch.ones(work.batch, work.context, dtype=torch.long, device=model.device)
    hooks, name = _Clock(model.device, clock), cache_name(model)
    with evaluating(model):
        cached = {name: getattr(decoder(model)(input_ids=prompt, use_cache=True), name)}
        with hooks.on(model, anatomy):
            for _ in range(2 + STEPS):
                model(input_ids=prompt[:, :1], use_cache=True, **cached)
    return {part: seconds[2:] for part, seconds in hooks.shares(anatomy).items()}


class _Clock:
    """Hooks that note how long modules take."""

    def __init__(self, device: torch.device, clock: Callable[[], float]):
        self.device, self.clock = device, clock
        self.seconds: dict[str, list[float]] = {}
        self._started: dict[str, float] = {}

    @contextmanager
    def on(self, model: nn.Module, anatomy: Anatomy) -> Iterator[None]:
        names = {part.module for part in parts(anatomy) if part.module is not None}
        names |= {anatomy.layer_path(layer) for layer in range(anatomy.num_layers)} | {""}
        with ExitStack() as hooks:
            for name in names:
                module = model.get_submodule(name)
                hooks.callback(module.register_forward_pre_hook(self._start(name)).remove)
                hooks.callback(module.register_forward_hook(self._stop(name)).remove)
            yield

    def shares(self, anatomy: Anatomy) -> dict[Part, list[float]]:
        """Seconds of every part in every step; parts without a module have what those with one leave."""
        result, layers = {}, [self.seconds[anatomy.layer_path(layer)] for layer in range(anatomy.num_layers)]
        for part in parts(anatomy):
            if part.module is not None:
                result[part] = self.seconds[part.module]
        for part in parts(anatomy):
            if part.module is None:
                whole = self.seconds[""] if part.layer is None else layers[part.layer]
                inside = [seconds for other, seconds in result.items() if other.layer == part.layer and other.module]
                inside += layers if part.layer is None else []
                result[part] = [total - sum(shares) for total, *shares in zip(whole, *inside, strict=True)]
        return result

    def _start(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._started[name] = self._now()

        return hook

    def _stop(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.seconds.setdefault(name, []).append(self._now() - self._started[name])

        return hook

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return self.clock()
