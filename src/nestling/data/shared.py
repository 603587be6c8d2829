"""Rows for several processes: tokenized once on each machine, into a file from which all of its processes read.

Tokenizing the same text in every process costs its time once per process, and holding it its memory. The file is
mapped, so that the processes of a machine share its pages, and has no name any more once all of them have opened it:
nothing is left, however the job ends, and no later job can find it stale.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from nestling import processes
from nestling.data.pack import packed
from nestling.errors import DataError


def packed_once(spec: str | Path, tokenizer: PreTrainedTokenizerBase, **how: Any) -> Dataset:
    """As `packed`, called by every process of a job alike; what one of them raises, all raise.

    Raises `DataError` too when the cache folder of `datasets` has no room.
    """
    if processes.count() == 1:
        return packed(spec, tokenizer, **how)
    name = processes.first(lambda: uuid.uuid4().hex)
    folder = Path(datasets.config.HF_DATASETS_CACHE, f"nestling-rows-{name}")
    try:
        processes.first_here(lambda: _write(packed(spec, tokenizer, **how), folder))
        rows = datasets.load_from_disk(str(folder))
        processes.first_here(lambda: None)  # all have opened it
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def _write(rows: Dataset, folder: Path) -> None:
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        rows.save_to_disk(str(beside), num_shards=1)
        os.replace(beside, folder)
    except OSError as error:
        raise DataError(
            f"the tokenized text cannot be kept in '{folder.parent}' ({error.strerror or error}): make room, or name "
            f"another folder in HF_DATASETS_CACHE"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if not bars:
            datasets.enable_progress_bars()
