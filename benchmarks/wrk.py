"""The load generator wrk: its command line, and what it prints.

wrk (https://github.com/wg/wrk) keeps a number of connections busy: each sends its next request when it has the last
answer.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LUA = Path(__file__).parent / "lua"

_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 60e3, "h": 3600e3}
_SIZES = {"B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run of wrk said. Latencies in milliseconds, ``read`` in bytes with headers (three digits of it)."""

    rate: float
    requests: int
    read: float
    p50: float
    p99: float
    errors: int
    """Statuses other than 2xx and 3xx, and connections that broke or timed out."""


def command(
    url: str, *, connections: int, seconds: float, script: str = "", program: str = "wrk"
) -> list[str]:
    """The argument vector. One thread: it is enough for any Python app, and leaves the cores to the systems.

    wrk knows whole seconds only, at least one.
    """
    words = [program, "--latency", "--threads", "1", "--connections", str(connections)]
    words += ["--duration", f"{max(1, round(seconds))}s", "--timeout", "10s"]
    if script:
        words += ["--script", str(LUA / script)]
    return [*words, url]


def run(words: Sequence[str]) -> Outcome:
    """Raises CalledProcessError where wrk fails, ValueError where it says something unknown."""
    said = subprocess.run(words, capture_output=True, text=True, check=True)
    return parse(said.stdout)


def parse(text: str) -> Outcome:
    """What ``wrk --latency`` prints. Raises ValueError where that is something else."""
    total = _find(r"(\d+) requests in [\d.]+\w+, ([\d.]+)(B|KB|MB|GB) read", text)
    rate = _find(r"Requests/sec:\s+([\d.]+|-?nan|inf)", text)
    return Outcome(
        rate=float(rate[1]),
        requests=int(total[1]),
        read=float(total[2]) * _SIZES[total[3]],
        p50=_latency(50, text),
        p99=_latency(99, text),
        errors=_errors(text),
    )


def _find(pattern: str, text: str) -> re.Match[str]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"wrk did not say {pattern!r} but: {text[-400:]}")
    return match


def _latency(percent: int, text: str) -> float:
    match = _find(rf"\n\s+{percent}%\s+(-?[\d.]+)(us|ms|s|m|h)\s*\n", text)
    return float(match[1]) * _UNITS[match[2]]


def _errors(text: str) -> int:
    broken = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    return sum(int(number) for match in (broken, refused) if match for number in match.groups())
