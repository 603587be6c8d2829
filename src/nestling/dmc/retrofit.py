"""`retrofit`: from a model and text to the same model with a compressed cache; the loop is `nestling.train.fit`."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nestling.dmc.convert import convert, is_converted
from nestling.dmc.learner import Retrofit
from nestling.dmc.settings import RetrofitSettings
from nestling.errors import NestlingError
from nestling.train import fit


def retrofit(
    model: PreTrainedModel,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: RetrofitSettings | None = None,
    teacher: PreTrainedModel | None = None,
    run_dir: str | Path | None = None,
    resume: bool = True,
    **overrides: Any,
) -> PreTrainedModel:
    """Teach a model, in place, to share slots of its cache between tokens; returns it in eval mode.

    teacher: whose distributions it keeps; a copy of the model as it is unless given (none with `kd_weight=0`).
    data, run_dir, resume: as `nestling.train.fit` takes them. overrides: single settings, such as `ratio=8`.
    Raises `NestlingError` for a model that merges already, and what `convert` and `fit` raise.
    """
    settings = dataclasses.replace(settings or RetrofitSettings(), **overrides)
    if is_converted(model):
        raise NestlingError("this model's cache is compressed already: start from the stock model")
    if settings.kd_weight == 0:
        teacher = None
    elif teacher is None:
        teacher = copy.deepcopy(model)
    set_seed(settings.seed)
    convert(model, **settings.gates())
    learner = Retrofit(model, teacher.requires_grad_(False) if teacher is not None else None, settings)
    fit(learner, data, tokenizer, settings, run_dir, resume)
    learner.finish()
    model.config.dmc["ratio"] = settings.ratio
    return model
