"""A fork that loses no signal.

Between the fork and its own handlers a worker of gunicorn's has its parent's: a TERM that comes then is put
in a queue that nobody reads, and the worker is waited for until it is killed.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


@contextmanager
def signals_held() -> Iterator[None]:
    """Around the fork, in the parent: signals that stop a process wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release_signals() -> None:
    """In the child, as soon as it has handlers of its own: what waited arrives."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)
