"""From documents to rows of tokens.

Documents are cut into pieces of about two and a half rows, shuffled by the seed, tokenized a few at a time and
joined with EOS; the stream is cut into rows of exactly `context` tokens. Pieces make a small budget of tokens sample
many documents rather than the first long one, and tokenization stops as soon as the budget is met. If the tokenizer
itself begins a text with BOS, so does every row: a model that always saw one is out of its depth without.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nestling.data.documents import documents, shuffled
from nestling.data.files import stretches
from nestling.errors import DataError

GROUP = 16  # pieces per call of the tokenizer: enough to keep its threads busy
CHARACTERS_PER_TOKEN = 8  # of context, in a piece: about two and a half rows of English or code
SMALLEST_PIECE = 2000  # characters
PADDING_SHARE = 0.1  # vocabularies are padded to round sizes; more than this is another tokenizer's


def packed(
    spec: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    tokens: int | None = None,
    split: str = "train",
    seed: int = 0,
) -> Dataset:
    """Rows `{"input_ids": [context]}` of a source: `tokens` tokens rounded up to whole rows, or all there are.

    Fewer rows come back when the source has fewer. Raises `DataError` when it has not even one.
    """
    check_context(context, tokens)
    rows = np.fromiter(_rows(spec, tokenizer, context, tokens, split, seed), dtype=np.dtype((np.int32, (context,))))
    if not len(rows):
        raise DataError(
            f"'{spec}' has fewer than {context} tokens for the split '{split}', which is one row: give more text or a "
            f"smaller context"
        )
    return Dataset.from_dict({"input_ids": rows}, features=Features({"input_ids": List(Value("int32"))}))


def batches(
    spec: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    tokens: int | None = None,
    batch_size: int = 8,
    split: str = "train",
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """The rows of `packed` as batches `{"input_ids": [batch, context]}`; the last may be smaller."""
    if batch_size < 1:
        raise DataError(f"batch_size {batch_size} is not possible: give at least 1")
    rows = packed(spec, tokenizer, context=context, tokens=tokens, split=split, seed=seed)
    ids = torch.from_numpy(np.asarray(rows.with_format("numpy")["input_ids"][:])).long()
    return [{"input_ids": part} for part in ids.split(batch_size)]


def token_stream(
    spec: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    piece: int | None = None,
    split: str = "train",
    seed: int | None = None,
) -> Iterator[int]:
    """Token ids of a source, EOS after every document, tokenized as they are asked for.

    With a `seed`, documents are shuffled; with a `piece`, they are first cut into pieces of about so many characters.
    """
    end = separator(tokenizer)
    texts = documents(spec, split, tokenizer=tokenizer, seed=seed)
    if piece is not None:
        texts = (part for text in texts for part in stretches(text, piece))
        if seed is not None:
            texts = shuffled(texts, random.Random(seed))
    while group := list(islice(texts, GROUP)):
        for ids in tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]:
            yield from ids
            yield end


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise `DataError` when a tokenizer cannot belong to a model with `vocab_size` embeddings.

    It must not have more tokens, nor fewer by over a tenth (and over 1,024), which padding does not explain.
    """
    size = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
    if size > vocab_size or vocab_size - size > max(1024, PADDING_SHARE * vocab_size):
        raise DataError(
            f"the tokenizer has {size:,} tokens and the model {vocab_size:,} embeddings: give the tokenizer that the "
            f"model was trained with"
        )


def separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token between documents: EOS, or BOS for a tokenizer without it. Raises `DataError` for one with neither."""
    for found in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if found is not None:
            return int(found)
    raise DataError("the tokenizer has neither an EOS nor a BOS token to part documents with: set tokenizer.eos_token")


def own_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token if the tokenizer begins every text with it by itself, else `None`."""
    start = tokenizer("a")["input_ids"][:1]
    return int(start[0]) if start and start[0] == tokenizer.bos_token_id else None


def check_context(context: int, tokens: int | None) -> None:
    """Raise `DataError` for a context below 2 or a number of tokens below 1."""
    if context < 2:
        raise DataError(f"context {context} is not possible: a row needs at least 2 tokens")
    if tokens is not None and tokens < 1:
        raise DataError(f"{tokens} tokens are not possible: ask for at least 1")


def _rows(
    spec: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    tokens: int | None,
    split: str,
    seed: int,
) -> Iterator[list[int]]:
    stream = token_stream(spec, tokenizer, piece=piece_length(context), split=split, seed=seed)
    bos = own_bos(tokenizer)
    head = [] if bos is None else [bos]
    wanted = None if tokens is None else -(-tokens // context)
    for _ in range(wanted) if wanted is not None else iter(int, 1):
        row = head + list(islice(stream, context - len(head)))
        if len(row) < context:
            return
        yield row


def piece_length(context: int) -> int:
    """Characters in a piece of a document when rows have `context` tokens."""
    return max(SMALLEST_PIECE, CHARACTERS_PER_TOKEN * context)
