"""`retrofit`: from a model and text to the same model with a compressed cache; the loop is `nestling.train.fit`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nestling.dmc.calibrate import calibrate
from nestling.dmc.convert import convert, is_converted
from nestling.dmc.learner import Retrofit
from nestling.dmc.settings import RetrofitSettings
from nestling.errors import NestlingError
from nestling.train import Rows, collate, fit, rows_of

SAMPLE_ROWS = 4  # at once
DATASETS = (datasets.Dataset, torch.utils.data.Dataset)


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

    At the end the point at which gates decide is moved to where the ratio is met (`calibrate`); what it was before, and
    the ratio that came of it, are kept in `config.dmc["learned"]`.

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
    kept: list[Mapping[str, Tensor]] = []
    streamed = isinstance(data, Iterable) and not isinstance(data, (str, Path, *DATASETS))
    stream = _keeping(data, kept, settings.calibration_tokens) if streamed else data
    fit(learner, stream, tokenizer, settings, run_dir, resume)
    learner.finish()
    model.config.dmc["ratio"] = settings.ratio
    if settings.calibration_tokens:
        vocab = model.get_output_embeddings().weight.shape[0]
        sample = kept if streamed else _first(data, tokenizer, settings, vocab)
        found = calibrate(model, sample, settings.ratio)
        model.config.dmc["learned"] = {"ratio": round(found.before, 4), "offset": settings.offset}
    return model


def _keeping(data: Iterable[Any], kept: list[Mapping[str, Tensor]], tokens: int) -> Iterator[Any]:
    """The batches as they come, of which the first are kept until they have so many tokens."""
    for batch in data:
        if sum(part["input_ids"].numel() for part in kept) < tokens:
            kept.append(batch)
        yield batch


def _first(
    data: Any, tokenizer: PreTrainedTokenizerBase | None, settings: RetrofitSettings, vocab: int
) -> list[dict[str, Tensor]]:
    """Batches of the first tokens of text, or of a dataset, in the order that they have there."""
    rows, length = rows_of(data, tokenizer, settings, vocab)
    source = Rows(rows.source, min(len(rows.source), -(-settings.calibration_tokens // length)), settings.seed)
    first = [source[i] for i in range(len(source))]
    return [collate(vocab)(first[i : i + SAMPLE_ROWS]) for i in range(0, len(first), SAMPLE_ROWS)]
