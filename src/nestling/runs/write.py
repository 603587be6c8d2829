"""Writing a file or folder: whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nestling import processes
from nestling.errors import CheckpointError

STALE_SECONDS = 3600


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary sibling, then give it its name; nothing is left when it fails.

    Of several processes the first writes, while the others wait.
    """

    def fill() -> None:
        with whole(path) as temporary:
            write(temporary)

    processes.first(fill)


@contextlib.contextmanager
def whole(path: Path, remedy: str = "make room or name another place") -> Iterator[Path]:
    """A name beside `path`: what the block writes there takes its place if it ends well and vanishes if it does not.

    Raises `CheckpointError`, which ends in the remedy, for what the file system refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"'{path}' cannot be written ({getattr(error, 'strerror', None) or error}): {remedy}"
        ) from error
    finally:
        _remove(temporary)


def _sweep(path: Path) -> None:
    """Remove what killed processes left beside `path`; another that writes there now is at work within the hour."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
