"""A pytest plugin that runs other people's test suites through the bus: ``pytest -p through_bus``.

The test clients of werkzeug (so Flask's) and Bottle call an app with an environ. Here each such call becomes an
HTTP request to a gateway, and an agent calls the app with what arrived. What only a test client does inside
one process is handed past the bus: keys that instrument the app, and what it raises.
"""

from __future__ import annotations

import http.client
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import bottle
import pytest
import werkzeug.test

from flaskbus import embedded
from flaskbus.testing import running_bus

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

CALL = "X-Through-Bus"
VISIBLE = "".join(map(chr, range(33, 127)))


class Call:
    """One call of an app by a test client, as far as it stays in this process."""

    def __init__(self, app: WSGIApplication, environ: WSGIEnvironment) -> None:
        self.app = app
        self.script_name: str = environ.get("SCRIPT_NAME", "")
        self.beside = {
            key: value for key, value in environ.items() if not key.isupper() and not key.startswith("wsgi.")
        }
        self.raised: BaseException | None = None


class ThroughBus:
    """The agent's app, which calls the app that is meant; and the other end, which test clients call."""

    def __init__(self) -> None:
        self.address = ""
        self.calls: dict[str, Call] = {}
        self.requests = 0

    def serve(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        call = self.calls[environ.pop("HTTP_" + CALL.upper().replace("-", "_"))]
        environ.update(call.beside)
        if call.script_name:
            environ["SCRIPT_NAME"] = call.script_name
            environ["PATH_INFO"] = environ["PATH_INFO"].removeprefix(call.script_name)
        return self._watched(call, environ, start_response)

    def _watched(
        self, call: Call, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterator[bytes]:
        body: Iterable[bytes] = ()
        try:
            body = call.app(environ, start_response)
            yield from body
        except GeneratorExit:
            raise  # the agent needs no more
        except BaseException as error:
            call.raised = error
            raise
        finally:
            getattr(body, "close", lambda: None)()

    def request(
        self, app: WSGIApplication, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Call an app as a server does, but by HTTP."""
        self.requests += 1
        name, call = uuid.uuid4().hex, Call(app, environ)
        self.calls[name] = call
        connection = http.client.HTTPConnection(self.address, timeout=30)
        try:
            answer = self._send(connection, name, environ)
            data = answer.read()
        finally:
            connection.close()
            del self.calls[name]
        if call.raised is not None:
            raise call.raised
        start_response(f"{answer.status} {answer.reason}", answer.getheaders())
        return [data]

    def _send(
        self, connection: http.client.HTTPConnection, name: str, environ: WSGIEnvironment
    ) -> http.client.HTTPResponse:
        host = environ.get("HTTP_HOST") or f"{environ['SERVER_NAME']}:{environ['SERVER_PORT']}"
        path = (environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")).encode("latin-1")
        target = quote(path, safe="/!$&'()*+,:;=@~") or "/"
        if query := environ.get("QUERY_STRING"):
            target += "?" + quote(query, safe=VISIBLE, encoding="latin-1")
        if environ["SERVER_PROTOCOL"] == "HTTP/1.0":
            connection._http_vsn, connection._http_vsn_str = 10, "HTTP/1.0"  # type: ignore[attr-defined]
        connection.putrequest(environ["REQUEST_METHOD"], target, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", host)
        connection.putheader(CALL, name)
        if environ.get("wsgi.url_scheme") == "https":
            connection.putheader("X-Forwarded-Proto", "https")
        if environ.get("REMOTE_ADDR"):
            connection.putheader("X-Forwarded-For", environ["REMOTE_ADDR"])
        for key, value in environ.items():
            if key.startswith("HTTP_") and key != "HTTP_HOST" and value:
                connection.putheader(key[5:].replace("_", "-").title(), value.encode("latin-1"))
        if environ.get("CONTENT_TYPE"):
            connection.putheader("Content-Type", environ["CONTENT_TYPE"])
        if "HTTP_TRANSFER_ENCODING" in environ:
            connection.endheaders(iter([_read(environ["wsgi.input"])]), encode_chunked=True)
        else:
            body = _read(environ["wsgi.input"], int(environ.get("CONTENT_LENGTH") or 0))
            if body or environ.get("CONTENT_LENGTH"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body or None)
        return connection.getresponse()


BUS = pytest.StashKey[ThroughBus]()


def _read(stream: IO[bytes], length: int = -1) -> bytes:
    """The body, which a client that follows a redirect wants to send again."""
    data = stream.read(length)
    if hasattr(stream, "seek"):  # wsgiref's validator takes it away
        stream.seek(0)
    return data


def pytest_configure(config: pytest.Config) -> None:
    bus = ThroughBus()
    stack = ExitStack()
    broker = stack.enter_context(embedded.start())
    started = stack.enter_context(running_bus(broker.url))
    stack.enter_context(started.mount(bus.serve, "/"))
    config.add_cleanup(stack.close)
    bus.address = urlsplit(started.url).netloc

    run: Callable[..., Any] = werkzeug.test.run_wsgi_app

    def run_wsgi_app(app: WSGIApplication, environ: WSGIEnvironment, buffered: bool = False) -> Any:
        return run(lambda *call: bus.request(app, *call), environ, buffered)

    def call_bottle(self: Any, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return bus.request(self.wsgi, environ, start_response)

    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setattr(werkzeug.test, "run_wsgi_app", run_wsgi_app)
    patch.setattr(bottle.Bottle, "__call__", call_bottle)
    config.stash[BUS] = bus


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"requests through the bus: {terminalreporter.config.stash[BUS].requests}")
