"""Calls the app's WSGI callable in a loop: ``python -m benchmarks.inprocess PATH SECONDS``.

Prints the calls in a second of CPU, after a first one that is not counted. With 0 seconds it says ``ready`` instead,
and waits for the end of its input: the bare app, to be looked at.
"""

from __future__ import annotations

import sys
import time
from io import BytesIO
from typing import TYPE_CHECKING, Any

from werkzeug.test import create_environ

from benchmarks.apps import app

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


def call(environ: WSGIEnvironment) -> int:
    """One request; the size of its body."""

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        assert status == "200 OK"
        return size

    size = 0
    environ = environ.copy()
    environ["wsgi.input"] = BytesIO()
    body = app(environ, start_response)
    size = sum(map(len, body))
    if hasattr(body, "close"):
        body.close()
    return size


def rate(path: str, seconds: float) -> float:
    """Calls in a second of CPU, which what else runs on the machine takes no part of."""
    environ = create_environ(path)
    call(environ)
    count, start = 0, time.process_time()
    while (spent := time.process_time() - start) < seconds:
        for _ in range(50):
            call(environ)
        count += 50
    return count / spent


if __name__ == "__main__":
    wanted = float(sys.argv[2])
    if wanted:
        print(rate(sys.argv[1], wanted))
    else:
        call(create_environ(sys.argv[1]))
        print("ready", flush=True)
        sys.stdin.read()
