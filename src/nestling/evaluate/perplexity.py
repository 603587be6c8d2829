"""Perplexity: exp of the mean loss per token, every token counted once.

A source is read as one stream (documents in order, or a fixed sample of it when `tokens` is given) under a window of
`context` tokens that moves by `stride`. Each token is scored in the first window that reaches it, so it sees between
`context - stride + 1` and `context` tokens before it. The very first token has nothing before it and is not scored,
unless the tokenizer begins a text with BOS by itself: then BOS opens every window, takes one of its places, and is
never scored. Sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.anatomy.bypass import evaluating
from nestling.data.pack import check_context, check_tokenizer, own_bos, token_stream
from nestling.errors import DataError
from nestling.evaluate.score import IGNORE, token_losses

# Tokens at once: a CPU is no faster with more, and progress is told oftener.
BATCH_TOKENS = {"cpu": 1024}
BATCH_TOKENS_ELSEWHERE = 4096
SAMPLE_SEED = 0
SAMPLE_CHARACTERS = 4000  # in a piece of a document, whatever the context: the same text for every context


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp(`loss`), `loss` in nats per token over `tokens` scored tokens; how they were windowed."""

    value: float
    loss: float
    tokens: int
    context: int
    stride: int


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: str | Path | Iterable[dict[str, Tensor]],
    *,
    context: int = 512,
    stride: int | None = None,
    tokens: int | None = None,
    batch_size: int | None = None,
    split: str = "validation",
    progress: Callable[[int], Any] | None = None,
) -> Perplexity:
    """Perplexity on a source (as `nestling.data` reads it) or on batches `{"input_ids": [batch, seq]}`.

    `stride` is `context` by default. `tokens` limits how much of a source is scored: a fixed sample of its documents,
    the same for every model with this tokenizer. `split` is "validation" unless the source was never trained on
    ("all"). Batches are scored row by row, each on its own; `labels` of -100 and an `attention_mask` of 0 take tokens
    out. `progress` is called with the number of tokens scored since the last call. Raises `DataError`.
    """
    if not isinstance(data, (str, Path)):
        return _over_batches(model, data, progress)
    if tokenizer is None:
        raise DataError(f"perplexity on '{data}' needs the model's tokenizer: give it, or give batches of tokens")
    check_tokenizer(tokenizer, model.config.get_text_config().vocab_size)
    stride = _check_stride(context, stride)
    check_context(context, tokens)
    bos = own_bos(tokenizer)
    ids = _read(data, tokenizer, None if tokens is None else tokens + (bos is None), split)
    at_once = BATCH_TOKENS.get(model.device.type, BATCH_TOKENS_ELSEWHERE)
    parts = _windows(ids, bos, context, stride, batch_size or max(1, at_once // context))
    return _total(model, parts, context, stride, progress)


def _read(data: str | Path, tokenizer: PreTrainedTokenizerBase, limit: int | None, split: str) -> Tensor:
    """The stream of token ids `[tokens]`: all of the source in order, or a sample of pieces of its documents."""
    sample = {} if limit is None else {"piece": SAMPLE_CHARACTERS, "seed": SAMPLE_SEED}
    ids = torch.tensor(list(islice(token_stream(data, tokenizer, split=split, **sample), limit)))
    if len(ids) < 2:
        raise DataError(f"'{data}' has fewer than 2 tokens for the split '{split}': give more text")
    return ids


def _windows(
    ids: Tensor, bos: int | None, context: int, stride: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of windows over a stream: inputs and targets `[batch, context]`, -100 where nothing is scored.

    Position t of a window predicts target t, the token after it. With BOS, which opens every window, all ids are
    targets; without it, all but the first.
    """
    lead = 0 if bos is None else 1
    targets = ids if lead else ids[1:]
    starts = range(0, max(len(targets) - context + stride, 1), stride)
    for first in range(0, len(starts), batch_size):
        batch = starts[first : first + batch_size]
        inputs = torch.full((len(batch), context), int(ids[0]) if bos is None else bos)
        wanted = torch.full((len(batch), context), IGNORE)
        for row, start in enumerate(batch):
            goals = targets[start : start + context]
            seen = 0 if start == 0 else context - stride
            inputs[row, lead : len(goals)] = ids[start : start + len(goals) - lead]
            wanted[row, seen : len(goals)] = goals[seen:]
        yield inputs, wanted


def _over_batches(
    model: PreTrainedModel, data: Iterable[dict[str, Tensor]], progress: Callable[[int], Any] | None
) -> Perplexity:
    longest = 0

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal longest
        for batch in data:
            ids = batch["input_ids"]
            longest = max(longest, ids.shape[1])
            goals = batch.get("labels", ids).clone()
            if "attention_mask" in batch:
                goals[batch["attention_mask"] == 0] = IGNORE
            yield ids[:, :-1], goals[:, 1:]

    found = _total(model, parts(), 0, 0, progress)
    return Perplexity(found.value, found.loss, found.tokens, longest, longest)


def _total(
    model: PreTrainedModel,
    parts: Iterable[tuple[Tensor, Tensor]],
    context: int,
    stride: int,
    progress: Callable[[int], Any] | None,
) -> Perplexity:
    total, count = 0.0, 0
    with evaluating(model):
        for ids, goals in parts:
            losses = token_losses(model, ids.to(model.device), goals.to(model.device))
            total += losses.double().sum().item()
            scored = int((goals != IGNORE).sum())
            count += scored
            if progress is not None:
                progress(scored)
    if not count:
        raise DataError("there is no token to score: give data with at least 2 tokens per row")
    loss = total / count
    return Perplexity(math.exp(loss) if loss < 700 else math.inf, loss, count, context, stride)


def _check_stride(context: int, stride: int | None) -> int:
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise DataError(f"stride {stride} is not possible: give 1 to {context}, the context")
    return stride
