"""What keeps the gateway's view of the mounts going."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from flaskbus.keys import Keys
from flaskbus_gateway import directory
from flaskbus_gateway.directory import Directory


def test_a_look_that_fails_unforeseen_is_said_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(directory, "ROUND", 0.01)
    nothing: Any = None
    failures = [KeyError("a"), KeyError("b"), ZeroDivisionError()]

    async def look() -> None:
        if failures:
            raise failures.pop(0)

    async def main() -> None:
        known = Directory(
            nothing, Keys(), 1.0, listen=nothing, unlisten=nothing, on_routes=nothing, on_change=nothing,
            on_doubtful=nothing, on_orphan=nothing, on_stall=nothing, on_memory=nothing, heartbeat=nothing,
            seal=nothing,
        )  # fmt: skip
        monkeypatch.setattr(known, "look", look)
        known.start()
        await asyncio.wait_for(known.fresh(), 10)
        await known.close()

    with caplog.at_level(logging.ERROR, "flaskbus.gateway"):
        asyncio.run(main())
    assert not failures
    said = [record.exc_info and record.exc_info[0] for record in caplog.records]
    assert said == [KeyError, ZeroDivisionError]
