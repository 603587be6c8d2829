"""What a cache keeps: tokens per slot by layer, head and position, with the decisions of decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nestling.anatomy import decoder
from nestling.anatomy.bypass import evaluating
from nestling.dmc.convert import is_converted
from nestling.dmc.runtime.heads import Decisions
from nestling.dmc.runtime.modeling import recording
from nestling.errors import DataError, NestlingError
from nestling.train import model_inputs


@dataclass(frozen=True)
class Compression:
    """Tokens per slot, over everything; per layer; per layer and head; and per stretch of positions (`PARTS` of them).

    layers: numbers of the layers that `by_layer` and `by_head` speak of. tokens: on how many this was measured.
    """

    ratio: float
    layers: tuple[int, ...]
    by_layer: tuple[float, ...]
    by_head: tuple[tuple[float, ...], ...]
    by_position: tuple[float, ...]
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON and the config."""
        return {
            "ratio": round(self.ratio, 4),
            "layers": list(self.layers),
            "by_layer": [round(value, 3) for value in self.by_layer],
            "by_head": [[round(value, 3) for value in heads] for heads in self.by_head],
            "by_position": [round(value, 3) for value in self.by_position],
            "tokens": self.tokens,
        }


PARTS = 16


def measure(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Compression:
    """The compression of a converted model on batches `{"input_ids": [batch, seq]}`, maybe with `attention_mask`.

    Raises `NestlingError` for a model without gates and `DataError` for no text.
    """
    kept: list[Tensor] = []
    tokens = 0
    place: list[Tensor] = [torch.zeros(PARTS), torch.zeros(PARTS)]
    for decisions in decided(model, batches):
        valid = decisions[0].valid
        appended = [(~d.quiet & valid[:, None]).double() for d in decisions]
        found = [part.sum((0, 2)) for part in appended]
        kept = [a + b for a, b in zip(kept, found, strict=True)] if kept else found
        tokens += int(valid.sum())
        _add_positions(place, appended, valid)
    return _summary(model, kept, tokens, place)


def decided(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[list[Decisions]]:
    """Every layer's decisions on each of the batches, without noise. Raises as `measure` does for models and text."""
    if not is_converted(model):
        raise NestlingError("this model's cache is not compressed: retrofit it first")
    decisions = None
    with evaluating(model):
        for batch in batches:
            mask = batch.get("attention_mask")
            mask = mask.to(model.device) if mask is not None else None
            with recording(model) as decisions:
                decoder(model)(**model_inputs(batch["input_ids"].to(model.device), mask))
            yield decisions
    if decisions is None:
        raise DataError("there is no text to measure the ratio on: give at least one batch")


def _add_positions(place: list[Tensor], appended: list[Tensor], valid: Tensor) -> None:
    part = torch.arange(valid.shape[1]) * PARTS // valid.shape[1]
    heads = sum(layer.shape[1] for layer in appended)
    slots = torch.stack([layer.sum((0, 1)) for layer in appended]).sum(0)
    place[0].index_add_(0, part, valid.sum(0).float().cpu() * heads)
    place[1].index_add_(0, part, slots.float().cpu())


def _summary(model: PreTrainedModel, kept: list[Tensor], tokens: int, place: list[Tensor]) -> Compression:
    layers = tuple(layer for layer, kind in enumerate(model.config.dmc_layers) if kind is not None)
    heads = sum(len(layer) for layer in kept)
    return Compression(
        ratio=tokens * heads / float(sum(layer.sum() for layer in kept)),
        layers=layers,
        by_layer=tuple(tokens * len(layer) / float(layer.sum()) for layer in kept),
        by_head=tuple(tuple(tokens / float(slots) for slots in layer) for layer in kept),
        by_position=tuple((place[0] / place[1].clamp_min(1)).tolist()),
        tokens=tokens,
    )
