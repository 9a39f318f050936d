"""Runs Autobahn's cases against a WebSocket server: ``python -m tests.integration.autobahn URL [CASE …]``.

Prints the verdicts as JSON: case -> on its messages, on its close, the code that the server gave. In a process of its
own, because the cases are of Python 2's time and need an interpreter that is bent for them.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence

import kosoku

AT_ONCE = 4
"""Cases that run at a time."""

Verdict = tuple[str, str, int | None]


async def drive(url: str, cases: Sequence[str] | None) -> dict[str, Verdict]:
    """The verdicts; ``cases`` may have a ``*``, and ``None`` are all."""
    try:
        results = await kosoku.run_fuzzingclient(url, cases, concurrency=AT_ONCE)
    except kosoku.FailureError as failure:
        results = failure.results
    return {
        each.case_id: (each.behavior.value, each.behavior_close.value, each.remote_close_code)
        for each in results
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(drive(sys.argv[1], sys.argv[2:] or None))))
