"""A Flask app that streams in every way, and notes in the LEDGER what became of each response, a line of JSON each."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from wsgiref.validate import validator

from flask import Flask, Response, request, send_file, stream_with_context

from tests.integration.apps.contents import CONTENT, LINE

STEP = 64 * 1024
"""Bytes after which a flood notes how much it has made."""

app = Flask(__name__)
gates: defaultdict[str, threading.Semaphore] = defaultdict(lambda: threading.Semaphore(0))
ledger = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
stored = Path(os.environ["LEDGER"]).with_name("content.bin")
stored.write_bytes(CONTENT)


def note(token: str, **facts: object) -> None:
    os.write(ledger, json.dumps({"token": token, "at": time.monotonic(), **facts}).encode() + b"\n")


def streamed(
    parts: Iterator[bytes], media_type: str = "application/octet-stream", **headers: str
) -> Response:
    return Response(stream_with_context(parts), content_type=media_type, headers=headers)


@app.get("/plain")
def plain() -> str:
    return str(os.getpid())


@app.post("/go/<token>")
def go(token: str) -> str:
    """Let a response of this token take its next step."""
    gates[token].release()
    return "gone on"


@app.get("/content/<int:piece>")
def content(piece: int) -> Response:
    parts = (CONTENT[start : start + piece] for start in range(0, len(CONTENT), piece))
    return streamed(parts, **({"Content-Length": str(len(CONTENT))} if "length" in request.args else {}))


@app.get("/lines/<int:count>")
def lines(count: int) -> Response:
    return streamed((LINE % number for number in range(count)), request.args.get("type", "text/plain"))


@app.get("/burst/<token>/<int:count>/<int:size>")
def burst(token: str, count: int, size: int) -> Response:
    """So many parts as fast as possible; then nothing until it may go on."""

    def parts() -> Iterator[bytes]:
        for number in range(count):
            yield (b"%d\n" % number).rjust(size)
        gates[token].acquire(timeout=60)
        yield b"end"

    return streamed(parts(), request.args.get("type", "text/plain"))


@app.get("/events/<token>/<int:count>")
def events(token: str, count: int) -> Response:
    """Each event is made when its client has asked for it."""

    def parts() -> Iterator[bytes]:
        try:
            for _ in range(count):
                gates[token].acquire(timeout=60)
                note(token, made=True)
                yield b"data: %d\n\n" % time.monotonic_ns()
        finally:
            note(token, closed=True)

    return streamed(parts(), request.args.get("type", "text/event-stream"))


@app.get("/ticks/<token>/<float:gap>")
def ticks(token: str, gap: float) -> Response:
    """An endless stream, a part each ``gap`` seconds; of every yield and of the end it notes when that was."""

    def parts() -> Iterator[bytes]:
        try:
            while True:
                note(token, yields=True)
                yield b"data: tick\n\n"
                if gap:
                    time.sleep(gap)
        finally:
            note(token, closed=True)

    return streamed(parts(), request.args.get("type", "text/event-stream"))


@app.get("/flood/<token>/<int:piece>")
def flood(token: str, piece: int) -> Response:
    """As much as the client takes; how much was made is noted as it ends."""
    made = 0

    def parts() -> Iterator[bytes]:
        nonlocal made
        part = b"x" * piece
        try:
            while True:
                made += piece
                if made % STEP < piece:
                    note(token, made=made)
                yield part
        finally:
            note(token, closed=True, made=made)

    return streamed(parts())


@app.get("/file")
def file() -> Response:
    return send_file(stored, conditional=True, etag=True, mimetype="application/octet-stream")


class Pipe:
    """A file without ``fileno()``, as PEP 3333 allows: it has ``read()`` and ``close()``."""

    def __init__(self, token: str) -> None:
        self._content = io.BytesIO(CONTENT)
        self._token = token

    def read(self, size: int = -1) -> bytes:
        return self._content.read(size)

    def close(self) -> None:
        note(self._token, closed=True)


@app.get("/wrapped/<token>")
def wrapped(token: str) -> Response:
    return Response(request.environ["wsgi.file_wrapper"](Pipe(token), 8192), direct_passthrough=True)


@app.get("/broken/<how>/<int:before>")
def broken(how: str, before: int) -> Response:
    """Ends wrongly after ``before`` bytes of the content, or with a wrong length."""
    stated = {"short": before + 1, "long": max(before - 1, 0)}.get(how)
    if "length" in request.args and stated is None:
        stated = len(CONTENT)

    def parts() -> Iterator[bytes]:
        for start in range(0, before, 4096):
            yield CONTENT[start : min(start + 4096, before)]
        if how == "raise":
            raise RuntimeError("as it should")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)

    return streamed(parts(), **({} if stated is None else {"Content-Length": str(stated)}))


@app.get("/status/<int:status>")
def status(status: int) -> Response:
    """A response that has no body, whatever its app yields."""
    response = Response(iter(()), status=status, headers={"X-Here": "yes"})
    del response.headers["Content-Type"]  # PEP 3333's validator wants none where there is no body
    return response


checked = validator(app)
