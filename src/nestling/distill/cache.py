"""A teacher's likeliest tokens for distillation: `nestling.train.kept`, and what of these settings it cannot serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.distill.settings import DistillSettings
from nestling.errors import NestlingError
from nestling.train.kept import Cache, kept_teacher


def teacher_cache(
    teacher: PreTrainedModel | None,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: DistillSettings,
    folder: str | Path,
    vocab_size: int,
    progress: Callable[[int], None] | None = None,
) -> Cache:
    """As `kept_teacher`, for what these settings ask of the teacher. Raises `NestlingError` if that is more."""
    if settings.states or settings.correction != "none":
        what = "intermediate states" if settings.states else "correction"
        raise NestlingError(f"a teacher cache holds distributions only: leave {what} out, or distill without a cache")
    objective = settings.objective()
    return kept_teacher(teacher, data, tokenizer, settings.sized(), objective, folder, vocab_size, progress)
