"""Training data as rows in a fixed order, and batches of them with targets already shifted.

The order is a function of the seed alone: not of the number of devices, of how a batch is split, or of where a run
was interrupted. Takes what `data=` takes: the name of text, a `datasets.Dataset`, or an iterable of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nestling.data import check_tokenizer, packed_once
from nestling.errors import DataError
from nestling.train.settings import TrainSettings

IGNORE = -100
COLUMNS = ("input_ids", "attention_mask", "labels")
TAUGHT = ("teacher_indices", "teacher_log_probs", "teacher_rest")  # per token, from a cache of the teacher
Row = Mapping[str, Tensor]


class Rows(torch.utils.data.Dataset):
    """`total` rows out of a source, passed over as often as it takes, every pass after the first shuffled anew.

    source: anything with a length and items `{"input_ids": [seq]}`, maybe `attention_mask` and `labels`.
    shuffle: shuffle the first pass too.
    """

    def __init__(self, source: Any, total: int, seed: int, shuffle: bool = False):
        self.source, self.total, self.seed, self.shuffle = source, total, seed, shuffle
        self._pass, self._order = -1, torch.arange(0)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> Row:
        number, place = divmod(index, len(self.source))
        if number != self._pass:
            self._pass, self._order = number, self._ordered(number)
        row = self.source[int(self._order[place])]
        return {name: torch.as_tensor(row[name]) for name in (*COLUMNS, *TAUGHT) if name in row}

    def _ordered(self, number: int) -> Tensor:
        if number == 0 and not self.shuffle:
            return torch.arange(len(self.source))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randperm(len(self.source), generator=generator)


def rows_of(
    data: Any, tokenizer: PreTrainedTokenizerBase | None, settings: TrainSettings, vocab_size: int
) -> tuple[Rows, int]:
    """The rows of a whole training job, and the tokens in its first row.

    Raises `DataError` when there is no row, a row has fewer than two tokens, text comes without a tokenizer, or a
    tokenizer does not fit the vocabulary.
    """
    shuffle = isinstance(data, datasets.Dataset) or getattr(data, "shuffle", False)
    if isinstance(data, (str, Path)):
        source = _text_rows(data, tokenizer, settings, vocab_size)
    elif isinstance(data, (datasets.Dataset, torch.utils.data.Dataset)):
        source = data
    else:
        source = _batch_rows(data, settings)
    length = _check(source)
    return Rows(source, settings.total_steps(length) * settings.batch_size, settings.seed, shuffle), length


def collate(vocab_size: int) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
    """The function from rows to a batch: `input_ids`, `attention_mask` and `labels`, all `[batch, seq]`.

    `labels[b, t]` is the token after position t, and -100 where that position or the next is padding, where the row
    ends, or where the row's own labels say so. Raises `DataError` for a token that the vocabulary does not have.
    """

    def batch_of(rows: Sequence[Row]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.stack([_padded(row["input_ids"], width, 0) for row in rows])
        masks = [row.get("attention_mask", torch.ones_like(row["input_ids"])) for row in rows]
        mask = torch.stack([_padded(mask, width, 0) for mask in masks])
        own = torch.stack([_padded(row.get("labels", row["input_ids"]), width, IGNORE) for row in rows])
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise DataError(
                f"the data holds token {int(ids.max())}, but the model's vocabulary has {vocab_size} tokens: "
                f"tokenize it with the model's own tokenizer"
            )
        taught = {
            name: torch.stack([_padded(row[name], width, 0) for row in rows]) for name in TAUGHT if name in rows[0]
        }
        return {"input_ids": ids, "attention_mask": mask, "labels": shifted(own, mask.bool()), **taught}

    return batch_of


def shifted(labels: Tensor, mask: Tensor) -> Tensor:
    """Each position's next label `[batch, seq]`, -100 unless both positions are real."""
    targets = torch.full_like(labels, IGNORE)
    targets[:, :-1] = torch.where(mask[:, 1:] & mask[:, :-1], labels[:, 1:], IGNORE)
    return targets


def _text_rows(
    data: str | Path, tokenizer: PreTrainedTokenizerBase | None, settings: TrainSettings, vocab_size: int
) -> datasets.Dataset:
    if tokenizer is None:
        raise DataError(f"'{data}' is text, which needs a tokenizer: pass the model's own as tokenizer=")
    check_tokenizer(tokenizer, vocab_size)
    tokens = settings.total_steps(settings.context) * settings.batch_size * settings.context
    return packed_once(data, tokenizer, context=settings.context, tokens=tokens, seed=settings.seed)


def _batch_rows(data: Iterable[Mapping[str, Tensor]], settings: TrainSettings) -> list[Row]:
    """As many rows out of an iterable of batches as the job can use; it may be endless."""
    rows: list[Row] = []
    try:
        for batch in data:
            if not isinstance(batch, Mapping):
                raise TypeError(type(batch))
            kept = {name: batch[name] for name in COLUMNS if name in batch}
            rows += [{name: value[i] for name, value in kept.items()} for i in range(len(batch["input_ids"]))]
            if rows and len(rows) >= settings.total_steps(len(rows[0]["input_ids"])) * settings.batch_size:
                break
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"data of type {type(data).__name__} cannot be trained on: give the name of text, a datasets.Dataset with "
            f"a column input_ids, or batches {{'input_ids': [batch, seq]}}"
        ) from error
    return rows


def _check(source: Any) -> int:
    if not len(source):
        raise DataError("the data is empty: give at least one row of tokens")
    if "input_ids" not in source[0]:
        raise DataError(f"the data has the columns {', '.join(source[0])} but no input_ids: tokenize it first")
    length = len(source[0]["input_ids"])
    if length < 2:
        raise DataError(f"the data's rows have {length} tokens: give rows of at least 2, or a larger context")
    return length


def _padded(values: Tensor, width: int, filler: int) -> Tensor:
    """The first dimension filled up; whole numbers as int64."""
    values = values if values.is_floating_point() else values.long()
    around = (0, 0) * (values.dim() - 1)
    return torch.nn.functional.pad(values, (*around, 0, width - len(values)), value=filler)
