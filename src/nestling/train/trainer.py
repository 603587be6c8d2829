"""`transformers.Trainer` for a `Learner`: its loss, what it logs, and checkpoints that are the student.

A checkpoint's folder is the student as `save_pretrained` writes it, and beside it whatever else the learner trains
(`learner.safetensors`), which `from_pretrained` does not see and the student never holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nestling.errors import CheckpointError, NestlingError
from nestling.hub.quiet import quiet
from nestling.train.learner import Learner

BESIDE = "learner.safetensors"
STUDENT = "student."


class LearnerTrainer(Trainer):
    """Trains a `Learner`."""

    def __init__(self, learner: Learner, **arguments: Any):
        super().__init__(model=learner, **arguments)
        self.learner = learner
        self.add_callback(_Begin(learner))
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

    def create_optimizer(self, *arguments: Any, **keywords: Any) -> torch.optim.Optimizer:
        """As `Trainer` does, with the learning rate of some parameters multiplied as the learner says."""
        optimizer = super().create_optimizer(*arguments, **keywords)
        if self.learner.rates:
            names: dict[Tensor, str] = {parameter: name for name, parameter in self.learner.named_parameters()}
            groups = [part for group in optimizer.param_groups for part in _by_rate(group, names, self.learner.rates)]
            optimizer.param_groups.clear()
            for group in groups:
                optimizer.add_param_group(group)
        return optimizer

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Only matrices decay: norms, biases and the decay rates of a state space are no weights to shrink."""
        matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
        return [name for name in super().get_decay_parameter_names(model) if name in matrices]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        state = state_dict if state_dict is not None else self.learner.state_dict()
        ours = {name.removeprefix(STUDENT): value for name, value in state.items() if name.startswith(STUDENT)}
        with quiet():
            self.learner.student.save_pretrained(folder, state_dict=ours)
        save_file({name: value for name, value in state.items() if not name.startswith(STUDENT)}, folder / BESIDE)

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
        student = self.learner.student
        with quiet():
            saved = type(student).from_pretrained(resume_from_checkpoint, config=student.config, dtype=student.dtype)
        student.load_state_dict(saved.state_dict())
        beside = load_file(os.path.join(resume_from_checkpoint, BESIDE))
        self.learner.load_state_dict(beside, strict=False)  # the student's tensors are not in it


class _Begin(TrainerCallback):
    """Tells the learner of each step before it begins."""

    def __init__(self, learner: Learner):
        self.learner = learner

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.learner.begin(state.global_step, state.max_steps)


def _by_rate(
    group: dict[str, Any], names: Mapping[Tensor, str], rates: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    """One parameter group for each multiple of the learning rate that its parameters have."""
    parts: dict[float, list[Tensor]] = {}
    for parameter in group["params"]:
        rate = next((rate for prefix, rate in rates.items() if names[parameter].startswith(prefix)), 1.0)
        parts.setdefault(rate, []).append(parameter)
    for rate, parameters in parts.items():
        yield group | {"params": parameters, "lr": group["lr"] * rate}
