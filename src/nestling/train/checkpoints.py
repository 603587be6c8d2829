"""Checkpoints of a training run: which are whole, which is the newest, and sealing one when it is written.

`Trainer` writes a checkpoint file by file. When the last is there, a seal (`complete.json`: names and sizes of all
files, and what the run is made of) is renamed into place; a folder without a seal that fits was interrupted and does
not count. Weights are safetensors; the optimizer's and the random generators' state are torch files, which `Trainer`
reads with `weights_only=True`, so nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nestling.errors import CheckpointError
from nestling.runs import difference, plain, whole

SEAL = "complete.json"
PREFIX = "checkpoint-"
NUMBERS_SEEN = 64  # of each tensor of a model


@dataclass(frozen=True)
class Making:
    """What a run makes its model of: the settings, and a fingerprint of each model and of the data, by name."""

    settings: Any
    parts: Mapping[str, str]

    def kept(self) -> dict[str, Any]:
        """As a seal holds it."""
        return {"settings": plain(self.settings), "parts": dict(self.parts)}

    def differs(self, kept: Any) -> str | None:
        """What differs from a run whose seal holds `kept`, in words, or None."""
        if not isinstance(kept, dict):
            return "settings that were not kept, by an earlier version"
        words = difference(kept["settings"], self.settings)
        if words is not None:
            return words
        other = [name for name in {**kept["parts"], **self.parts} if kept["parts"].get(name) != self.parts.get(name)]
        return f"another {other[0]}" if other else None


def newest(folder: Path, making: Making) -> Path | None:
    """The newest complete checkpoint in `folder`, or None. Raises `CheckpointError` when another run wrote it."""
    for checkpoint in sorted(_all(folder), key=_step, reverse=True):
        seal = _seal(checkpoint)
        if seal is None:
            continue
        if differs := making.differs(seal.get("run")):
            raise CheckpointError(
                f"'{checkpoint}' belongs to a run with {differs}: resume with what it was begun with, pass "
                f"resume=False to start anew, or name another run folder"
            )
        return checkpoint
    return None


def clear(folder: Path, keep: Path | None = None) -> None:
    """Remove all checkpoints, complete or not, except `keep`."""
    for checkpoint in _all(folder):
        if checkpoint != keep:
            shutil.rmtree(checkpoint, ignore_errors=True)


def fingerprint(*values: Any) -> str:
    """A short digest of plain values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_of(model: nn.Module, weights: bool = True) -> str:
    """A short digest of a model: names and sizes of its tensors, and a few numbers of each unless told not to."""
    sizes = [(name, list(parameter.shape)) for name, parameter in model.named_parameters()]
    return fingerprint(sizes, *([[_some(p) for p in model.parameters()]] if weights else []))


def _some(weights: torch.Tensor) -> list[float]:
    """Numbers spread over a tensor."""
    flat = weights.detach().flatten()
    return flat[:: max(1, len(flat) // NUMBERS_SEEN)].float().tolist()


class Seal(TrainerCallback):
    """Seals each checkpoint once every process has written its part, then removes the older ones."""

    def __init__(self, making: Making):
        self.making = making

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if not args.should_save:
            return
        checkpoint = Path(str(args.output_dir), f"{PREFIX}{state.global_step}")
        _write_seal(checkpoint, self.making)
        clear(checkpoint.parent, keep=checkpoint)


def _write_seal(checkpoint: Path, making: Making) -> None:
    files = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}
    files.pop(SEAL, None)
    for path in files.values():
        _flush(path)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    text = json.dumps({"run": making.kept(), "files": sizes}, indent=1)
    with whole(checkpoint / SEAL) as beside:
        beside.write_text(text)
        _flush(beside)


def _seal(checkpoint: Path) -> dict[str, Any] | None:
    """What the seal says, or None if there is none or a file is missing or of another size."""
    try:
        seal = json.loads((checkpoint / SEAL).read_text())
        whole = all((checkpoint / name).stat().st_size == size for name, size in seal["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return seal if whole else None


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and re.fullmatch(rf"{PREFIX}\d+", path.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
