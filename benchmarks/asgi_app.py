"""An ASGI app that holds requests as :func:`benchmarks.apps.held` does: what gunicorn's worker alone needs for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.apps import GATE

_opened: asyncio.Event | None = None


async def app(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    if scope["type"] != "http":
        return
    if scope["path"] == "/held":
        await _gate()
    body = b'{"held":true}\n' if scope["path"] == "/held" else b'{"message":"hello, world"}\n'
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _gate() -> None:
    """Wait for the file; one task looks, however many wait."""
    global _opened
    if _opened is None:
        _opened = asyncio.Event()
        gate = Path(os.environ[GATE])
        while not gate.exists():
            await asyncio.sleep(0.05)
        _opened.set()
    await _opened.wait()
