"""A command that runs in several processes: one voice, one exit code, and a quick end when a process is lost.

Only the first process prints. A mistake in the input is one sentence, whichever process meets it, and all leave with
the same code. When a process dies, the launcher ends the others (SIGTERM) or their connection to it breaks; either
way one sentence says so and the process leaves, also from within a collective call that would wait for ever. One
process alone takes SIGTERM as it takes Ctrl-C: it cleans up and keeps what a later one can go on from.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

from nestling import processes

LOST = "nestling: a process of this job was lost; run the same command again to go on from its last checkpoint"
GRACE_S = 5  # how long processes wait for each other before they leave


class Job:
    """The processes of one command, as one of them sees them."""

    def __init__(self) -> None:
        self.several = processes.count() > 1
        self._store: Any = None
        self._end: Any = None
        self._code = 1  # to leave with when the launcher ends this process
        self.interrupted_code = 130

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Processes are connected and, except for the first, silent; raises `SystemExit` when one is lost."""
        if not self.several:
            with self._ended_as_interrupted():
                yield
            return
        self._store = processes.start()
        self._watch()
        with contextlib.ExitStack() as silence:
            if not processes.is_first():
                silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
                silence.enter_context(contextlib.redirect_stderr(io.StringIO()))
            try:
                yield
            except SystemExit:
                self._leave_together()
                raise
            except Exception as error:
                if not processes.connection_broke(error):
                    raise
                silence.close()
                self._say_lost()
                raise SystemExit(1) from None

    def say(self, sentence: str, code: int) -> int:
        """Print a sentence on stderr, once for all processes that have come to it; returns the code to leave with."""
        self._code = code
        if self._store is None:
            print(sentence, file=sys.stderr, flush=True)
            return code
        if processes.is_first():
            print(sentence, file=sys.stderr, flush=True)
            self._store.set("said", "yes")
        elif not self._told():
            print(f"{sentence} (process {processes.number()})", file=sys.stderr, flush=True)
            return code
        self._leave_together()
        return code

    @contextlib.contextmanager
    def _ended_as_interrupted(self) -> Iterator[None]:
        """SIGTERM, as schedulers send it, does what Ctrl-C would do at that moment, also where Ctrl-C is ignored."""

        def end(number: int, frame: FrameType | None) -> None:
            self.interrupted_code = 128 + number
            interrupt = signal.getsignal(signal.SIGINT)
            (interrupt if callable(interrupt) else signal.default_int_handler)(signal.SIGINT, frame)

        try:
            before = signal.signal(signal.SIGTERM, end)
        except ValueError:  # not the main thread: signals are none of our business
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _told(self) -> bool:
        """Whether the first process has come to say it too."""
        try:
            self._store.wait(["said"], timedelta(seconds=GRACE_S))
        except RuntimeError:
            return False
        return True

    def _leave_together(self) -> None:
        """The launcher ends the others as soon as one has left, so none leaves before all are ready to."""
        until = time.monotonic() + GRACE_S
        with contextlib.suppress(RuntimeError):
            self._store.add("ready", 1)
            while self._store.add("ready", 0) < processes.count() and time.monotonic() < until:
                time.sleep(0.05)

    def _watch(self) -> None:
        """Leave at SIGTERM from a thread of its own: the main one may be inside a call that never returns."""
        reader, self._end = socket.socketpair()
        self._end.setblocking(False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # Python then writes the number to the socket
        signal.set_wakeup_fd(self._end.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._wait_for_the_end, args=(reader,), daemon=True).start()

    def _wait_for_the_end(self, reader: socket.socket) -> None:
        while signal.SIGTERM not in reader.recv(1):
            pass
        self._say_lost()
        os._exit(self._code)

    def _say_lost(self) -> None:
        """Whichever process finds out first says it; where even that cannot be known, this one does."""
        try:
            heard = self._store.add("lost", 1) > 1 or self._store.check(["said"])
        except RuntimeError:
            heard = False
        if not heard:
            print(LOST, file=sys.__stderr__, flush=True)
