"""What a person sees while a job runs: a line per stage, and a bar with time left inside long ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.padding import Padding
from rich.progress import Progress

from nestling import processes
from nestling.train.callbacks import bar_columns

# Updates further apart than rich looks back for a speed, half a minute, would leave a bar without its time left.
LOOKS_BACK = 24 * 3600
LAST_FEW = 4  # tries by which the time of the next ones is judged

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
    columns = bar_columns(console)
    with Progress(
        *columns, console=console, transient=True, disable=hidden, speed_estimate_period=LOOKS_BACK
    ) as progress:
        task = progress.add_task(what, total=total)
        yield lambda amount: progress.advance(task, amount)


def tries() -> Callable[[str, int], None]:
    """Prints what is tried next, its number, and how long all that are left take, if they take as long as the last few.

    The function is told what it is and how many are left with it.
    """
    begun: list[float] = []

    def say(what: str, left: int) -> None:
        begun.append(time.monotonic())
        done, few = len(begun) - 1, begun[-LAST_FEW - 1 :]
        more = f"  [dim]{duration((few[-1] - few[0]) / (len(few) - 1) * left)} left[/]" if done else ""
        console.print(Padding(f"{done + 1}/{done + left} {what}{more}", (0, 0, 0, 4)))

    return say


def duration(seconds: float) -> str:
    """`75` -> `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
