"""Nothing is ever half written: a write that fails leaves nothing, and what was there stays."""

import os
import time

import pytest

from nestling.errors import CheckpointError
from nestling.runs import write_atomically


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(28, "No space left on device")])
@pytest.mark.parametrize("folder", [False, True])
def test_nothing_is_left_of_a_write_that_fails(tmp_path, error, folder):
    def write(path):
        if folder:
            path.mkdir()
            path = path / "part"
        path.write_text("half")
        raise error

    with pytest.raises((KeyboardInterrupt, ValueError, CheckpointError)) as raised:
        write_atomically(tmp_path / "result", write)
    assert names(tmp_path) == []
    if isinstance(error, OSError):
        assert "cannot be written (No space left on device)" in str(raised.value)


def test_a_write_that_fails_keeps_what_was_there(tmp_path):
    (tmp_path / "result").write_text("before")
    with pytest.raises(ZeroDivisionError):
        write_atomically(tmp_path / "result", lambda path: path.write_text(str(1 // 0)))
    assert (tmp_path / "result").read_text() == "before"
    write_atomically(tmp_path / "result", lambda path: path.write_text("after"))
    assert (tmp_path / "result").read_text() == "after"
    assert names(tmp_path) == ["result"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_left_is_removed_but_not_what_another_writes_now(tmp_path, folder):
    for number, hours in enumerate([2, 0]):
        left = tmp_path / f".result.{number}.tmp"
        left.mkdir() if folder else left.touch()
        then = time.time() - hours * 3600
        os.utime(left, (then, then))
    write_atomically(tmp_path / "result", lambda path: path.write_text("whole"))
    assert names(tmp_path) == [".result.1.tmp", "result"]
