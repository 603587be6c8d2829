"""The whole job stopped at every stage, by Ctrl-C and by a full disk: what is left is whole, and it goes on."""

import errno
import os
import signal
from types import SimpleNamespace
from typing import Any, cast

import pytest
from safetensors.torch import load_file
from transformers import Trainer, modeling_utils

from nestling import evaluate
from nestling.cli import main
from nestling.ranking import ranking
from nestling.recipes import child, shapes, summary
from tests.cli.workplace import JOB, brief, files, original, place
from tests.data import toy
from tests.models import tiny

__all__ = ["brief", "original", "place"]

SEARCHED = ["compress", "m", "--to", "0.8x", "--axes", "intermediate_size", "--out", "run", *JOB]
SHAPED = ["compress", "m", "--shape", "intermediate_size=30", "--out", "run", *JOB]


def test_samples_are_written_with_a_tokenizer_that_tells_sentences_apart():
    """After hours of work is too late to find out that `generate` does not take what the tokenizer returns."""
    tokenizer, model = toy.tokenizer(), tiny("llama", vocab_size=toy.VOCAB)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert child.Parent._continue(cast(Any, SimpleNamespace(tokenizer=tokenizer)), model, "the model")
    with pytest.raises(ValueError, match="token_type_ids"):  # negative control
        model.generate(**tokenizer("the model", return_tensors="pt"))


def weights(folder):
    return {name: tensor.tolist() for name, tensor in load_file(folder / "model.safetensors").items()}


def interrupt(*_, **__):
    raise KeyboardInterrupt


def half_written(folder):
    return [name for name in files(folder) if any(mark in name for mark in (".tmp", ".partial", ".old"))]


def test_a_job_that_is_stopped_at_every_stage_ends_with_the_same_model(place, brief, monkeypatch, capsys):
    """Each run gets one stage further than the one before."""
    assert main([*SEARCHED, "--out", "whole"]) == 0
    stages = [
        (child.Source, "calibration"),
        (child, "rank"),
        (shapes, "pick"),
        (child.Origin, "prune"),
        (child.hub, "save"),
        (Trainer, "training_step"),
        (child.Parent, "scores"),
        (evaluate, "speed"),
        (child.Parent, "samples"),
        (summary, "summarize"),
        (summary, "write_report"),
    ]
    for holder, name in stages:
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, interrupt)
            assert main(SEARCHED) == 130, name
        assert "interrupted; run the same command again to continue" in capsys.readouterr().err
        assert not half_written(place)
    assert main(SEARCHED) == 0
    assert weights(place / "run" / "model") == weights(place / "whole" / "model")
    before = {name: (place / name).stat().st_mtime_ns for name in files(place / "run") if (place / name).is_file()}
    assert main(SEARCHED) == 0, "a finished job only prints its result again"
    assert all((place / name).stat().st_mtime_ns == time for name, time in before.items())


def test_ctrl_c_amid_training_goes_on_to_the_same_weights(place, brief, monkeypatch):
    assert main([*SHAPED, "--out", "whole"]) == 0
    real = Trainer.training_step

    def step(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", step)
        assert main(SHAPED) == 130
    assert not (place / "run" / "model").exists()
    assert list((place / "run" / "checkpoints").glob("checkpoint-*"))
    assert main(SHAPED) == 0
    assert weights(place / "run" / "model") == weights(place / "whole" / "model")


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_sentence_and_the_job_goes_on_when_there_is_room(place, brief, monkeypatch, capsys):
    """Texts, scores and models are each the first thing that does not fit."""
    for holder, name in ((child, "save_file"), (ranking, "save_file"), (modeling_utils, "safe_save_file")):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, full)
            assert main(SHAPED) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nestling: ")]
        assert len(said) == 1
        assert "No space left" in said[0] or "is full" in said[0]
        assert not half_written(place)
    assert main(SHAPED) == 0


def test_other_settings_in_the_same_folder_are_refused(place, brief, monkeypatch, capsys):
    monkeypatch.setattr(child, "rank", interrupt)
    assert main(SHAPED) == 130
    kept = files(place / "run")
    capsys.readouterr()
    assert main([*SHAPED, "--seed", "1"]) == 2
    assert "'run' holds a run with seed=0, not 1: name another folder" in capsys.readouterr().err
    assert files(place / "run") == kept
    assert main([*SHAPED, "--seed", "1", "--overwrite", "true"]) == 130
