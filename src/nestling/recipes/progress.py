"""What a person sees while a job runs: a line per stage, and a bar with time left inside long ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

from nestling import processes
from nestling.train.callbacks import bar_columns

console = Console(stderr=True, highlight=False, quiet=not processes.is_first())


class Stages:
    """Numbers the stages of a job and says how long each took."""

    def __init__(self, total: int):
        self.total, self.number = total, 0

    @contextmanager
    def __call__(self, title: str) -> Iterator[None]:
        self.number += 1
        started = time.monotonic()
        console.print(f"[bold]{self.number}/{self.total}[/] {title}")
        yield
        seconds = time.monotonic() - started
        if seconds >= 1:
            console.print(f"    [dim]done in {duration(seconds)}[/]")


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; yields the function that advances it. Without a terminal only its end is printed."""
    hidden = console.quiet or not console.is_terminal
    with Progress(*bar_columns(console), console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(what, total=total)
        yield lambda amount: progress.advance(task, amount)


def duration(seconds: float) -> str:
    """`75` -> `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
