"""The metrics file over interruptions, and progress without a terminal."""

import json
import signal
from types import SimpleNamespace

import pytest

from nestling.train.callbacks import MetricsLog, ShowProgress, StopOnInterrupt


def state(step, tokens=0, most=10):
    return SimpleNamespace(global_step=step, max_steps=most, num_input_tokens_seen=tokens, is_world_process_zero=True)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_resumed_run_drops_what_it_does_again_and_keeps_its_clock(tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = [{"step": step, "tokens": 8 * step, "loss": 1.0, "elapsed_s": 100.0 * step} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(record) + "\n" for record in before) + '{"step": 4, "lo')
    log = MetricsLog(tmp_path)
    log.on_train_begin(None, state(2), None)
    log.on_log(None, state(3, 24), None, logs={"loss": 0.5, "kl": 0.4, "epoch": 0.3})
    log.on_log(None, state(3, 24), None, logs={"train_runtime": 3.0})
    assert lines(path)[:2] == before[:2]
    last = lines(path)[2]
    assert (len(lines(path)), last["step"], last["tokens"], last["loss"], last["kl"]) == (3, 3, 24, 0.5, 0.4)
    assert "epoch" not in last
    assert 200 <= last["elapsed_s"] < 300


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr("nestling.train.callbacks.SECONDS_BETWEEN_LINES", 0)
    progress = ShowProgress("steps")
    progress.on_train_begin(None, state(0), None)
    progress.on_log(None, state(5), None, logs={"loss": 1.25})
    progress.on_train_end(None, state(10), None)
    assert "steps 5/10  loss 1.250" in capsys.readouterr().err


def test_interrupt_finishes_the_step_then_raises():
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    stop = StopOnInterrupt(saves=True)
    handler_before = signal.getsignal(signal.SIGINT)

    def train():
        with stop:
            stop.on_step_end(None, state(1), control)
            assert not control.should_training_stop
            signal.raise_signal(signal.SIGINT)
            stop.on_step_end(None, state(2), control)

    with pytest.raises(KeyboardInterrupt):
        train()
    assert control.should_training_stop
    assert control.should_save
    assert signal.getsignal(signal.SIGINT) is handler_before


def test_second_interrupt_stops_at_once():
    reached = []

    def train():
        with StopOnInterrupt(saves=False):
            signal.raise_signal(signal.SIGINT)
            reached.append(1)
            signal.raise_signal(signal.SIGINT)
            reached.append(2)

    with pytest.raises(KeyboardInterrupt):
        train()
    assert reached == [1]
