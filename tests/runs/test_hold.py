"""A run folder belongs to one job at a time; one that was killed holds nothing."""

import gc
import subprocess
import sys

import pytest

from nestling.distill import distill
from nestling.errors import CheckpointError
from nestling.recipes.run import Run
from nestling.runs import held, hold
from tests.models import tiny, token_batches
from tests.recipes.test_run import Settings

OTHER = """
import fcntl, os, sys, time
handle = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path):
    Run("prune", Settings(), tmp_path / "run")
    gc.collect()
    return tmp_path / "run"


@pytest.fixture
def other(folder):
    """Another process at work in the folder."""
    with subprocess.Popen([sys.executable, "-c", OTHER, folder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_job_is_refused_and_changes_nothing(folder, other, overwrite):
    with pytest.raises(CheckpointError, match="another job is at work"):
        Run("prune", Settings(), folder, overwrite=overwrite)
    assert (folder / "run.yaml").exists()


def test_training_into_a_folder_that_another_job_works_on_is_refused(folder, other):
    student, teacher = tiny("llama", seed=1), tiny("llama")
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match="another job is at work"):
        distill(student, teacher, token_batches(1, 2, 8), steps=1, batch_size=2, run_dir=folder)
    assert sorted(folder.rglob("*")) == before


def test_training_holds_its_folder_until_it_ends(tmp_path):
    taken = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", taken, tmp_path / "run"]
    with held(tmp_path / "run"):
        assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made"), held(tmp_path / "file" / "run"):
        pass


def test_a_killed_job_holds_nothing(folder, other):
    other.kill()
    other.wait()
    assert Run("prune", Settings(), folder).has("run.yaml")


def test_one_process_may_come_back_to_its_folder(folder):
    first, second = hold(folder), hold(folder)
    assert first is second is not None


def test_a_job_that_ended_holds_nothing(folder):
    run = Run("prune", Settings(), folder)
    taken = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", taken, folder]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0  # negative control
    del run
    gc.collect()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
