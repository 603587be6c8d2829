"""One job at a time on a run folder: whoever works on it holds a lock on it, and a second job is told so.

The lock is the kernel's (`flock` on the folder itself): no file is left, and a job that is killed holds nothing, so
that the run can be resumed at once. Where folders cannot be locked (Windows, some network file systems) none is held.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nestling import processes
from nestling.errors import CheckpointError

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]


class Hold:
    """A folder that this process works on, until the last reference to the hold is gone."""

    def __init__(self, handle: int):
        weakref.finalize(self, os.close, handle)


_held: weakref.WeakValueDictionary[tuple[int, int], Hold] = weakref.WeakValueDictionary()


def hold(folder: Path) -> Hold | None:
    """Hold a folder, made if it is missing, against other processes; within this one it is shared.

    None where folders cannot be locked. Raises `CheckpointError` when another process holds it or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"the folder '{folder}' cannot be made ({error.strerror}): name another") from error
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    status = os.fstat(handle)
    known = _held.get((status.st_dev, status.st_ino))
    if known is not None:
        os.close(handle)
        return known
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise CheckpointError(
            f"another job is at work in '{folder}': wait until it ends, or name another folder"
        ) from error
    except OSError:
        os.close(handle)
        return None
    held = _held[status.st_dev, status.st_ino] = Hold(handle)
    return held


@contextmanager
def held(folder: str | Path | None) -> Iterator[None]:
    """While open, the first of this job's processes holds the folder, which is made if it is missing.

    Does nothing without a folder. Raises `CheckpointError`, in all processes, when another job holds it or it cannot be
    made.
    """
    found: list[Hold | None] = []
    if folder is not None:
        processes.first(lambda: found.append(hold(Path(folder))))
    try:
        yield
    finally:
        found.clear()
