"""`distill`: from a student, a teacher and data to the trained student; the loop is `nestling.train.fit`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nestling import hub, processes
from nestling.distill.cache import teacher_cache
from nestling.distill.correct import FOLDER, Together, corrected, leave
from nestling.distill.pair import Pair
from nestling.distill.settings import DistillSettings
from nestling.distill.states import parse_layer_map
from nestling.errors import DataError, NestlingError
from nestling.runs import held
from nestling.train import fit


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: DistillSettings | None = None,
    run_dir: str | Path | None = None,
    resume: bool = True,
    cache: str | Path | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """Train the student, in place, on the teacher's output distributions; returns it in eval mode.

    teacher: stays as it is; None if a whole cache stands for it. data, run_dir, resume: as `nestling.train.fit` takes
        them. cache: folder in which the teacher's likeliest tokens (`top_k` of them) are kept, computed if they are
        not there. overrides: single settings, such as `learning_rate=2e-4`.
    Raises `DataError` for a teacher with another vocabulary, `NestlingError` when both are one model, and what `fit`
    and `teacher_cache` raise.
    """
    settings = dataclasses.replace(settings or DistillSettings(), **overrides).sized()
    _check(student, teacher, cache)
    set_seed(settings.seed)
    text = data if isinstance(data, (str, Path)) else None
    if cache is not None:
        vocab = student.get_output_embeddings().weight.shape[0]
        data = teacher_cache(teacher, data, tokenizer, settings, cache, vocab)
        teacher = None
    with held(run_dir):
        if settings.correction == "first" and teacher is not None:
            teacher = corrected(teacher, data, tokenizer, settings, run_dir, resume)
            set_seed(settings.seed)
        pair = _pair(student, teacher, settings)
        fit(pair, data, tokenizer, settings, run_dir, resume, text=text)
        if run_dir is not None and settings.correction != "none":
            processes.first(lambda: _leave(pair, settings, Path(run_dir), tokenizer))
    return student


def _pair(student: PreTrainedModel, teacher: PreTrainedModel | None, settings: DistillSettings) -> Pair:
    how = (
        settings.objective(),
        tuple(settings.states),
        settings.state_loss,
        settings.seed,
        settings.state_weight,
        parse_layer_map(settings.layer_map),
    )
    if settings.correction == "together" and teacher is not None:
        return Together(student, teacher, *how, rate=settings.correct_rate)
    return Pair(student, teacher, *how)


def _leave(pair: Pair, settings: DistillSettings, run_dir: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Keep the corrected teacher, or remove what is left of it."""
    leave(run_dir, settings.keep_teacher)
    if settings.keep_teacher and isinstance(pair, Together):
        hub.save(pair.corrected, run_dir / FOLDER, tokenizer, overwrite=True)


def _check(student: PreTrainedModel, teacher: PreTrainedModel | None, cache: str | Path | None) -> None:
    if teacher is None:
        if cache is None:
            raise NestlingError("distillation needs a model to learn from: give a teacher, or a cache that is whole")
        return
    if student is teacher:
        raise NestlingError("student and teacher are the same model: load or prune the student as a model of its own")
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"the student has {sizes[0]} tokens in its vocabulary and the teacher {sizes[1]}: distillation compares "
            f"them token by token, so take a teacher with the student's tokenizer"
        )
