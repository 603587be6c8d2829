"""Which checkpoints count as whole."""

import json

import pytest

from nestling.errors import CheckpointError
from nestling.train.checkpoints import SEAL, _write_seal, clear, fingerprint, newest


def checkpoint(folder, step, run="mine", sealed=True):
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x" * step)
    (path / "inner" / "part").write_bytes(b"y")
    if sealed:
        _write_seal(path, run)
    return path


def test_newest_by_number_among_the_whole_ones(tmp_path):
    assert newest(tmp_path / "missing", "mine") is None
    checkpoint(tmp_path, 9)
    expected = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, sealed=False)
    assert newest(tmp_path, "mine") == expected


@pytest.mark.parametrize("damage", ["shorter", "missing", "no seal", "half a seal", "not a mapping"])
def test_damage_makes_it_not_count(tmp_path, damage):
    older, damaged = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    {
        "shorter": lambda: (damaged / "model.safetensors").write_bytes(b"x"),
        "missing": lambda: (damaged / "inner" / "part").unlink(),
        "no seal": lambda: (damaged / SEAL).unlink(),
        "half a seal": lambda: (damaged / SEAL).write_text('{"run": "mi'),
        "not a mapping": lambda: (damaged / SEAL).write_text(json.dumps([1])),
    }[damage]()
    assert newest(tmp_path, "mine") == older


def test_another_run_is_refused(tmp_path):
    checkpoint(tmp_path, 3, run="theirs")
    with pytest.raises(CheckpointError, match="checkpoint-3' belongs to a run with another"):
        newest(tmp_path, "mine")


def test_clear_keeps_what_it_is_told_and_what_is_no_checkpoint(tmp_path):
    kept = checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 3, sealed=False)
    (tmp_path / "checkpoint-best").mkdir()
    clear(tmp_path, keep=kept)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-best"}


def test_fingerprint_tells_values_apart():
    assert fingerprint(1, {"a": 2, "b": 3}) == fingerprint(1, {"b": 3, "a": 2})
    assert fingerprint(1) != fingerprint(2)
