"""What one worker process tells its supervisor, and the little that the supervisor tells it.

A page of memory that both share, made before the fork. Reading it needs no answer from the other side, so a
worker whose code holds the interpreter lock is still seen, and is seen to hold it.
"""

from __future__ import annotations

import json
import mmap
from typing import Literal, TypedDict, cast

State = Literal["starting", "ready", "stopping", "failed"]
_STATES: tuple[State, ...] = ("starting", "ready", "stopping", "failed")

_STATE, _SUCCESSOR, _BUSY, _SERVED, _TICK, _BEAT, _CLAIMED, _WITHDRAWN, _LENGTH = range(9)
_NUMBERS = 9 * 8
_SIZE = 4096
MOST_MOUNTS = 50
"""How many mounts one board can tell apart; a double holds whole numbers up to 2**53."""


class Facts(TypedDict, total=False):
    """What is written once, before the state changes.

    ``code`` and ``keys`` map a mount's key to fingerprints of the app's source and secret key.
    """

    reason: str
    code: dict[str, str]
    keys: dict[str, str]


class Board:
    """One worker's board.

    Each number is one aligned double with one writer, so that no lock is needed (a dead process could not
    give it back).
    """

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, _SIZE)
        self._number = memoryview(self._page)[:_NUMBERS].cast("d")

    @property
    def state(self) -> State:
        return _STATES[int(self._number[_STATE])]

    @state.setter
    def state(self, state: State) -> None:
        self._number[_STATE] = _STATES.index(state)

    @property
    def wants_successor(self) -> bool:
        """The worker has served enough, and goes on until another is ready."""
        return bool(self._number[_SUCCESSOR])

    @wants_successor.setter
    def wants_successor(self, value: bool) -> None:
        self._number[_SUCCESSOR] = value

    @property
    def busy(self) -> int:
        """Handlers that run."""
        return int(self._number[_BUSY])

    @property
    def served(self) -> int:
        return int(self._number[_SERVED])

    @property
    def tick(self) -> float:
        """When the main thread last came by, on its monotonic clock."""
        return self._number[_TICK]

    def report(self, tick: float, busy: int, served: int) -> None:
        """The worker's main thread came by."""
        self._number[_BUSY], self._number[_SERVED], self._number[_TICK] = busy, served, tick

    def next_beat(self) -> int:
        """The next value of the heartbeat counter; the supervisor's, or an orphan's own."""
        self._number[_BEAT] += 1
        return int(self._number[_BEAT])

    @property
    def claimed(self) -> bool:
        """The registry knows the worker, and so the streams that it reads are there."""
        return bool(self._number[_CLAIMED])

    @claimed.setter
    def claimed(self, value: bool) -> None:
        self._number[_CLAIMED] = value

    def withdraw(self, index: int) -> None:
        """Tell the worker that the mount with this index is no longer its own."""
        self._number[_WITHDRAWN] = int(self._number[_WITHDRAWN]) | 1 << index

    def withdrawn(self) -> int:
        """The mounts that are no longer the worker's, as a bit set of their indices."""
        return int(self._number[_WITHDRAWN])

    def write(self, facts: Facts) -> None:
        """Write the facts, or none where they do not fit."""
        data = json.dumps(facts).encode()
        if len(data) > _SIZE - _NUMBERS:
            data = json.dumps({"reason": facts.get("reason", "")[:500]}).encode()
        self._page[_NUMBERS : _NUMBERS + len(data)] = data
        self._number[_LENGTH] = len(data)

    def read(self) -> Facts:
        length = int(self._number[_LENGTH])
        return cast(Facts, json.loads(self._page[_NUMBERS : _NUMBERS + length])) if length else {}
