"""What can go wrong, and the exit code each failure has (docs/reliability.md).

Bad input and bad configuration raise ``ValueError`` (exit code 2). Everything else has a class here.
"""

from __future__ import annotations


class EsrlError(Exception):
    """A failure with its own exit code; the message is one line: what, where, what to do."""

    exit_code = 1


class RewardError(EsrlError):
    """A reward function broke its contract."""

    exit_code = 3


class NumericsError(EsrlError):
    """A loss, gradient, log-probability or capability is not finite."""

    exit_code = 4


class OutOfMemoryError(EsrlError):
    """Memory ran out at the smallest possible micro-batch."""

    exit_code = 5


class StorageError(EsrlError):
    """The disk refused a write, or no checkpoint is intact."""

    exit_code = 6


class LockedError(EsrlError):
    """Another process is writing to the run folder."""

    exit_code = 7


class Interrupted(BaseException):
    """A signal asked the run to stop; carries the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        return 128 + self.signum
