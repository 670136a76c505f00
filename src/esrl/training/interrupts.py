"""Stopping a run by SIGINT (Ctrl-C) or SIGTERM: at once where it can, after the save where it must."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from esrl.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While the block runs, SIGINT and SIGTERM raise ``Interrupted``: once, and never inside a critical section.

        with Interrupts() as interrupts:
            rewards = score(texts)            # left at once, however long it takes
            with interrupts.critical():
                update()                      # finished first, then left

    After ``Interrupted`` was raised further signals are only noted, so the state can be saved in peace. Of several
    signals the first one counts. ``deferred=True`` is for several processes, which must stop at the same step: nothing
    is ever raised, and the loop looks at ``pending``.

    Works in the main thread; in any other no handler is installed (Python delivers signals to the main thread only).
    A process forked from this one does not take part: signals end it as they would have without us.
    """

    def __init__(self, *, deferred: bool = False) -> None:
        self.deferred = deferred
        self.pending: signal.Signals | None = None
        """The first signal that came, whether raised or only noted."""
        self._raised = False
        self._count = 0
        self._depth = 0
        self._pid = os.getpid()
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def critical(self) -> _Critical:
        """A section that no signal interrupts; a noted one is raised when the outermost section ends.

        An exception that leaves the section goes first: then nothing is raised in its place, and ``pending`` tells.
        """
        return _Critical(self)

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self
        try:
            with self.critical():  # or a signal could come between the two, and the first would stay installed
                for number in SIGNALS:
                    self._previous[number] = signal.signal(number, self._handle)
            return self
        except BaseException:
            self._restore()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._depth += 1  # for good: from here on signals are only noted, or the old handlers might not come back
        self._restore()
        if kind is None:
            self._raise_pending()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._count += 1
        if self.pending is None:
            self.pending = signal.Signals(number)
        # a signal between the call of __exit__ and its first line would leave the handlers installed for good
        leaving = frame is not None and frame.f_code is Interrupts.__exit__.__code__
        if self._depth == 0 and not leaving:
            self._raise_pending()
        if self._count == 3:
            with suppress(OSError):  # not print: the interrupted code may hold stderr's buffer
                os.write(2, b"esrl: saving is in progress; the run stops when it is done.\n")

    def _raise_pending(self) -> None:
        if self.pending is not None and not self._raised and not self.deferred:
            self._raised = True
            raise Interrupted(self.pending)


class _Critical:
    """A class, not a generator: every instant belongs to exactly one side of the depth's change."""

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts

    def __enter__(self) -> None:
        self._interrupts._depth += 1

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        self._interrupts._depth -= 1
        if self._interrupts._depth == 0 and kind is None:
            self._interrupts._raise_pending()
