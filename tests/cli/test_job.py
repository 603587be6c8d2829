"""A command in several processes: it speaks once, all leave with one code, and a lost process ends it."""

import contextlib
import io
import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from nestling import hub, processes
from nestling.cli import main
from nestling.cli.job import LOST, Job
from nestling.ranking import Ranking
from tests.cli.workplace import FEW
from tests.data import toy
from tests.distill import worker
from tests.models import tiny
from tests.several import outcomes, together


def called(arguments):
    """Exit code, and what this process printed."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        try:
            code = main(arguments)
        except SystemExit as left:
            code = left.code
    return code, printed.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "text.txt").write_text("".join(toy.TEXT) * 20)
    for seed, name in enumerate(("parent", "teacher")):
        hub.save(tiny("llama", seed=seed, vocab_size=toy.VOCAB), folder / name, toy.tokenizer())
    return folder


def rank_command(model, out):
    text = {"data": model / "text.txt", "tokens": 96, "context": 12, "out": out, "dtype": "float64"}
    options = [part for name, value in text.items() for part in (f"--{name}", str(value))]
    return ["rank", str(model / "parent"), *options, "--json"]


def test_rank_in_two_processes(model, tmp_path):
    """The same ranking as in one, its text written by the model itself included; one file, one voice."""
    alone = called(rank_command(model, tmp_path / "one"))
    (code, printed), (other_code, silent) = together(2, tmp_path, called, rank_command(model, tmp_path / "two"))
    assert (alone[0], code, other_code, silent) == (0, 0, 0, "")
    assert json.loads(printed.splitlines()[-1])["tokens"] == json.loads(alone[1].splitlines()[-1])["tokens"]
    one, two = (Ranking.load(tmp_path / name) for name in ("one", "two"))
    torch.testing.assert_close(two.scores, one.scores, rtol=1e-9, atol=1e-12)


def test_search_in_two_processes(place, tmp_path):
    """Ranking, repair and losses of shapes: the same candidates in the same order, and one voice."""
    command = ["search", "m", "--to", "0.8x", "--axes", "intermediate_size", *FEW]
    alone, _ = called([*command, "--out", "one"])
    (code, printed), silent = together(2, tmp_path, called, [*command, "--out", "two"])
    assert (alone, code, silent) == (0, 0, (0, ""))
    assert printed.count("report:") == 1
    one, two = (json.loads((place / name / "summary.json").read_text())["candidates"] for name in ("one", "two"))
    assert [candidate["shape"] for candidate in two] == [candidate["shape"] for candidate in one]
    assert [candidate["loss"] for candidate in two] == pytest.approx([candidate["loss"] for candidate in one], rel=1e-5)


def test_a_refused_input_is_one_sentence_once(model, tmp_path):
    nowhere = called(["rank", str(tmp_path / "nowhere")])
    found = together(2, tmp_path, called, ["rank", str(tmp_path / "nowhere")])
    assert found == [nowhere, (2, "")]
    assert nowhere[1].count("\n") == 1
    command = ["rank", str(model / "parent"), "--data", "nowhere.txt"]  # only the first process reads text
    (code, printed), silent = together(2, tmp_path, called, command)
    assert (code, printed.count("does not exist"), silent) == (2, 1, (2, ""))
    (code, printed), silent = together(2, tmp_path, called, ["rank"])
    assert (code, silent) == (2, (2, ""))
    assert printed


def distill_command(place, out):
    settings = {"steps": 6, "context": 12, "batch_size": 4, "save_every": 2, "learning_rate": 1e-2}
    given = [part for name, value in settings.items() for part in (f"--distill.{name}", str(value))]
    data = ["--data", str(place / "text.txt"), "--dtype", "float64"]
    parent = str(place / "parent")
    return ["distill", parent, "--teacher", str(place / "teacher"), "--out", str(out), *data, *given]


def dying(arguments):
    """The second process is killed in its fifth step."""
    if not processes.is_first():
        worker._signal_in_step(5, signal.SIGKILL)
    return called(arguments)


def test_a_killed_worker_ends_the_run_which_goes_on(model, tmp_path, capfd):
    """One sentence and exit code 1 in the other process; the same command again ends as if nothing had been."""
    command = distill_command(model, tmp_path / "run")
    (code, (left, _)), (killed, _) = outcomes(2, tmp_path, dying, command)
    assert (code, left, killed) == (0, 1, -signal.SIGKILL)
    assert capfd.readouterr().err.count(LOST) == 1
    assert not (tmp_path / "run/model").exists()
    assert [code for code, _ in together(2, tmp_path, called, command)] == [0, 0]
    assert called(distill_command(model, tmp_path / "one"))[0] == 0
    found, expected = (load_file(tmp_path / name / "model/model.safetensors") for name in ("run", "one"))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def left_alone(file, end):
    """The first process waits in a collective call for the second, which is gone."""
    job = Job()
    if processes.is_first():
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)
    with job.running():
        first = processes.first(os.getpid)
        if not processes.is_first():
            os.kill(os.getpid() if end == "killed" else first, signal.SIGKILL if end == "killed" else signal.SIGTERM)
            while _alive(first):  # not there, but not gone either
                time.sleep(0.05)
        processes.summed(torch.ones(1))


@pytest.mark.parametrize("end", ["killed", "ended by the launcher"])
def test_a_lost_process_ends_the_job(tmp_path, end):
    """Its broken connection, or the launcher's signal while the main thread hangs: one sentence, exit code 1."""
    (code, _), _ = outcomes(2, tmp_path, left_alone, tmp_path / "stderr", end)
    assert code == 1
    assert (tmp_path / "stderr").read_text().strip() == LOST


def _alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("ignored", [False, True])
def test_sigterm_is_taken_as_ctrl_c_even_where_that_is_ignored(ignored):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    job = Job()
    try:
        if ignored:  # as in jobs that a shell script starts in the background
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        with pytest.raises(KeyboardInterrupt), job.running():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert job.interrupted_code == 143
    assert signal.getsignal(signal.SIGTERM) is before[1]
