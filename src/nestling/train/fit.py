"""`fit`: the one training loop, from a `Learner` and data to the trained model, whatever the method.

`transformers.Trainer` does the work. Here it is told what to do, resumes from the newest whole checkpoint of the run
folder, and models are left in the state they were found in, weights of the student apart.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import noop_context_fn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from nestling import processes
from nestling.anatomy import suited_scans
from nestling.errors import CheckpointError
from nestling.runs import held
from nestling.train.callbacks import MetricsLog, ShowProgress, StopOnInterrupt
from nestling.train.checkpoints import Making, Seal, clear, fingerprint, fingerprint_of, newest
from nestling.train.held_out import held_out
from nestling.train.learner import Learner
from nestling.train.rows import Rows, collate, rows_of
from nestling.train.sending import home
from nestling.train.settings import TrainSettings, split_batch, training_arguments
from nestling.train.sharding import sharded
from nestling.train.trainer import LearnerTrainer

CHECKPOINTS = "checkpoints"
ROWS_SEEN = 8  # by which data is told apart


def fit(
    learner: Learner,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: TrainSettings,
    run_dir: str | Path | None = None,
    resume: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    text: str | Path | None = None,
) -> Learner:
    """Train a learner in place; returns it, its student in eval mode.

    data: text by name (needs `tokenizer`), a `datasets.Dataset` with a column `input_ids`, or an iterable of batches
        `{"input_ids": [batch, seq]}`, maybe with `attention_mask` and `labels`.
    run_dir: where `metrics.jsonl` and checkpoints go; none are written without it. resume: go on from the newest
        whole checkpoint there, to the weights of an uninterrupted run; otherwise start anew and remove them.
    text: whose validation part the loss is measured on along the way (`evaluate_every`), where `data` is not its name.
    Raises `DataError` for data or a tokenizer that do not fit, `CheckpointError` for a run folder of another run or a
    full disk, `NestlingError` for settings that cannot work and for a loss that is not finite.
    """
    student = learner.student
    vocab = student.get_output_embeddings().weight.shape[0]
    rows, row_tokens = rows_of(data, tokenizer, settings, vocab)
    measured = held_out(text or data, tokenizer, settings, row_tokens, seen=run_dir is not None)
    steps = settings.total_steps(row_tokens)
    with _folder(run_dir) as folder, _at_work(learner):
        if run_dir is None:
            settings = dataclasses.replace(settings, save_every=0)
        making = _making(learner, rows, settings)
        checkpoint = _resume_from(folder / CHECKPOINTS, making, resume)
        processes.start()
        device = processes.device() or home(student)
        split = split_batch(settings, row_tokens, device)
        anew = measured is not None and checkpoint is None
        arguments = training_arguments(settings, split, steps, folder / CHECKPOINTS, device, measured=anew)
        with _placed(learner, settings, arguments.device), _recomputing(learner, split.recompute):
            trainer = LearnerTrainer(
                learner, held_out=measured, args=arguments, train_dataset=rows, data_collator=collate(vocab)
            )
            _train(trainer, settings, folder, making, checkpoint, callbacks)
            trainer.accelerator.free_memory()
    return learner


def _placed(learner: Learner, settings: TrainSettings, device: torch.device) -> AbstractContextManager[None]:
    """The models where they are trained: spread over all processes, or whole on each (the student by `Trainer`)."""
    if settings.fsdp:
        return sharded(learner, device, settings.bf16)
    if learner.teacher is not None:
        _move(learner.teacher, device)
    return nullcontext()


def _train(
    trainer: LearnerTrainer,
    settings: TrainSettings,
    folder: Path,
    making: Making,
    checkpoint: Path | None,
    callbacks: Sequence[TrainerCallback],
) -> None:
    progress, interrupt = ShowProgress("steps"), StopOnInterrupt(saves=settings.save_every > 0)
    trainer.remove_callback(PrinterCallback)
    for callback in (MetricsLog(folder), progress, interrupt, *callbacks, Seal(making)):
        trainer.add_callback(callback)
    try:
        with interrupt:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except OSError as error:
        raise CheckpointError(
            f"the run folder '{folder}' cannot be written ({error.strerror or error}): make room and run again"
        ) from error
    finally:
        progress.close()


def _making(learner: Learner, rows: Rows, settings: TrainSettings) -> Making:
    """What a checkpoint must agree with to be resumed from.

    Of the student sizes count, not weights: those are the checkpoint's.
    """
    student, teacher = learner.student, learner.teacher
    some = [rows[i * len(rows) // ROWS_SEEN]["input_ids"].tolist() for i in range(ROWS_SEEN)]
    parts = {"student": fingerprint_of(student, weights=False), "data": fingerprint(len(rows), some)}
    if teacher is not None:
        parts["teacher"] = processes.first(lambda: fingerprint_of(teacher))  # who has its weights in any case
    return Making(settings, parts)


def _resume_from(checkpoints: Path, making: Making, resume: bool) -> Path | None:
    def found() -> str | None:
        checkpoint = newest(checkpoints, making) if resume else None
        clear(checkpoints, keep=checkpoint)
        return str(checkpoint) if checkpoint else None

    path = processes.first(found)
    return Path(path) if path else None


@contextmanager
def _folder(run_dir: str | Path | None) -> Iterator[Path]:
    """The run folder, held against other jobs, or one that is gone afterwards."""
    if run_dir is None:
        with tempfile.TemporaryDirectory(prefix="nestling-") as temporary:
            yield Path(temporary)
    else:
        with held(Path(run_dir)):
            yield Path(run_dir)


@contextmanager
def _at_work(learner: Learner) -> Iterator[None]:
    """Teacher in eval mode, student trainable with weights of at least float32; both as before at the end."""
    student, teacher = learner.student, learner.teacher
    dtype, training = student.dtype, teacher is not None and teacher.training
    if teacher is not None:
        teacher.eval()
    student.requires_grad_(True)
    _move(student, torch.promote_types(dtype, torch.float32))
    try:
        with suited_scans(student), suited_scans(teacher) if teacher is not None else nullcontext():
            yield
    finally:
        if teacher is not None:
            teacher.train(training)
        if not learner.is_sharded:  # or it failed, and is of no use
            _move(student, dtype)
        learner.zero_grad(set_to_none=True)
        student.eval()


def _move(model: nn.Module, where: torch.device | torch.dtype) -> None:
    model.to(where)


@contextmanager
def _recomputing(learner: Learner, wanted: bool) -> Iterator[None]:
    """Let the student's layers drop their activations and compute them again for the backward pass."""
    if not wanted:
        yield
        return
    recompute(learner.student, learner.recomputed)
    try:
        yield
    finally:
        getattr(learner.student, f"{_recompute_name(learner.student)}_disable")()


def recompute(model: PreTrainedModel, contexts: Callable[[], tuple[Any, Any]] = noop_context_fn) -> None:
    """Let a model's layers recompute their activations; contexts: see `Learner.recomputed`."""
    options = {"use_reentrant": False, "context_fn": contexts}
    getattr(model, f"{_recompute_name(model)}_enable")(options)


def recomputes(model: PreTrainedModel) -> bool:
    """Whether a model's layers recompute their activations."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _recompute_name(model: PreTrainedModel) -> str:
    names = ("activation_checkpointing", "gradient_checkpointing")  # the latter before transformers 5.22
    return next(name for name in names if hasattr(model, f"{name}_enable"))
