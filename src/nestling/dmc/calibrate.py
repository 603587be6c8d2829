"""`calibrate`: move the point at which gates decide until a model holds the tokens per slot that were asked for.

A retrofit ends near its ratio, above it where the loss from one side lets it, or below it after few steps. What it has
learnt is which tokens merge rather than others, so the order of the logits stays and one number moves: the offset of
all heads. The next offset is read off the logits at the last one; decisions of deeper layers follow from those of
earlier ones, so it takes a few rounds, within a bracket that halves when the estimate leaves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nestling.dmc.learner import merged_part
from nestling.dmc.measure import decided
from nestling.errors import NestlingError

NEAR = 0.005  # of the ratio: as near as it has to be
ROUNDS = 12


class Calibrated(NamedTuple):
    """Tokens per slot before the offset was moved, and after."""

    before: float
    after: float


def calibrate(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], ratio: float) -> Calibrated:
    """Move `config.dmc["offset"]`, in place, to where the model has `ratio` tokens per slot; returns both ratios.

    batches: `{"input_ids": [batch, seq]}`, maybe with `attention_mask`; a few thousand tokens are enough. Gates that
    tell no tokens apart can merge none or all: then what comes nearest stays, often as it was.
    Raises `NestlingError` for a model without gates or a ratio below 1, and `DataError` for no text.
    """
    if not ratio >= 1:
        raise NestlingError(f"ratio {ratio} is not possible: give how many tokens shall share a slot, say 4")
    gates = getattr(model.config, "dmc", {})
    goal = 1 - 1 / ratio
    tried: dict[float, float] = {}
    low = high = 0.0
    for _ in range(ROUNDS):
        part, logits = _decided(model, batches)
        offset = gates["offset"]
        if not tried:  # where all merge, and where none does
            low, high = offset + logits.min().item() - 1, offset + logits.max().item() + 1
        tried[offset] = 1 / (1 - part) if part < 1 else float("inf")
        if abs(tried[offset] / ratio - 1) <= NEAR:
            break
        low, high = (max(low, offset), high) if part > goal else (low, min(high, offset))
        gates["offset"] = _next(offset, part, goal, logits, low, high)
    gates["offset"] = min(tried, key=lambda offset: abs(log(tried[offset] / ratio)))
    return Calibrated(next(iter(tried.values())), tried[gates["offset"]])


def _next(offset: float, part: float, goal: float, logits: Tensor, low: float, high: float) -> float:
    """Where as many logits as should merge would be above 0, if as large a part of those counts as does now."""
    positive = (logits > 0).double().mean().item()
    counts = part / positive if part > 0 else 1.0
    wanted = min(max(round(goal / counts * len(logits)), 1), len(logits) - 1)
    guess = offset + logits.kthvalue(len(logits) - wanted).values.item()
    return guess if low < guess < high else (low + high) / 2


def _decided(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> tuple[float, Tensor]:
    """The part of tokens that merge, over layers and heads, and all logits of real tokens `[any]`."""
    merged, tokens, logits = 0.0, 0, []
    for decisions in decided(model, batches):
        valid = decisions[0].valid
        merged += (merged_part(decisions).double() * valid.sum(1)).sum().item()
        tokens += int(valid.sum())
        logits += [d.logits.transpose(1, 2)[valid].flatten().cpu() for d in decisions]
    return merged / tokens, torch.cat(logits)
