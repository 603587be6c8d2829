"""What a router wishes for before it has learned: what each size of each axis costs in loss, measured one at a time.

A run of a few hundred steps moves a router's logits less than their noise does, so where it starts is where it ends.
`probed` runs the parent with one axis of one row at a smaller size and all else whole, and takes the divergence of its
distributions from the parent's; sizes between those measured are interpolated. Tilted by their cost (`target.project`)
such logits pick, to first order, the sizes that lose least within a budget. Without text, `even` asks for about the
same part of every axis. The paper starts at random (Nemotron Elastic, arXiv 2511.16664, section 3.3).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from nestling import processes
from nestling.anatomy.bypass import evaluating
from nestling.elastic.soft import Softened
from nestling.elastic.space import Space
from nestling.elastic.target import Target
from nestling.runs import write_atomically
from nestling.train.checkpoints import Making, fingerprint, fingerprint_of

POINTS = 3  # sizes measured of an axis with one decision for all layers
POINTS_EACH = 2  # and of one with a decision for each layer
MAKING = "making"  # what kept losses say of where they are from


def even(space: Space, target: Target) -> dict[str, Tensor]:
    """Losses `[rows, choices]` that make the same part of every axis the best there is for a budget."""
    weights = torch.ones(len(space.flat_sizes), 1) if target.tilt is None else target.tilt
    worth = torch.where(weights > 0, weights, 1.0)
    return space.unpack(worth * (1 - space.flat_sizes / space.flat_sizes[:, :1]) ** 2)


@torch.no_grad()
def probed(model: PreTrainedModel, space: Space, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Nats per token that each size of each row loses, all else whole: `[rows, choices]` for each knob, rising.

    model: sorted.
    """
    softened, whole = Softened(model, space), _whole(space)
    ids = [batch["input_ids"].to(model.device) for batch in batches]
    losses = {field: torch.zeros_like(knob.sizes) for field, knob in space.knobs.items()}
    with evaluating(model):
        for part in ids:
            wanted = F.log_softmax(model(input_ids=part).logits.float(), -1)
            for field, row, choice in measured(space):
                with softened.under(_with_choice(whole, field, row, choice)) as smaller:
                    found = F.log_softmax(smaller(input_ids=part).logits.float(), -1)
                losses[field][row, choice] += F.kl_div(found, wanted, reduction="sum", log_target=True).item()
    tokens = sum(part.numel() for part in ids)
    return {field: _between(knob.sizes, losses[field] / tokens) for field, knob in space.knobs.items()}


def probed_once(
    model: PreTrainedModel,
    space: Space,
    batches: Sequence[Mapping[str, Any]],
    settings: Any,
    folder: Path | None,
    resume: bool,
) -> dict[str, Tensor]:
    """As `probed`, kept in a run folder, as it is read off the untrained model; nothing without text.

    What is there is taken if it is of the same settings, model, choices and text. The first process alone works.
    """
    if not batches:
        return {}
    choices = fingerprint([*space.knobs], space.flat_sizes.tolist(), space.rank.tolist())
    text = fingerprint([batch["input_ids"].tolist() for batch in batches])
    making = Making(settings, {"parent": fingerprint_of(model), "choices": choices, "text": text})
    path = folder and folder / "probes.safetensors"

    def made() -> dict[str, Tensor]:
        found = _kept(path, making) if path and resume else None
        if found is None:
            found = probed(model, space, batches)
            if path:
                said = {MAKING: json.dumps(making.kept())}
                write_atomically(path, lambda temporary: save_file(found, temporary, metadata=said))
        return found

    return processes.tensors(made)


def _kept(path: Path, making: Making) -> dict[str, Tensor] | None:
    """The tensors in a file, if it is there, whole, and made of the same."""
    try:
        with safe_open(path, "pt") as file:
            kept = json.loads((file.metadata() or {}).get(MAKING, "null"))
        return None if making.differs(kept) else load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


def measured(space: Space) -> Iterator[tuple[str, int, int]]:
    """The sizes that are run: knob, row, choice."""
    for field, knob in space.knobs.items():
        for row in range(len(knob.rows)):
            for choice in _points(*knob.sizes.shape):
                yield field, row, choice


def _points(rows: int, choices: int) -> list[int]:
    """Which choices of a knob are run, the smallest among them."""
    count = min(POINTS if rows == 1 else POINTS_EACH, choices - 1)
    return [round((choices - 1) * (i + 1) / count) for i in range(count)]


def _whole(space: Space) -> dict[str, Tensor]:
    first = {field: torch.zeros_like(knob.sizes) for field, knob in space.knobs.items()}
    for value in first.values():
        value[:, 0] = 1
    return first


def _with_choice(chances: Mapping[str, Tensor], field: str, row: int, choice: int) -> dict[str, Tensor]:
    changed = chances[field].clone()
    changed[row] = 0
    changed[row, choice] = 1
    return {**chances, field: changed}


def _between(sizes: Tensor, losses: Tensor) -> Tensor:
    """Losses `[rows, choices]` between those measured, on straight lines over the size; never falling."""
    filled = losses.clone()
    points = [0, *_points(*sizes.shape)]
    for low, high in itertools.pairwise(points):
        part = (sizes[:, low, None] - sizes[:, low:high]) / (sizes[:, low] - sizes[:, high])[:, None]
        filled[:, low:high] = losses[:, low, None] + part * (losses[:, high] - losses[:, low])[:, None]
    return filled.cummax(-1).values
