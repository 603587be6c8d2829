"""`transformers.Trainer` for a `Pair`: its loss, what it logs, and checkpoints that are the student.

A checkpoint's folder is the student as `save_pretrained` writes it, and beside it the projection of the state losses,
which `from_pretrained` does not see and the student never holds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

from nestling.distill.pair import Pair
from nestling.errors import CheckpointError, NestlingError
from nestling.hub.quiet import quiet

PROJECTION = "projection.safetensors"


class DistillTrainer(Trainer):
    """Trains the student of a `Pair`."""

    def __init__(self, pair: Pair, **arguments: Any):
        super().__init__(model=pair, **arguments)
        self.pair = pair
        self._parts: dict[str, Tensor] = {}
        self._logged_at = 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch; its parts are kept for the log. Raises `NestlingError` when it is not finite."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not torch.isfinite(loss):
            raise NestlingError(
                f"the loss became {loss.item()} in step {self.state.global_step + 1}: lower the learning rate "
                f"({self.args.learning_rate:g}), or check that teacher and student give finite logits"
            )
        for name, value in outputs.items():
            if name != "loss":
                self._parts[name] = self._parts.get(name, 0.0) + value.detach().float()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, as means over the steps since the last log."""
        if "loss" in logs and self._parts:
            steps = max(1, self.state.global_step - max(self._logged_at, self._initial_global_step))
            totals = {name: self.accelerator.reduce(value, "sum") for name, value in self._parts.items()}
            logs |= {name: total.item() / steps for name, total in totals.items()}
            self._parts, self._logged_at = {}, self.state.global_step
        super().log(logs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        state = state_dict if state_dict is not None else self.pair.state_dict()
        with quiet():
            self.pair.student.save_pretrained(folder, state_dict=_part(state, "student."))
        save_file(_part(state, "projection."), folder / PROJECTION)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise CheckpointError(
                f"the checkpoint of step {self.state.global_step} cannot be written to '{self.args.output_dir}' "
                f"({error}): make room, or set save_every to 0"
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        student = self.pair.student
        with quiet():
            saved = type(student).from_pretrained(resume_from_checkpoint, config=student.config, dtype=student.dtype)
        student.load_state_dict(saved.state_dict())
        self.pair.projection.load_state_dict(load_file(os.path.join(resume_from_checkpoint, PROJECTION)))


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
