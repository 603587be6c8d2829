"""A folder with a checkpoint, text and a ranking, in which command lines of these tests run."""

import functools
import json
import shutil
from pathlib import Path

import pytest

from nestling import evaluate
from nestling.cli import main
from nestling.recipes import child
from tests import checkpoint

TEXT = ["--data", "text.jsonl", "--context", "32"]
FEW = [*TEXT, "--calibration_tokens", "128", "--generated", "0"]
JOB = [
    *TEXT,
    *("--calibration_tokens", "256", "--evaluation_tokens", "64", "--generated", "0", "--finalists", "2"),
    *("--distill.tokens", "128", "--distill.context", "32", "--distill.batch_size", "2", "--distill.save_every", "1"),
]


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """Model `m`, its text and its ranking, made once; tests work in copies."""
    folder = tmp_path_factory.mktemp("original")
    checkpoint.write(folder / "m")
    checkpoint.write_text(folder / "text.jsonl")
    return folder


@pytest.fixture
def place(original, tmp_path, monkeypatch) -> Path:
    """A copy to work in, which is the current folder."""
    shutil.copytree(original, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("NESTLING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "place"


@pytest.fixture
def brief(monkeypatch) -> None:
    """Jobs measure speed and write samples only as far as it takes to see that they do."""
    quick = functools.partial(evaluate.speed, prompt_tokens=4, new_tokens=1, rounds=1, warmup=0)
    monkeypatch.setattr(evaluate, "speed", quick)
    monkeypatch.setattr(child, "PROMPTS", ("the model",))
    monkeypatch.setattr(child, "SAMPLE_TOKENS", 2)


def run(capsys, *arguments: object) -> dict:
    """What a command line prints as JSON on its last line."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def files(folder: Path) -> set[str]:
    """Every file and folder below."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
