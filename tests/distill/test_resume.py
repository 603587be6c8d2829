"""A run that is killed, interrupted or spread over processes ends with the weights of one that is not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nestling.distill import distill
from nestling.errors import CheckpointError
from tests.distill import worker
from tests.models import tiny, token_batches

ROOT = Path(__file__).parents[2]


def call(*arguments, launcher=(), check=True):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, "-m", "tests.distill.worker", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 or not check, done.stderr[-2000:]
    return done


def weights(student):
    return {name: p.detach() for name, p in student.named_parameters()}


def steps(run_dir):
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_num_threads(1)
    run_dir = tmp_path_factory.mktemp("whole")
    return weights(worker.run(str(run_dir))), run_dir


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run folder whose process was killed in step 5, two steps after its checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    assert call(folder / "run", folder / "out", "--die-in-step", 5, check=False).returncode == -signal.SIGKILL
    return folder / "run"


@pytest.fixture
def run_dir(killed, tmp_path):
    return Path(shutil.copytree(killed, tmp_path / "run"))


def test_killed_run_resumes_to_the_same_weights(uninterrupted, run_dir):
    expected, whole = uninterrupted
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert_same(weights(worker.run(str(run_dir))), expected)
    assert steps(run_dir) == steps(whole) == list(range(1, worker.STEPS + 1))


def test_run_killed_while_it_saves_resumes_from_the_checkpoint_before(uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    assert call(run_dir, tmp_path / "out", "--die-in-save", 2, check=False).returncode == -signal.SIGKILL
    sealed = {path.name: (path / "complete.json").exists() for path in (run_dir / "checkpoints").iterdir()}
    assert sealed == {"checkpoint-3": True, "checkpoint-6": False}
    call(run_dir, tmp_path / "out")
    assert_same(load_file(tmp_path / "out"), uninterrupted[0])


def test_resuming_matters(uninterrupted, run_dir):
    """Negative control: from the checkpoint's weights, but with a fresh optimizer, the run ends elsewhere."""
    (run_dir / "checkpoints/checkpoint-3/optimizer.pt").unlink()
    seal = run_dir / "checkpoints/checkpoint-3/complete.json"
    content = json.loads(seal.read_text())
    del content["files"]["optimizer.pt"]
    seal.write_text(json.dumps(content))
    found = weights(worker.run(str(run_dir)))
    assert not all(torch.equal(found[name], value) for name, value in uninterrupted[0].items())


def test_ctrl_c_saves_and_the_run_goes_on(uninterrupted, tmp_path):
    stopped = call(tmp_path / "run", tmp_path / "out", "--interrupt-in-step", 2, check=False)
    assert "KeyboardInterrupt" in stopped.stderr
    assert (tmp_path / "run/checkpoints/checkpoint-2/complete.json").exists()
    assert_same(weights(worker.run(str(tmp_path / "run"))), uninterrupted[0])


def test_a_damaged_checkpoint_does_not_count(uninterrupted, run_dir):
    file = run_dir / "checkpoints/checkpoint-3/model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert_same(weights(worker.run(str(run_dir))), uninterrupted[0])


def test_a_finished_run_is_read_back_and_another_is_refused(uninterrupted, tmp_path):
    expected, whole = uninterrupted
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    assert_same(weights(worker.run(str(run_dir))), expected)
    with pytest.raises(CheckpointError, match=r"a run with learning_rate=0\.01, not 0\.02"):
        worker.run(str(run_dir), learning_rate=2e-2)
    worker.run(str(run_dir), log_every=2, save_every=2, micro_batch_size=2)
    worker.run(str(run_dir), learning_rate=2e-2, steps=2, resume=False)
    assert steps(run_dir) == [1, 2]


def test_another_teacher_or_text_is_refused(uninterrupted, tmp_path):
    """Sizes alike, numbers not."""
    shutil.copytree(uninterrupted[1], tmp_path / "run")
    student, teacher = worker.models()
    how = {"steps": worker.STEPS, "states": ["embedding", "output"], "learning_rate": 1e-2, "batch_size": 4}
    for other, text, word in (
        (tiny("llama-tied", seed=5), token_batches(5, 4, 11), "another teacher"),
        (teacher, token_batches(5, 4, 11, seed=9), "another data"),
    ):
        with pytest.raises(CheckpointError, match=f"belongs to a run with {word}"):
            distill(student, other, text, run_dir=tmp_path / "run", **how)


def test_checkpoint_is_the_student_without_the_projection(uninterrupted):
    expected, whole = uninterrupted
    folder = whole / "checkpoints" / f"checkpoint-{worker.STEPS}"
    student, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same(weights(student), expected)
    assert not any(path.suffix in (".bin", ".pkl") for path in folder.iterdir())
    assert set(load_file(folder / "learner.safetensors")) == {"projection.weight", "projection.bias"}


def test_two_processes_train_the_same_weights(tmp_path):
    expected = weights(worker.run(None, dropout=0.0, states=[], ce_weight=0.3))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    call(tmp_path / "run", tmp_path / "out", "--spread", launcher=launcher)
    found = load_file(tmp_path / "out")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)
    assert steps(tmp_path / "run") == list(range(1, worker.STEPS + 1))
