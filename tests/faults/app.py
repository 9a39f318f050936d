"""The app of the fault tests: writes each run down, fsynced, before it does anything."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING
from wsgiref.validate import validator

from tests.faults.contents import content, reply_size, work

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

PIECES = 4
_ledger = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def record(token: str, attempt: int, *, sync: bool = True) -> None:
    """One write, so that lines of several processes do not mix."""
    os.write(_ledger, f"{token} {attempt} {os.getpid()}\n".encode())
    if sync:
        os.fsync(_ledger)


def soak(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """``/SHAPE/SIZE/TOKEN``; a body must be the content of its token, and of this size."""
    _, shape, size, token = environ["PATH_INFO"].split("/")
    record(token, environ["flaskbus.attempt"], sync=shape != "quick")
    # To its end (wsgi.input_terminated): what was chunked and is still on its way has no length.
    got = environ["wsgi.input"].read(int(size) + 1)
    headers = [("Content-Type", "application/octet-stream")]
    if got != content(token, "request", int(size)):
        start_response("422 Unprocessable Content", headers)
        return [b"the body was altered"]
    if shape != "quick":
        time.sleep(work(token))
    body = content(token, "reply", reply_size(shape))
    if shape in ("stream", "trickle"):
        start_response("200 OK", headers)
        return produce(body)
    start_response("200 OK", [*headers, ("Content-Length", str(len(body)))])
    return [body]


def produce(body: bytes) -> Iterator[bytes]:
    step = len(body) // PIECES
    for start in range(0, len(body), step):
        yield body[start : start + step]
        time.sleep(0.001)


app = validator(soak)
