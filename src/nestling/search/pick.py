"""Choosing a shape: the candidates that promise most are cut and scored on calibration text, the best one wins.

What an axis loses on its own is measured at a few sizes; the losses of several axes are taken to add up, which is
enough to leave hopeless candidates out (it is a filter, not a verdict). The few that remain are really cut and their
loss is measured. Paper: Minitron, arXiv 2407.14679, section 2.3; its ranking by short retraining is left to the caller.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nestling.anatomy import Anatomy
from nestling.anatomy.bypass import evaluating
from nestling.cost import Cost
from nestling.evaluate.score import token_losses
from nestling.ranking import Ranking
from nestling.shape import Shape
from nestling.surgery import prune

Batch = Mapping[str, Tensor]
Loss = Callable[[PreTrainedModel], float]


@dataclass(frozen=True)
class Candidate:
    """A shape, what it costs, what it was expected to lose and, if it was tried, its loss in nats per token."""

    shape: Shape
    cost: Cost
    expected: float
    loss: float | None = None

    def to_dict(self) -> dict:
        return {
            "shape": self.shape.to_dict(),
            "params": self.cost.params,
            "flops_per_token": self.cost.flops_per_token,
            "expected": self.expected,
            "loss": self.loss,
        }


def token_loss(batches: Iterable[Batch], chunk: int = 512) -> Loss:
    """A function from a model to its cross-entropy, nats per token; logits exist for `chunk` tokens at a time."""
    kept = list(batches)

    def loss(model: PreTrainedModel) -> float:
        total, count = 0.0, 0
        with evaluating(model):
            for batch in kept:
                ids = batch["input_ids"].to(model.device)
                total += token_losses(model, ids[:, :-1], ids[:, 1:], chunk).sum(dtype=torch.float64).item()
                count += ids[:, 1:].numel()
        return total / max(1, count)

    return loss


def pick(
    model: PreTrainedModel,
    ranking: Ranking,
    candidates: list[tuple[Shape, Cost]],
    batches: Iterable[Batch],
    finalists: int = 6,
    build: Callable[[Shape], PreTrainedModel] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Candidate]:
    """Candidates with their losses, best first; only the `finalists` that promise most are tried.

    batches: calibration text. build: makes the model of a shape, `prune` unless given. progress: told what is tried.
    """
    loss, build = token_loss(batches), build or (lambda shape: prune(model, ranking, shape))
    say = progress or (lambda text: None)
    anatomy = Anatomy.of(model)
    curves = _sensitivity(anatomy, loss(model), [shape for shape, _ in candidates], lambda s: loss(build(s)), say)
    promising = sorted(
        (Candidate(shape, cost, _expected(anatomy, shape, curves)) for shape, cost in candidates),
        key=lambda candidate: candidate.expected,
    )
    tried = []
    for candidate in promising[:finalists]:
        say(f"trying {describe(candidate.shape)}")
        tried.append(Candidate(candidate.shape, candidate.cost, candidate.expected, loss(build(candidate.shape))))
    return sorted(tried, key=lambda candidate: candidate.loss or 0.0)


def describe(shape: Mapping[str, object]) -> str:
    """A shape in one line."""
    return ", ".join(f"{field}={value}" for field, value in shape.items()) or "nothing cut"


Curve = list[tuple[int, float]]


def _sensitivity(
    anatomy: Anatomy,
    whole: float,
    shapes: list[Shape],
    loss: Callable[[Shape], float],
    say: Callable[[str], None],
) -> dict[str, Curve]:
    """For each axis the loss it adds alone, at the smallest size in use and halfway there: points by rising size."""
    curves = {}
    for field in sorted({field for shape in shapes for field in shape}):
        used = sorted({size for shape in shapes if isinstance(size := shape.get(field), int)})
        full = anatomy.num_layers if field == anatomy.depth_field else anatomy.value(anatomy.axis(field), 0)
        points = {used[0], used[len(used) // 2]} - {full}
        curve = [(full, 0.0)]
        for size in sorted(points, reverse=True):
            say(f"trying {field}={size}")
            curve.append((size, max(0.0, loss(Shape(**{field: size})) - whole)))
        curves[field] = sorted(curve)
    return curves


def _expected(anatomy: Anatomy, shape: Shape, curves: Mapping[str, Curve]) -> float:
    return sum(_interpolate(curves[field], size) for field, size in shape.items() if isinstance(size, int))


def _interpolate(curve: Curve, size: int) -> float:
    sizes = [point for point, _ in curve]
    right = min(len(curve) - 1, max(1, bisect.bisect_left(sizes, size)))
    if len(curve) == 1:
        return curve[0][1]
    (a, low), (b, high) = curve[right - 1], curve[right]
    return low + (high - low) * (size - a) / (b - a)
