"""`Ranking`: the importance of every unit of every axis, and the order that follows from it.

A plain record between scoring and surgery. It knows field names and scores, nothing of how they came about. Ties
are broken by the unit's position, so equal scores give equal rankings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import LongTensor, Tensor

from nestling.errors import CheckpointError, NestlingError

Scores = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Ranking:
    """Scores of every axis, higher is more important.

    scores: config field -> Tensor `[size]` for an axis of the whole model and for the layers, or a tuple with one
        Tensor `[units]` per layer (empty where a layer lacks the axis).
    info: how the scores were made (metrics, tokens, model), plain values.
    """

    scores: Mapping[str, Scores]
    info: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, axis: str) -> LongTensor | list[LongTensor]:
        """Units of an axis, most important first; one LongTensor per layer for a layer's axis."""
        if axis not in self.scores:
            raise NestlingError(f"the ranking has no axis '{axis}': it has {', '.join(self.scores)}")
        scores = self.scores[axis]
        return _order(scores) if isinstance(scores, Tensor) else [_order(layer) for layer in scores]

    def order(self, axis: str, layer: int | None = None) -> LongTensor:
        """Units of an axis in one layer (None for the whole model's), most important first."""
        found = self[axis]
        return found if isinstance(found, Tensor) else found[layer or 0]

    @property
    def fingerprint(self) -> str:
        """A digest of the orders, the same for rankings that sort alike."""
        digest = hashlib.blake2b(digest_size=16)
        for axis in sorted(self.scores):
            found = self[axis]
            for order in [found] if isinstance(found, Tensor) else found:
                digest.update(axis.encode() + order.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file."""
        tensors: dict[str, Tensor] = {}
        for axis, scores in self.scores.items():
            if isinstance(scores, Tensor):
                tensors[axis] = scores.contiguous()
            else:
                tensors |= {f"{axis}/{layer}": value.contiguous() for layer, value in enumerate(scores)}
        save_file(tensors, str(path), metadata={"nestling.ranking": json.dumps(dict(self.info))})

    @classmethod
    def load(cls, path: str | Path) -> Ranking:
        """Read what `save` wrote. Raises `CheckpointError` when the file is missing, damaged or something else."""
        try:
            with safe_open(str(path), "pt") as file:
                info = json.loads((file.metadata() or {})["nestling.ranking"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"'{path}' is not a ranking that can be read ({error}): make one with `nestling rank`"
            ) from error
        scores: dict[str, Scores] = {name: value for name, value in tensors.items() if "/" not in name}
        for axis in sorted({name.partition("/")[0] for name in tensors if "/" in name}):
            count = sum(name.startswith(f"{axis}/") for name in tensors)
            scores[axis] = tuple(tensors[f"{axis}/{layer}"] for layer in range(count))
        return cls(scores, info)


def _order(scores: Tensor) -> LongTensor:
    return torch.sort(scores.double(), descending=True, stable=True).indices  # type: ignore[return-value]
