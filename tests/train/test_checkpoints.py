"""Which checkpoints count as whole."""

import json
from dataclasses import replace

import pytest

from nestling.errors import CheckpointError
from nestling.train import TrainSettings
from nestling.train.checkpoints import SEAL, Making, _write_seal, clear, fingerprint, newest

MINE = Making(TrainSettings(), {"student": "a", "data": "b"})


def checkpoint(folder, step, run=MINE, sealed=True):
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x" * step)
    (path / "inner" / "part").write_bytes(b"y")
    if sealed:
        _write_seal(path, run)
    return path


def test_newest_by_number_among_the_whole_ones(tmp_path):
    assert newest(tmp_path / "missing", MINE) is None
    checkpoint(tmp_path, 9)
    expected = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, sealed=False)
    assert newest(tmp_path, MINE) == expected


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
    assert newest(tmp_path, MINE) == older


def test_other_settings_are_refused_by_name_and_value(tmp_path):
    checkpoint(tmp_path, 3)
    other = replace(MINE, settings=TrainSettings(learning_rate=1e-3))
    with pytest.raises(CheckpointError, match=r"a run with learning_rate=0\.0003, not 0\.001: resume with"):
        newest(tmp_path, other)
    assert newest(tmp_path, replace(MINE, settings=TrainSettings(save_every=7, log_every=3)))


@pytest.mark.parametrize("parts", [{"student": "a", "data": "c"}, {"student": "a"}])
def test_other_data_is_refused(tmp_path, parts):
    checkpoint(tmp_path, 3)
    with pytest.raises(CheckpointError, match="belongs to a run with another data"):
        newest(tmp_path, replace(MINE, parts=parts))


def test_a_seal_from_before_a_setting_counts_as_its_default(tmp_path):
    path = checkpoint(tmp_path, 3)
    seal = json.loads((path / SEAL).read_text())
    del seal["run"]["settings"]["max_grad_norm"]
    (path / SEAL).write_text(json.dumps(seal))
    assert newest(tmp_path, MINE) == path
    with pytest.raises(CheckpointError, match=r"max_grad_norm=1\.0, not 0\.5"):  # negative control
        newest(tmp_path, replace(MINE, settings=TrainSettings(max_grad_norm=0.5)))


def test_a_seal_without_settings_is_refused(tmp_path):
    path = checkpoint(tmp_path, 3)
    seal = json.loads((path / SEAL).read_text())
    (path / SEAL).write_text(json.dumps(seal | {"run": "0123456789abcdef"}))
    with pytest.raises(CheckpointError, match="by an earlier version"):
        newest(tmp_path, MINE)


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
