"""Timing the parts of models of different sizes, on this machine and now.

Each model has random weights, sizes drawn from the search grid, and as many layers as it takes to leave the processor's
caches. It decodes a few tokens in turns with the parent while hooks note how long each part takes.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
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
STEPS = 16  # tokens decoded in each
WARM = 2  # tokens before those
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
    """Part -> its times at the sizes of each of some models. progress: told of each model that was timed.

    Every model decodes in turns with the first, which is the parent but for its number of layers, and its times are
    taken as multiples of the parent's beside it: what else the machine does in those seconds slows both alike.
    clock: gives seconds; with one thread on a machine that others use, `time.process_time` tells more.
    """
    layers = _layers(anatomy, dtype)
    shapes = probes(anatomy, layers, count)
    whole = _Decoder(anatomy, shapes[0], (device, dtype), work)
    multiples: list[dict[str, tuple[Sample, float]]] = []
    wholes: list[dict[str, float]] = []
    for shape in shapes:
        probe = _Decoder(anatomy, shape, (device, dtype), work)
        beside, own = _in_turns([whole, probe], clock)
        wholes.append(beside)
        multiples.append({name: (sample, own[name] / beside[name]) for name, sample in probe.samples().items()})
        if progress is not None:
            progress(1)
    typical = {name: statistics.median(one[name] for one in wholes) for name in wholes[0]}
    return {
        name: [replace(one[name][0], seconds=one[name][1] * seconds) for one in multiples]
        for name, seconds in typical.items()
    }


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


class _Decoder:
    """A model of some sizes with random weights, its cache filled with the tokens before those that are timed."""

    def __init__(
        self, anatomy: Anatomy, sizes: dict[str, int], kept: tuple[torch.device, torch.dtype], work: Work
    ) -> None:
        pricing = Pricing(anatomy)
        config = child_config(anatomy, pricing.form(pricing.capped(sizes), check_config=False))
        with torch.random.fork_rng(enabled=True), kept[0]:
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=kept[1]).eval()
        self.anatomy, self.work = Anatomy.of(self.model), work
        self.prompt = torch.ones(work.batch, work.context, dtype=torch.long, device=self.model.device)
        self.cache_name = cache_name(self.model)
        with evaluating(self.model):
            self.filled = getattr(decoder(self.model)(input_ids=self.prompt, use_cache=True), self.cache_name)

    @contextmanager
    def decoding(self, clock: _Clock) -> Iterator[Callable[[], None]]:
        """A function that decodes one more token, timed, after the filled cache."""
        cached: dict[str, Any] = {self.cache_name: copy.deepcopy(self.filled)}
        with evaluating(self.model), clock.on(self.model, self.anatomy):
            yield lambda: self.model(input_ids=self.prompt[:, :1], use_cache=True, **cached)

    def typical(self, clock: _Clock) -> dict[str, float]:
        """Part -> the median of its seconds over steps and layers."""
        taken: dict[str, list[float]] = {}
        for part, seconds in clock.shares(self.anatomy).items():
            taken.setdefault(part.name, []).extend(seconds[WARM:])
        return {name: max(1e-9, statistics.median(seconds)) for name, seconds in taken.items()}

    def samples(self) -> dict[str, Sample]:
        """Part -> its sizes and what it reads, not yet timed."""
        found = {}
        for part in parts(self.anatomy):
            here = self.anatomy.sizes(part.layer)
            letters = tuple(here[letter] for letter in part.letters)
            found[part.name] = Sample(letters, part.reads(self.anatomy, here, self.work), math.nan)
        return found


def _in_turns(models: list[_Decoder], clock: Callable[[], float]) -> list[dict[str, float]]:
    """Seconds of the parts of each model, which decode one token each in turns."""
    clocks = [_Clock(one.model.device, clock) for one in models]
    with ExitStack() as ready:
        steps = [ready.enter_context(one.decoding(own)) for one, own in zip(models, clocks, strict=True)]
        for _ in range(WARM + STEPS):
            for step in steps:
                step()
    return [one.typical(own) for one, own in zip(models, clocks, strict=True)]


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
