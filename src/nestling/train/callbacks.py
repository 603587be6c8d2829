"""What happens beside the training loop: the run folder's metrics, the progress a person sees, and Ctrl-C.

All are `TrainerCallback`s and act on the first process only. They know no loss: what a trainer logs is what is
written and shown.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nestling.runs import whole

METRICS = "metrics.jsonl"
SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal to draw a bar on
NARROW = 90  # columns of a terminal below which a progress bar says less
DROPPED = ("epoch", "num_input_tokens_seen")


class MetricsLog(TrainerCallback):
    """Appends what is logged to `metrics.jsonl`: step, tokens, the losses, learning_rate, elapsed_s.

    A resumed run first drops the records after the step it resumes from; its clock goes on from the last one left.
    """

    def __init__(self, run_dir: Path):
        self.path = run_dir / METRICS
        self._started = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        kept = [record for record in _records(self.path) if record["step"] <= state.global_step]
        with whole(self.path) as beside:
            beside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._started = time.monotonic() - (kept[-1].get("elapsed_s", 0.0) if kept else 0.0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss"} & set(logs):
            return
        values = {k: float(f"{v:.7g}") for k, v in logs.items() if isinstance(v, (int, float)) and k not in DROPPED}
        elapsed = round(time.monotonic() - self._started, 3)
        record = {"step": state.global_step, "tokens": state.num_input_tokens_seen, **values, "elapsed_s": elapsed}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def bar_columns(console: Console, *figures: ProgressColumn) -> tuple[ProgressColumn, ...]:
    """What a progress bar shows: what is done, how much of it, figures of its own, and the time left.

    A narrow terminal gets a short bar and no time gone by, so that the rest fits into 60 columns.
    """
    narrow = console.width < NARROW
    return (
        TextColumn("    {task.description}"),
        BarColumn(bar_width=8 if narrow else 20),
        MofNCompleteColumn(),
        *figures,
        *(() if narrow else (TimeElapsedColumn(),)),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


class ShowProgress(TrainerCallback):
    """A bar with the loss and the time left; a line now and then where there is no terminal."""

    def __init__(self, what: str):
        self.what = what
        self.console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._loss, self._started, self._from, self._printed = math.nan, 0.0, 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = self._printed = time.monotonic()
        self._from = state.global_step
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        columns = bar_columns(self.console, TextColumn("loss {task.fields[loss]:.3f}"))
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._bar.add_task(self.what, total=state.max_steps, completed=state.global_step, loss=math.nan)
        self._bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._loss = (logs or {}).get("loss", self._loss)
        if not state.is_world_process_zero:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step, loss=self._loss)
        elif time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self.console.print(f"    {self.what} {state.global_step}/{state.max_steps}  {self._status(state)}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal; safe to call at any time."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _status(self, state: TrainerState) -> str:
        done = max(1, state.global_step - self._from)
        left = (time.monotonic() - self._started) / done * (state.max_steps - state.global_step)
        minutes, seconds = divmod(round(left), 60)
        return f"loss {self._loss:.3f}  {minutes}:{seconds:02d} left"


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C lets the step finish, saves a checkpoint (if there are any) and stops; a second one stops at once.

    Used as a context manager around `train`, which it leaves with `KeyboardInterrupt`. With several processes, or
    outside the main thread, Ctrl-C keeps its usual meaning and the last checkpoint stands.
    """

    def __init__(self, saves: bool):
        self.saves = saves
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> StopOnInterrupt:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            try:
                self._before = signal.signal(signal.SIGINT, self._ask)
            except ValueError:  # not the main thread: signals are none of our business
                self._before = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if self.asked and exception[0] is None:
            raise KeyboardInterrupt

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = self.saves
            control.should_training_stop = True

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        then = "save a checkpoint and stop" if self.saves else "stop"
        Console(stderr=True).print(f"\n    finishing this step to {then}; Ctrl-C again stops at once")


def _records(path: Path) -> list[dict[str, Any]]:
    """Whole records of a metrics file; a line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
