"""One task that waits until something is there, or has taken too long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Waiter:
    """Waits for one task at a time; cheaper than an event and ``wait_for``, which every request would pay for."""

    __slots__ = ("_expired", "_future", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._future: asyncio.Future[None] | None = None
        self._expired = False

    async def wait(self, timeout: float, is_there: Callable[[], bool]) -> None:
        """Until ``is_there``, which is asked again after each :meth:`wake`, and may raise to end the wait.

        Raises :class:`TimeoutError` after ``timeout`` seconds.
        """
        timer = None
        try:
            while not is_there():
                if timer is None:
                    self._expired = False
                    timer = self._loop.call_later(timeout, self._expire)
                elif self._expired:
                    raise TimeoutError
                self._future = self._loop.create_future()
                await self._future
        finally:
            self._future = None
            if timer is not None:
                timer.cancel()

    def wake(self) -> None:
        """Let the task look again."""
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def _expire(self) -> None:
        self._expired = True
        self.wake()
