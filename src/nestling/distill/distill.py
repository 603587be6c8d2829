"""`distill`: from a student, a teacher and data to the trained student; the loop is `nestling.train.fit`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nestling.distill.pair import Pair
from nestling.distill.settings import DistillSettings
from nestling.distill.states import parse_layer_map
from nestling.errors import DataError, NestlingError
from nestling.train import fit


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

    data, run_dir, resume: as `nestling.train.fit` takes them. overrides: single settings, such as `learning_rate=2e-4`.
    Raises `DataError` for a teacher with another vocabulary, `NestlingError` when both are one model, and what `fit`
    raises.
    """
    settings = dataclasses.replace(settings or DistillSettings(), **overrides).sized()
    _check(student, teacher)
    set_seed(settings.seed)
    pair = Pair(
        student,
        teacher,
        settings.objective(),
        tuple(settings.states),
        settings.state_loss,
        settings.seed,
        settings.state_weight,
        parse_layer_map(settings.layer_map),
    )
    fit(pair, data, tokenizer, settings, run_dir, resume)
    return student


def _check(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    if student is teacher:
        raise NestlingError("student and teacher are the same model: load or prune the student as a model of its own")
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"the student has {sizes[0]} tokens in its vocabulary and the teacher {sizes[1]}: distillation compares "
            f"them token by token, so take a teacher with the student's tokenizer"
        )
