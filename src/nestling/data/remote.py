"""Documents from the hub, streamed by `datasets`: nothing is downloaded beyond what is read.

Knows how to name a dataset (`owner/name`, or `owner/name:config`) and which of its splits are for training and for
validation; a dataset with a train split only is shared out by its caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from nestling.data.files import text_of
from nestling.errors import DataError
from nestling.hub.check import first_line
from nestling.hub.source import reachable

BUFFER = 1000
VALIDATION = ("validation", "valid", "val", "dev", "test")


def stream(
    spec: str, split: str, tokenizer: PreTrainedTokenizerBase | None, seed: int | None
) -> tuple[Iterator[str], bool]:
    """Documents of a hub dataset, and whether they are of a split that the dataset itself has.

    With a seed, shards and a buffer of 1,000 rows are shuffled. Raises `DataError`.
    """
    if not reachable():
        raise DataError(
            f"'{spec}' is no file on this machine, and the hub cannot be reached: check the network, or give a local "
            f"file or builtin:stdlib"
        )
    name, _, config = spec.partition(":")
    try:
        rows, own = _open(name, config or None, split)
        return _texts(rows if seed is None or not own else rows.shuffle(seed, buffer_size=BUFFER), spec, tokenizer), own
    except DataError:
        raise
    except Exception as error:  # datasets raises its own, fsspec's and the hub's errors
        raise DataError(f"the dataset '{spec}' cannot be opened: {first_line(error)}") from error


def _open(name: str, config: str | None, split: str) -> tuple[Any, bool]:
    from datasets import get_dataset_split_names, load_dataset

    splits = get_dataset_split_names(name, config)
    held = next((candidate for candidate in VALIDATION if candidate in splits), None)
    if "train" not in splits and held is None:
        return load_dataset(name, config, split=splits[0], streaming=True), False
    if "train" not in splits or (held and split == "validation"):
        return load_dataset(name, config, split=held, streaming=True), "train" in splits
    return load_dataset(name, config, split="train", streaming=True), held is not None


def _texts(rows: Any, spec: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    for row in rows:
        yield text_of(row, f"the dataset '{spec}'", tokenizer)
