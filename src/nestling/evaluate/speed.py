"""Tokens per second of several models, measured side by side.

All models run in this process, one after the other within each round and in reversed order every other round, so
that what slows the machine down slows all of them. Prefill is one forward pass over a prompt; decode is one token at
a time after it, with the model's cache. The figure is the median over rounds; fastest and slowest round go with it.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nestling.anatomy import cache_name
from nestling.anatomy.bypass import evaluating
from nestling.errors import DataError


@dataclass(frozen=True)
class Speed:
    """Medians over rounds, the range over rounds, and what was measured; `batch` sequences count together."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prompt_tokens: int
    new_tokens: int
    batch: int
    prefill_range: tuple[float, float]
    decode_range: tuple[float, float]
    rounds: int


def speed(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    batch: int = 1,
    rounds: int = 5,
    warmup: int = 1,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Speed]:
    """Prefill and decode speed of each model, interleaved in `rounds` rounds after `warmup` that do not count.

    Prompts are random tokens; the speed does not depend on which. `progress` is called with 1 after each round.
    Raises `DataError` for sizes below 1.
    """
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch, "rounds": rounds}
    for name, value in sizes.items():
        if value < 1:
            raise DataError(f"{name} {value} is not possible: give at least 1")
    names = list(models)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    prompts = {name: _prompt(model, batch, prompt_tokens, seed) for name, model in models.items()}
    for turn in range(warmup + rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            seconds = _measure(models[name], prompts[name], new_tokens)
            if turn >= warmup:
                taken[name].append(seconds)
        if progress is not None:
            progress(1)
    return {name: _summary(found, prompt_tokens, new_tokens, batch) for name, found in taken.items()}


def _prompt(model: PreTrainedModel, batch: int, tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.get_text_config().vocab_size, (batch, tokens), generator=generator)
    return ids.to(model.device)


def _measure(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill and of `new_tokens` decoding steps after it."""
    # Only the last position's logits are needed; whole-prompt logits would be most of a small model's prefill.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache = cache_name(model)
    with evaluating(model):
        start = _now(model)
        output = model(input_ids=prompt, use_cache=True, **last)
        middle = _now(model)
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, use_cache=True, **{cache: output[cache]}, **last)
        return middle - start, _now(model) - middle


def _now(model: PreTrainedModel) -> float:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter()


def _summary(taken: list[tuple[float, float]], prompt_tokens: int, new_tokens: int, batch: int) -> Speed:
    prefill = [batch * prompt_tokens / seconds for seconds, _ in taken]
    decode = [batch * new_tokens / seconds for _, seconds in taken]
    return Speed(
        prefill_tokens_per_s=statistics.median(prefill),
        decode_tokens_per_s=statistics.median(decode),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        prefill_range=(min(prefill), max(prefill)),
        decode_range=(min(decode), max(decode)),
        rounds=len(taken),
    )
