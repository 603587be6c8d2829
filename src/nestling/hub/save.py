"""Checkpoints out, whole or not at all.

A model is written into a hidden sibling of its folder (`.name.partial`), flushed to disk and renamed; whatever
interrupts that, Ctrl-C included, removes the sibling, and what a killed process left is removed by the next save.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.errors import CheckpointError
from nestling.hub.check import first_line
from nestling.quiet import quiet

MARGIN_BYTES = 32 * 2**20  # for config, tokenizer and headers
FULL = {errno.ENOSPC, errno.EDQUOT}


def save(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
    beside: Mapping[str, str] | None = None,
) -> Path:
    """Write model, generation config, tokenizer and chat template into `folder` as safetensors; the folder.

    beside: text files to write with them, by name.

    Raises `CheckpointError` when `folder` is not empty (unless `overwrite`), cannot be written or does not fit on
    the disk. On any failure nothing is left behind, and a folder that was to be replaced is still the old one.
    """
    target = Path(folder).expanduser().absolute()
    _check_target(target, overwrite)
    with replacing(target) as partial:
        _check_space(model, partial)
        with quiet():
            model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for name, text in (beside or {}).items():
            (partial / name).write_text(text)
    return Path(folder)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` that takes its place when the block ends well, and vanishes when it does not.

    Raises `CheckpointError` for a full disk and for what the file system refuses.
    """
    partial = target.with_name(f".{target.name}.partial")
    parents = _missing_parents(target)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _flush(partial)
        _swap(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in parents:
            _remove_empty(parent)
        if isinstance(error, (OSError, SafetensorError)):
            raise CheckpointError(_sentence(target, error)) from error
        raise


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"'{target}' is a file: give the name of a folder to save the model in")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise CheckpointError(f"'{target}' is not empty: choose another folder, or allow overwriting")


def _check_space(model: PreTrainedModel, partial: Path) -> None:
    tensors = {t.data_ptr(): t for t in chain(model.parameters(), model.buffers())}.values()
    needed = sum(t.numel() * t.element_size() for t in tensors) + MARGIN_BYTES
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise CheckpointError(
            f"saving to '{partial.parent}' needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free: "
            f"free some space or choose another folder"
        )


def _swap(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; what was there is put back if that fails."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    had = target.exists()
    try:
        if had:
            os.replace(target, old)
        os.replace(partial, target)
    except BaseException:
        if had and old.exists() and not target.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir() and os.name == "nt":
            continue  # Windows cannot open a folder
        handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _missing_parents(target: Path) -> list[Path]:
    return [parent for parent in target.parents if not parent.exists()]


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # not there, or not empty: not ours to remove


def _sentence(target: Path, error: Exception) -> str:
    if getattr(error, "errno", None) in FULL or "No space left" in str(error) or "os error 28" in str(error):
        return f"the disk of '{target}' is full: free some space or choose another folder"
    reason = getattr(error, "strerror", None) or first_line(error)
    return f"'{target}' cannot be written ({reason}): choose another folder"
