"""Calibration text that the model writes itself.

What a model says at temperature 1 is a sample of all it was trained on. Scores from one narrow text keep the units
that this text uses; with text of the model's own beside it they keep what other text needs too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

ROWS_AT_ONCE = 32


def generated(
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
