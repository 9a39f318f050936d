"""The other gateways of the bus, and which of them are alive."""

from __future__ import annotations

import json
import re


class Peers:
    """Judges heartbeats as :class:`~flaskbus_gateway.directory.Directory` judges those of agents."""

    def __init__(self, lease: float) -> None:
        self.lease = lease
        self._pulses: dict[str, tuple[int, float]] = {}

    def observe(self, flat: list[bytes], now: float) -> list[str]:
        """Take in HGETALL of the gateways at ``now`` (monotonic seconds); returns those that are dead."""
        listed: dict[str, tuple[int, float]] = {}
        dead = []
        for name, record in zip(flat[::2], flat[1::2], strict=True):
            process = name.decode("utf-8", "replace")
            beat, lease = _read(record)
            known = self._pulses.get(process)
            listed[process] = known if known is not None and known[0] == beat else (beat, now)
            if now - listed[process][1] > (lease or self.lease):
                dead.append(process)
        self._pulses = listed
        return dead

    def forgive(self, now: float) -> None:
        """Nobody was observed while the broker was away: every lease begins anew."""
        self._pulses = {process: (beat, now) for process, (beat, _) in self._pulses.items()}

    def lives(self, process: str) -> bool:
        """Whether a gateway was listed at the last look."""
        return process in self._pulses


def stem(process: str) -> str:
    """What the ids of a gateway process's exchanges begin with: the last part of its name.

    Empty for a sender of another kind, whose name is shorter and says nothing of its ids.
    """
    token = process.rpartition("-")[2]
    return token if re.fullmatch("[0-9a-f]{12}", token) else ""


def _read(record: bytes) -> tuple[int, float]:
    """The heartbeat counter, and the lease that the gateway itself keeps (0 where it does not say)."""
    try:
        members = json.loads(record)
        return int(members["beat"]), float(members.get("lease", 0))
    except (ValueError, TypeError, KeyError, AttributeError):
        return -1, 0.0
