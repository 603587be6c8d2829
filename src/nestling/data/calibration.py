"""Calibration text: rows of a source and, in turn with them, rows that the model writes itself.

What a model says at temperature 1 is a sample of all it was trained on. Scores from one narrow text keep the units
that this text uses; with text of the model's own beside it they keep what other text needs too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from nestling.data.pack import batches
from nestling.errors import DataError

ROWS_AT_ONCE = 32


def calibration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: str | Path,
    *,
    tokens: int,
    context: int = 256,
    generated: float = 0.5,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Tensor]]:
    """Batches `{"input_ids": [batch, context]}` to rank, repair and score shapes with.

    generated: part of the rows that the model writes itself, from 0 to 1; any stretch of the rows is mixed alike.
    progress: told the tokens written since the last call. Raises `DataError` when the source has not even one row.
    """
    if not 0 <= generated <= 1:
        raise DataError(f"generated {generated} is not a part of the text: give a number from 0 to 1")
    rows = torch.cat(
        [part["input_ids"] for part in batches(spec, tokenizer, context=context, tokens=tokens, seed=seed)]
    )
    own = round(generated * len(rows))
    if own:
        rows = in_turn(rows[: len(rows) - own], written(model, tokenizer, own, context, seed, progress))
    return [{"input_ids": part} for part in rows.split(batch_size)]


def in_turn(*groups: Tensor) -> Tensor:
    """Rows of several groups, spread so that any stretch of the result holds them in proportion."""
    places = [(torch.arange(len(group)) + 0.5) / max(1, len(group)) for group in groups]
    return torch.cat(groups)[torch.cat(places).argsort(stable=True)]


def written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    context: int,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Token ids `[rows, context]` sampled from the model at temperature 1, each row from the start of a text.

    A row goes on where the model would have ended. The same for the same model, seed and device. progress: told the
    tokens written since the last call.
    """
    first = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    how = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=context - 1,
        max_new_tokens=context - 1,
        bos_token_id=first,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=first,
    )
    parts = []
    devices = [model.device] if model.device.type != "cpu" else []
    kind = model.device.type if devices else "cuda"
    with torch.random.fork_rng(devices, device_type=kind), torch.no_grad(), _only(model, how):
        torch.manual_seed(seed)
        for start in range(0, rows, ROWS_AT_ONCE):
            begin = torch.full((min(ROWS_AT_ONCE, rows - start), 1), first, device=model.device)
            told = [_Told(progress, len(begin))] if progress is not None else []
            ids = cast(Any, model).generate(begin, attention_mask=torch.ones_like(begin), stopping_criteria=told)
            parts.append(ids.cpu())
    return torch.cat(parts)


@contextmanager
def _only(model: PreTrainedModel, how: GenerationConfig) -> Iterator[None]:
    """Let these be all of the model's generation settings; `generate` would fill gaps from the model's own."""
    before = model.generation_config
    model.generation_config = how
    try:
        yield
    finally:
        model.generation_config = before


class _Told(StoppingCriteria):
    """Stops nothing: `generate` calls it after every token, which is when progress can be told."""

    def __init__(self, progress: Callable[[int], None], rows: int):
        self.progress, self.rows = progress, rows

    def __call__(self, input_ids: LongTensor, scores: Any, **kwargs: Any) -> Tensor:
        self.progress(self.rows)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
