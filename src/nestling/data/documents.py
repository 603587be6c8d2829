"""Where documents come from: one iterator of strings for every kind of source.

A spec is `builtin:stdlib`, a local file (.txt, .jsonl, .parquet) or a folder of such files, or a hub dataset
(`owner/name`, or `owner/name:config`). Splits never overlap: "train" and "validation" are the source's own, or a fixed
share that depends on nothing but the source; "all" is everything, for sources that were never trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from nestling.data import files, remote, stdlib
from nestling.errors import DataError

Split = Literal["train", "validation", "all"]
T = TypeVar("T")
SHARE = 20  # one document in so many is for validation where a source has no split of its own
PLACE = 10  # the 10th, 30th, 50th ...
BUFFER = 4096  # documents held while shuffling a stream


def documents(
    spec: str | Path,
    split: str = "train",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """The non-empty documents of a source: in its order, or shuffled by `seed` (through a buffer of 4,096).

    `tokenizer` is needed only for its chat template, by files that hold `messages`. Raises `DataError` for a source
    that is missing, empty, unreadable or without text.
    """
    if split not in ("train", "validation", "all"):
        raise DataError(f"split '{split}' is not known: use train, validation or all")
    found = _source(str(spec), split, tokenizer, seed)
    first = next((text for text in found if text.strip()), None)
    if first is None:
        raise DataError(f"'{spec}' has no text for the split '{split}': give data with more documents")
    return _rest(first, found, seed)


def _rest(first: str, found: Iterator[str], seed: int | None) -> Iterator[str]:
    def everything() -> Iterator[str]:
        yield first
        yield from (text for text in found if text.strip())

    return everything() if seed is None else shuffled(everything(), random.Random(seed))


def shuffled(items: Iterable[T], rng: random.Random) -> Iterator[T]:
    """Items in random order, drawn from a buffer that is refilled from the stream: exact below `BUFFER` items."""
    stream = iter(items)
    buffer = list(islice(stream, BUFFER))
    for item in stream:
        place = rng.randrange(len(buffer))
        chosen, buffer[place] = buffer[place], item
        yield chosen
    rng.shuffle(buffer)
    yield from buffer


def share(items: Iterable[T], split: str) -> Iterator[T]:
    """The fixed share: the 10th of every 20 items is for validation; of fewer than 10 items, the last."""
    stream = iter(items)
    head = list(islice(stream, PLACE))
    if len(head) < PLACE:
        cut = max(len(head) - 1, 0)
        yield from {"train": head[:cut] or head, "validation": head[cut:] if cut else [], "all": head}[split]
        return
    for index, item in enumerate(_chain(head, stream)):
        if split == "all" or (index % SHARE == PLACE - 1) == (split == "validation"):
            yield item


def _chain(head: list[T], tail: Iterator[T]) -> Iterator[T]:
    yield from head
    yield from tail


def _source(spec: str, split: str, tokenizer: PreTrainedTokenizerBase | None, seed: int | None) -> Iterator[str]:
    if spec.startswith("builtin:"):
        if spec != stdlib.SPEC:
            raise DataError(f"'{spec}' is not built-in data: there is {stdlib.SPEC}")
        return stdlib.documents(split, seed)
    path = Path(spec).expanduser()
    if path.exists():
        chosen, own_split = files.chosen(path, split)
        if seed is not None and own_split:
            random.Random(seed).shuffle(chosen)
        texts = files.read(chosen, tokenizer)
        return texts if own_split else share(texts, split)
    if files.looks_local(spec):
        raise DataError(f"'{spec}' does not exist: give a .txt, .jsonl or .parquet file, a folder or builtin:stdlib")
    texts, own_split = remote.stream(spec, split, tokenizer, seed)
    return texts if own_split else share(texts, split)
