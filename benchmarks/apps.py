"""The app that every system runs: ``app`` on ``/``, ``mounted`` on ``/m0`` to ``/m15``."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware

GATE = "BENCHMARK_GATE"
"""Environment variable: the file that, when it is there, lets held requests go."""
CHUNK = 64 * 1024
MOUNTS = 16

app = Flask(__name__)


def payload(size: int) -> bytes:
    """Bytes that a proxy must not reorder unseen: counted lines."""
    lines = b"".join(b"%015d\n" % number for number in range(size // 16 + 1))
    return lines[:size]


PATTERN = payload(4 << 20)
"""What the bodies of transfers repeat: a chunk that is lost, doubled or out of its place is seen."""
_PAYLOADS = {size: payload(size) for size in (10 * 1024, 100 * 1024)}


def chunks(size: int) -> Iterator[bytes]:
    """The body of a transfer, ``size`` bytes in parts of 64 KiB."""
    parts = [PATTERN[start : start + CHUNK] for start in range(0, len(PATTERN), CHUNK)]
    for number in range(size // CHUNK):
        yield parts[number % len(parts)]


@cache
def checksum(size: int) -> int:
    """The CRC-32 of such a body: some tenths of a second for a GiB, where SHA-256 would take as many seconds."""
    total = 0
    for chunk in chunks(size):
        total = zlib.crc32(chunk, total)
    return total


@app.get("/hello")
def hello() -> Response:
    return jsonify(message="hello, world")


@app.get("/bytes/<int:size>")
def some_bytes(size: int) -> Response:
    return Response(_PAYLOADS[size], mimetype="application/octet-stream")


@app.post("/length")
def length() -> Response:
    return jsonify(length=len(request.get_data()))


@app.get("/sleep/<int:milliseconds>")
def sleep(milliseconds: int) -> Response:
    time.sleep(milliseconds / 1000)
    return jsonify(slept=milliseconds)


@app.get("/held")
def held() -> Response:
    """Answer when the gate is open."""
    gate = Path(os.environ[GATE])
    while not gate.exists():
        time.sleep(0.05)
    return jsonify(held=True)


@app.get("/events/<int:count>/<int:gap>")
def events(count: int, gap: int) -> Response:
    """Server-sent events, ``gap`` milliseconds apart; each says when it was made (CLOCK_MONOTONIC, nanoseconds)."""

    def produce() -> Iterator[str]:
        for number in range(count):
            if number:
                time.sleep(gap / 1000)
            yield f"data: {time.monotonic_ns()}\n\n"

    # nginx buffers responses unless it is told not to.
    return Response(produce(), mimetype="text/event-stream", headers={"X-Accel-Buffering": "no"})


@app.get("/ticks/<int:count>/<int:period>")
def ticks(count: int, period: int) -> Response:
    """Server-sent events: one at once, then one for all streams at the same moment, every ``period`` milliseconds.

    These moments are multiples of the period on CLOCK_MONOTONIC, so that all processes have the same ones. Each
    event says when it was due (nanoseconds).
    """

    def produce() -> Iterator[str]:
        due, step = time.monotonic_ns(), period * 1_000_000
        yield f"data: {due}\n\n"
        for _ in range(count):
            due = (due // step + 1) * step
            time.sleep(max(0, due - time.monotonic_ns()) / 1e9)
            yield f"data: {due}\n\n"

    return Response(produce(), mimetype="text/event-stream", headers={"X-Accel-Buffering": "no"})


@app.get("/download/<int:size>")
def download(size: int) -> Response:
    """``size`` bytes, a multiple of 64 KiB, as the app yields them."""
    return Response(
        chunks(size),
        mimetype="application/octet-stream",
        headers={"Content-Length": str(size)},
    )


@app.post("/upload")
def upload() -> Response:
    length = total = 0
    while part := request.stream.read(CHUNK):
        length += len(part)
        total = zlib.crc32(part, total)
    return jsonify(length=length, checksum=total)


with suppress(ImportError):
    from flask_sock import Sock

    def echo(ws: Any) -> None:
        while True:
            ws.send(ws.receive())

    Sock(app).route("/echo")(echo)


mounted = DispatcherMiddleware(NotFound(), {f"/m{number}": app for number in range(MOUNTS)})
"""For servers that run one app; flaskbus mounts :data:`app` sixteen times by itself."""
