"""A shape that was tried, and how losses are measured once and kept.

Knows nothing of how shapes are found: `pick` and `halving` ask here for the loss of the shapes they want to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nestling import processes
from nestling.anatomy.bypass import evaluating
from nestling.cost import Cost
from nestling.errors import NestlingError
from nestling.evaluate.score import token_losses
from nestling.shape import Shape

Batch = Mapping[str, Tensor]
Loss = Callable[[PreTrainedModel], float]
Say = Callable[[str, int], None]


@dataclass(frozen=True)
class Candidate:
    """A shape, what it costs, and how it did; losses are in nats per token.

    expected: what its cuts lose one by one, added up. loss: on calibration text, if it was cut. trained_loss: on text
    that was held back, after `trained_tokens` of training, if it was trained.
    """

    shape: Shape
    cost: Cost
    expected: float
    loss: float | None = None
    trained_loss: float | None = None
    trained_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        known = ("params", "active_params", "memory_bytes", "flops_per_token", "latency_ms")
        return {
            "shape": self.shape.to_dict(),
            **{name: getattr(self.cost, name) for name in known},
            "expected": self.expected,
            "loss": self.loss,
            "trained_loss": self.trained_loss,
            "trained_tokens": self.trained_tokens,
        }


class Losses:
    """The loss of every shape that is asked for, measured once.

    say: told what is measured next, and how many are left with it, of those that were planned.
    """

    def __init__(
        self,
        loss: Loss,
        build: Callable[[Shape], PreTrainedModel],
        known: MutableMapping[str, float] | None = None,
        say: Say = lambda what, left: None,
    ):
        self.build, self.say = build, say
        self._loss, self._known = loss, {} if known is None else known
        self._planned: set[str] = set()
        self._more = 0

    def plan(self, names: Iterable[str], more: int = 0) -> None:
        """Announce what will be measured unless it is known; more: how many others, whose names are not known yet."""
        self._planned |= set(names)
        self._more = more

    def of(self, shape: Shape, build: Callable[[], PreTrainedModel] | None = None) -> float:
        return self.kept(shape, "", lambda: self._loss(build() if build else self.build(shape)))

    def kept(self, shape: Shape, how: str, measure: Callable[[], float]) -> float:
        """What is known of a shape under `how`, or what `measure` finds."""
        key = f"{describe(shape)}{how}"
        if key not in self._known:
            self._planned.add(key)
            self.say(key, len(self._planned - self._known.keys()) + self._more)
            self._known[key] = measure()
        return self._known[key]


def token_loss(batches: Iterable[Batch], chunk: int = 512) -> Loss:
    """A function from a model to its cross-entropy, nats per token; logits exist for `chunk` tokens at a time.

    Several processes share the rows of each batch and get the same loss.
    """
    kept = list(batches)

    def loss(model: PreTrainedModel) -> float:
        total, count = 0.0, 0.0
        with evaluating(model):
            for batch in processes.share(kept):
                ids = batch["input_ids"].to(model.device)
                total += token_losses(model, ids[:, :-1], ids[:, 1:], chunk).sum(dtype=torch.float64).item()
                count += ids[:, 1:].numel()
        total, count = processes.summed(torch.tensor([total, count], dtype=torch.float64)).tolist()
        return total / max(1, count)

    return loss


def best_first(tried: Iterable[Candidate]) -> list[Candidate]:
    """Candidates by their loss. Raises `NestlingError` when none has a finite one."""
    ordered = sorted(tried, key=lambda candidate: finite_or_last(candidate.loss))
    if not math.isfinite(finite_or_last(ordered[0].loss)):
        raise NestlingError(
            f"every shape that was tried gives the loss {ordered[0].loss}: check that the model gives finite logits on "
            f"this text, or load it with --dtype float32"
        )
    return ordered


def finite_or_last(loss: float | None) -> float:
    """NaN compares with nothing, so it would leave a list in no order at all."""
    return loss if loss is not None and math.isfinite(loss) else math.inf


def describe(shape: Mapping[str, object]) -> str:
    """A shape in one line."""
    return ", ".join(f"{field}={value}" for field, value in shape.items()) or "nothing cut"
