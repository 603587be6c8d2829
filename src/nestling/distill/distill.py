"""`distill`: from a student, a teacher and data to the trained student.

Checks what can be wrong before any long work, resumes from the newest whole checkpoint of the run folder, and leaves
teacher and student in the state they were found in, weights of the student apart.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import PrinterCallback

from nestling.distill.pair import Pair
from nestling.distill.settings import DistillSettings
from nestling.distill.trainer import DistillTrainer
from nestling.errors import CheckpointError, DataError, NestlingError
from nestling.train import (
    MetricsLog,
    Seal,
    ShowProgress,
    StopOnInterrupt,
    clear,
    collate,
    fingerprint,
    newest,
    rows_of,
    split_batch,
    training_arguments,
)

CHECKPOINTS = "checkpoints"
# Settings that do not change what is computed, so a run may be resumed with others.
FREE = ("save_every", "log_every", "report_to", "micro_batch_size", "gradient_checkpointing")


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: DistillSettings | None = None,
    run_dir: str | Path | None = None,
    resume: bool = True,
    **overrides: Any,
) -> PreTrainedModel:
    """Train the student, in place, on the teacher's output distributions; returns it in eval mode.

    data: text by name (needs `tokenizer`), a `datasets.Dataset` with a column `input_ids`, or an iterable of batches
        `{"input_ids": [batch, seq]}`, maybe with `attention_mask` and `labels`.
    run_dir: where `metrics.jsonl` and checkpoints go; none are written without it. resume: go on from the newest
        whole checkpoint there, to the weights of an uninterrupted run; otherwise start anew and remove them.
    overrides: single settings, such as `learning_rate=2e-4`.
    Raises `DataError` for data or a tokenizer that do not fit, `CheckpointError` for a run folder of another run or a
    full disk, `NestlingError` for other settings that cannot work and for a loss that is not finite.
    """
    settings = dataclasses.replace(settings or DistillSettings(), **overrides)
    _check(student, teacher)
    vocab = student.get_output_embeddings().weight.shape[0]
    rows, row_tokens = rows_of(data, tokenizer, settings, vocab)
    steps = settings.total_steps(row_tokens)
    with _folder(run_dir) as folder, _at_work(student, teacher, settings):
        if run_dir is None:
            settings = dataclasses.replace(settings, save_every=0)
        run = _fingerprint(student, teacher, rows, settings)
        checkpoint = _resume_from(folder / CHECKPOINTS, run, resume)
        pair = _pair(student, teacher, settings)
        split = split_batch(settings, row_tokens, student.device)
        trainer = DistillTrainer(
            pair,
            args=training_arguments(settings, split, steps, folder / CHECKPOINTS, student.device),
            train_dataset=rows,
            data_collator=collate(vocab),
        )
        with _recomputing(student, split.recompute):
            _train(trainer, settings, folder, run, checkpoint)
        trainer.accelerator.free_memory()
    return student


def _train(trainer: DistillTrainer, settings: DistillSettings, folder: Path, run: str, checkpoint: Path | None) -> None:
    _move(trainer.pair.teacher, trainer.args.device)
    progress, interrupt = ShowProgress("steps"), StopOnInterrupt(saves=settings.save_every > 0)
    trainer.remove_callback(PrinterCallback)
    for callback in (MetricsLog(folder), progress, interrupt, Seal(run)):
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


def _check(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    if student is teacher:
        raise NestlingError("student and teacher are the same model: load or prune the student as a model of its own")
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"the student has {sizes[0]} tokens in its vocabulary and the teacher {sizes[1]}: distillation compares "
            f"them token by token, so take a teacher with the student's tokenizer"
        )


def _pair(student: PreTrainedModel, teacher: PreTrainedModel, settings: DistillSettings) -> Pair:
    set_seed(settings.seed)
    return Pair(student, teacher, settings.objective(), tuple(settings.states), settings.state_loss, settings.seed)


def _fingerprint(student: PreTrainedModel, teacher: PreTrainedModel, rows: Any, settings: DistillSettings) -> str:
    """What a checkpoint must agree with to be resumed from."""
    chosen = {name: value for name, value in dataclasses.asdict(settings).items() if name not in FREE}
    shapes = [[(name, list(p.shape)) for name, p in model.named_parameters()] for model in (student, teacher)]
    few = [rows[i]["input_ids"].tolist() for i in range(min(4, len(rows)))]
    return fingerprint(chosen, shapes, len(rows), few)


def _resume_from(checkpoints: Path, run: str, resume: bool) -> Path | None:
    checkpoint = newest(checkpoints, run) if resume else None
    clear(checkpoints, keep=checkpoint)
    return checkpoint


@contextmanager
def _folder(run_dir: str | Path | None) -> Iterator[Path]:
    """The run folder, or one that is gone afterwards."""
    if run_dir is None:
        with tempfile.TemporaryDirectory(prefix="nestling-") as temporary:
            yield Path(temporary)
    else:
        try:
            Path(run_dir, CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the run folder '{run_dir}' cannot be made ({error.strerror}): name another"
            ) from error
        yield Path(run_dir)


@contextmanager
def _at_work(student: PreTrainedModel, teacher: PreTrainedModel, settings: DistillSettings) -> Iterator[None]:
    """Teacher in eval mode, student trainable with weights of at least float32; both as before at the end."""
    dtype, training = student.dtype, teacher.training
    teacher.eval()
    student.requires_grad_(True)
    _move(student, torch.promote_types(dtype, torch.float32))
    try:
        yield
    finally:
        teacher.train(training)
        _move(student, dtype)
        student.zero_grad(set_to_none=True)
        student.eval()


def _move(model: nn.Module, where: torch.device | torch.dtype) -> None:
    model.to(where)


@contextmanager
def _recomputing(student: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Let the student's layers drop their activations and compute them again for the backward pass."""
    if not wanted:
        yield
        return
    names = ("activation_checkpointing", "gradient_checkpointing")  # the latter before transformers 5.22
    name = next(name for name in names if hasattr(student, f"{name}_enable"))
    getattr(student, f"{name}_enable")()
    try:
        yield
    finally:
        getattr(student, f"{name}_disable")()
