"""A run folder belongs to one job at a time; one that was killed holds nothing."""

import gc
import subprocess
import sys

import pytest

from nestling.errors import CheckpointError
from nestling.recipes.hold import hold
from nestling.recipes.run import Run
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
