"""The other gateways of the bus, and which of them are alive."""

from __future__ import annotations

import json


class Peers:
    """Judges heartbeats as :class:`~flaskbus_gateway.directory.Directory` judges those of agents."""

    def __init__(self, lease: float) -> None:
        self.lease = lease
        self._pulses: dict[str, tuple[int, float]] = {}

    def observe(self, flat: list[bytes], now: float) -> list[str]:
        """Take in HGETALL of the gateways at ``now`` (monotonic seconds); returns those that are dead."""
        listed: dict[str, tuple[int, float]] = {}
        for name, record in zip(flat[::2], flat[1::2], strict=True):
            process, beat = name.decode("utf-8", "replace"), _beat(record)
            known = self._pulses.get(process)
            listed[process] = known if known is not None and known[0] == beat else (beat, now)
        self._pulses = listed
        return [process for process, (_, seen) in listed.items() if now - seen > self.lease]

    def forgive(self, now: float) -> None:
        """Nobody was observed while the broker was away: every lease begins anew."""
        self._pulses = {process: (beat, now) for process, (beat, _) in self._pulses.items()}

    def lives(self, process: str) -> bool:
        """Whether a gateway was listed at the last look."""
        return process in self._pulses


def _beat(record: bytes) -> int:
    try:
        return int(json.loads(record)["beat"])
    except (ValueError, TypeError, KeyError):
        return -1
