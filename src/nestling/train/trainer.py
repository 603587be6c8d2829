"""`transformers.Trainer` for a `Learner`: its loss, what it logs, and checkpoints that are the student.

A checkpoint's folder is the student as `save_pretrained` writes it, and beside it whatever else the learner trains
(`learner.safetensors`), which `from_pretrained` does not see and the student never holds. A sharded learner's holds
the part of each process instead (`shards/`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from nestling import processes
from nestling.errors import CheckpointError, NestlingError
from nestling.quiet import quiet
from nestling.train.held_out import HeldOut, MeasureNow
from nestling.train.learner import Learner
from nestling.train.sharding import load_optimizer, load_weights, save_shards

BESIDE = "learner.safetensors"
STUDENT = "student."


class LearnerTrainer(Trainer):
    """Trains a `Learner`."""

    def __init__(self, learner: Learner, held_out: HeldOut | None = None, **arguments: Any):
        self.learner, self.held_out = learner, held_out
        super().__init__(model=learner, **arguments)
        if held_out is not None:
            self.add_callback(MeasureNow(held_out.every))
        if learner.is_sharded:
            self._leave_placement()
        self.add_callback(_Begin(learner))
        self._parts: dict[str, Tensor] = {}
        self._logged_at = 0

    def _leave_placement(self) -> None:
        """Neither wrap nor shard the learner, which owns its placement, as does a model that was sharded when loaded.

        `Trainer` refuses checkpoints of such a model; those here are the learner's own. Raises `NestlingError`.
        """
        if not hasattr(self, "is_distributed_loading_by_transformers"):
            raise NestlingError("fsdp needs a later transformers, 5.24 say: upgrade it, or train with fsdp off")
        self.is_distributed_loading_by_transformers = True

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        if not self.learner.is_sharded:
            super()._move_model_to_device(model, device)

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

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """The loss on held-out text, into the log; before the first step the teacher's too."""
        assert self.held_out is not None, "this training has no held-out text"
        how = (self.learner, self.args.device, self.args.per_device_train_batch_size)
        with self.compute_loss_context_manager():
            logs = {"eval_loss": self.held_out.loss(*how)}
            if self.state.global_step == 0 and self.learner.teacher is not None:
                logs["eval_teacher_loss"] = self.held_out.loss(*how, of_teacher=True)
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

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
        if self.learner.is_sharded:  # its weights are written with the optimizer, by all processes
            self.learner.student.config.save_pretrained(folder)
            return
        state = state_dict if state_dict is not None else self.learner.state_dict()
        ours = {name.removeprefix(STUDENT): value for name, value in state.items() if name.startswith(STUDENT)}
        with quiet():
            self.learner.student.save_pretrained(folder, state_dict=ours)
        # Tensors that are one and the same (tied embeddings) are written once; loading one sets both.
        beside = {value.data_ptr(): name for name, value in reversed(state.items()) if not name.startswith(STUDENT)}
        save_file({name: state[name].contiguous() for name in sorted(beside.values())}, folder / BESIDE)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            if processes.connection_broke(error):
                raise
            raise CheckpointError(
                f"the checkpoint of step {self.state.global_step} cannot be written to '{self.args.output_dir}' "
                f"({error}): make room, or set save_every to 0"
            ) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.learner.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_shards(Path(output_dir), self.learner, self._plain_optimizer())
        if self.args.should_save:
            torch.save(cast(Any, self.lr_scheduler).state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.learner.is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = self._plain_optimizer(), cast(Any, self.lr_scheduler)
        load_optimizer(Path(checkpoint), self.learner, optimizer)
        scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True))
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate  # of the next step; the scheduler itself only sets those after it

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without what accelerate puts around it."""
        return cast(torch.optim.Optimizer, getattr(self.optimizer, "optimizer", self.optimizer))

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Reduce after every micro-batch: waiting for the last would keep all gradients whole in the meantime."""
        yield

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.learner.is_sharded:
            load_weights(Path(resume_from_checkpoint), self.learner)
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
