"""One request through one WSGI app (PEP 3333): environ -> app -> sink.

Pure: what the app answers goes to a :class:`Sink`, and where that leads is not known here. A response that
is complete with its first bytes is given whole; any other is given as the app yields it. A chunk is
never kept back for a later one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from flaskbus.messages import Headers
from flaskbus.wire import MAX_CHUNK
from flaskbus_agent.environ import FileWrapper

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

__all__ = ["APP_ERROR", "Cancelled", "FileWrapper", "Sink", "respond"]

log = logging.getLogger("flaskbus.agent")

APP_ERROR = "app-error"
"""The code of a response that the app broke off after its head was sent."""

ERROR_PAGE = b"""<!doctype html>
<html lang=en>
<title>500 Internal Server Error</title>
<h1>Internal Server Error</h1>
<p>The server encountered an internal error and was unable to complete your request. \
Either the server is overloaded or there is an error in the application.</p>
"""


class Cancelled(BaseException):
    """Nobody wants the response any more: the client is gone, or the request is another agent's now.

    Not an :class:`Exception`, because it may pass through the app (by ``write()``), whose handlers of errors
    have nothing to mend here.
    """


class ClientDisconnected(OSError):
    """The body ends too early: its client went away, was too slow or sent too much, or nobody wants the answer."""


class Sink(Protocol):
    """Where a response goes: one ``reply``; or ``head``, any number of ``chunk``, then ``end`` or ``fail``.

    Every method may raise :class:`Cancelled`, and is then the last that is called. Whatever else one
    raises ends the run too, and comes out of :func:`respond`.
    """

    def reply(self, status: int, headers: Headers, body: bytes, /) -> None:
        """A whole response; ``body`` is at most ``reply_limit`` bytes."""

    def head(self, status: int, headers: Headers, /) -> None: ...

    def chunk(self, data: bytes, /) -> None:
        """1 to :data:`~flaskbus.wire.MAX_CHUNK` bytes of the body."""

    def end(self) -> None: ...

    def fail(self, code: str, detail: str, /) -> None:
        """The response must not look complete."""


def respond(
    app: WSGIApplication, environ: WSGIEnvironment, sink: Sink, *, method: str, reply_limit: int = MAX_CHUNK
) -> None:
    """Run the app, and give its response to the sink.

    ``reply_limit``: largest body in bytes that is given whole. What the app raises is logged and answered
    here, with a 500 or :meth:`Sink.fail`. That includes ``SystemExit`` and ``KeyboardInterrupt``: the signals
    of a process reach its main thread, so in a thread that runs requests only the app itself can have
    raised them, and one request must not end the others. ``close()`` of the iterable is called once, last.
    """
    response = _Response(sink, environ, method, reply_limit)
    body: Iterable[bytes] | None = None
    try:
        try:
            body = app(environ, response.start_response)
            response.sole = isinstance(body, (list, tuple)) and len(body) == 1
            for data in body:
                if not response.feed(data):
                    break
            response.finish()
        except BaseException as error:  # noqa: BLE001 - see above
            response.abort(error)
    except Cancelled:
        pass
    finally:
        response.lost = response.lost or Cancelled()  # write() is for nobody any more
        close = getattr(body, "close", None)
        if close is not None:
            try:
                close()
            except BaseException:
                log.exception("%s: close() of the response raised", response)


_STATUS = re.compile(r"([2-9][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_NOT_IN_VALUE = re.compile(r"[^\t\x20-\x7e\x80-\xff]")
_DIGITS = re.compile(r"[0-9]{1,18}")

_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)


class _Response:
    """What is known of one response, and how much of it was sent."""

    __slots__ = (
        "bodiless",
        "complete",
        "head_sent",
        "headers",
        "held",
        "length",
        "lost",
        "method",
        "received",
        "reply_limit",
        "request_id",
        "sink",
        "sole",
        "status",
        "target",
    )

    def __init__(self, sink: Sink, environ: WSGIEnvironment, method: str, reply_limit: int):
        self.sink = sink
        self.method = method
        self.reply_limit = reply_limit
        self.target = environ.get("REQUEST_URI")
        self.request_id = environ.get("flaskbus.request_id")
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.length: int | None = None
        self.bodiless = False
        self.sole = False  # the app returned exactly one chunk
        self.received = 0
        self.held = b""  # the whole body, not sent yet
        self.head_sent = False
        self.complete = False  # all of it was sent
        self.lost: BaseException | None = None  # what the sink raised

    def __str__(self) -> str:
        return f"{self.method} {self.target} (request {self.request_id})"

    def start_response(
        self,
        status: str,
        headers: list[tuple[str, str]],
        exc_info: OptExcInfo | None = None,
        /,
    ) -> Callable[[bytes], object]:
        if exc_info:
            try:
                if (self.head_sent or self.complete) and exc_info[1] is not None:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # breaks a cycle through this frame
            self.received, self.held = 0, b""
        elif self.status:
            raise AssertionError("start_response was called a second time, without exc_info")
        if not isinstance(status, str):
            raise TypeError(f"the status is {type(status).__name__}, not str")
        match = _STATUS.fullmatch(status)
        if match is None:
            raise ValueError(f"{status!r} is not a final HTTP status")
        self.headers, self.length = _encoded(headers)
        self.status = int(match[1])
        self.bodiless = self.method == "HEAD" or self.status in (204, 304)
        if self.status == 204:  # RFC 9110, section 8.6
            self.headers = [pair for pair in self.headers if pair[0].lower() != b"content-length"]
        return self.feed

    def feed(self, data: bytes) -> bool:
        """Take what the app yielded or wrote; False when nothing of what follows belongs to the response."""
        if not isinstance(data, bytes):
            raise TypeError(f"the app gave {type(data).__name__} as a part of the body, not bytes")
        if not data:
            return True
        if not self.status:
            raise AssertionError("the app gave a part of the body before it called start_response")
        if self.bodiless:
            if self.method != "HEAD":
                log.warning("%s: the app sent a body with status %d; dropped", self, self.status)
            return False
        before = self.received
        self.received += len(data)
        if self.length is not None and self.received > self.length:
            data = data[: max(self.length - before, 0)]
        if self.head_sent:
            self._chunks(data)
        elif self.complete or self.sole:
            self.held = self.held or data
        elif self.length is not None and self.received >= self.length:
            # The app may go on for as long as it likes.
            self.held = data
            self._whole()
        else:
            self._head()
            self._chunks(data)
        return self.length is None or self.received <= self.length

    def finish(self) -> None:
        """The app has given everything."""
        if not self.status:
            raise AssertionError("the app returned without calling start_response")
        short = False
        if self.length is not None and not self.bodiless:
            short = self.received < self.length
            if self.received > self.length:
                log.warning("%s: the app sent more than its Content-Length %d", self, self.length)
        elif not self.head_sent and not self.bodiless:
            self.headers.append((b"Content-Length", b"%d" % len(self.held)))
        if self.complete:
            return
        if not self.head_sent:
            if not short:
                self._whole()
                return
            self._head()
            self._chunks(self.held)
        if short:
            detail = f"the app sent {self.received} bytes of a Content-Length of {self.length}"
            log.error("%s: %s", self, detail)
            self._send(self.sink.fail, APP_ERROR, detail)
        else:
            self._send(self.sink.end)

    def abort(self, error: BaseException) -> None:
        """The run ended with an error: the sink's own, which is raised again, or the app's."""
        if self.lost is not None:
            raise self.lost
        if self.complete:
            log.error("%s: the app failed after its response was complete", self, exc_info=error)
            return
        if self.head_sent:
            log.error("%s: the app failed after the head was sent", self, exc_info=error)
            self._send(self.sink.fail, APP_ERROR, f"the app raised {type(error).__name__}")
            return
        if isinstance(error, ClientDisconnected):
            log.info("%s: the body broke off: %s", self, error)
        else:
            log.error("%s: the app failed", self, exc_info=error)
        headers = (
            (b"Content-Type", b"text/html; charset=utf-8"),
            (b"Content-Length", b"%d" % len(ERROR_PAGE)),
        )
        self._send(self.sink.reply, 500, headers, b"" if self.method == "HEAD" else ERROR_PAGE)

    def _whole(self) -> None:
        """Send a response of which all is here."""
        self.complete = True
        if len(self.held) <= self.reply_limit:
            self._send(self.sink.reply, self.status, tuple(self.headers), self.held)
            return
        self._head()
        self._chunks(self.held)
        self._send(self.sink.end)

    def _head(self) -> None:
        self._send(self.sink.head, self.status, tuple(self.headers))
        self.head_sent = True

    def _chunks(self, data: bytes) -> None:
        for start in range(0, len(data), MAX_CHUNK):
            self._send(self.sink.chunk, data[start : start + MAX_CHUNK])

    def _send(self, method: Callable[..., None], *args: object) -> None:
        # An app that calls write() may swallow what the sink raised; it is raised until the run ends.
        if self.lost is not None:
            raise self.lost
        try:
            method(*args)
        except BaseException as error:
            self.lost = error
            raise


def _encoded(headers: Iterable[tuple[str, str]]) -> tuple[list[tuple[bytes, bytes]], int | None]:
    """The app's headers as they are sent, without hop-by-hop ones, and their Content-Length.

    Raises TypeError or ValueError for what HTTP does not allow (RFC 9110, section 5). A message has no
    value, since that may be a secret.
    """
    encoded: list[tuple[bytes, bytes]] = []
    length: int | None = None
    named: set[bytes] = set()
    for name, value in headers:
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"name and value of the header {name!r} must be str")
        if _NOT_IN_VALUE.search(value):
            raise ValueError(f"the value of the header {name!r} has a character that HTTP does not allow")
        text, lower = _response_name(name)
        content = value.strip(" \t").encode("latin-1")
        if lower in _HOP_BY_HOP:
            if lower == b"connection":
                named.update(token.strip() for token in content.lower().split(b","))
            continue
        if lower == b"content-length":
            if length is not None or not _DIGITS.fullmatch(value):
                raise ValueError("Content-Length must be one number")
            length = int(value)
        encoded.append((text, content))
    if named:
        named.discard(b"content-length")
        encoded = [pair for pair in encoded if pair[0].lower() not in named]
    return encoded, length


@lru_cache(1024)
def _response_name(name: str) -> tuple[bytes, bytes]:
    """A header's name as it is sent, and in lower case."""
    if not _TOKEN.fullmatch(name):
        raise ValueError(f"{name!r} is not a header's name")
    text = name.encode("ascii")
    return text, text.lower()
