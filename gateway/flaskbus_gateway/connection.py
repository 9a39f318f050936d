"""What gunicorn's connections lack: deadlines for clients, and an end that is prompt and orderly.

A connection is always in one of these conditions. All but the second have a deadline, kept in the worker's
:class:`~flaskbus_gateway.deadlines.Deadlines` and looked at once a tick: a request costs some dict operations
and no timer.

=========  ==================================================  ====================  ==============================
condition  since                                               at most               then
=========  ==================================================  ====================  ==============================
heading    accept, or the first byte of a later request        header_timeout        408 if a byte came, and close
(running)  the end of a request's header                       the app's deadlines
idle       the end of a response, if the connection is kept    keepalive             close
stalled    the client takes nothing of what was written        idle_timeout          reset
lingering  the response was out before the request was in,     LINGER; LINGER_ON in  close
           or the last byte of what is left of that            all
silent     a WebSocket's client said nothing                   websocket_ping        ping; once more, and 1011
=========  ==================================================  ====================  ==============================
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
import sys
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from gunicorn.asgi import parser, protocol
from gunicorn.asgi.websocket import CLOSE_GOING_AWAY
from gunicorn.http2.errors import HTTP2StreamError

from flaskbus import wire
from flaskbus.errors import BusError, InvalidRequest
from flaskbus_gateway.handshake import is_handshake, mistake
from flaskbus_gateway.http import IS_LOST, SERVER
from flaskbus_gateway.plain import PHRASES
from flaskbus_gateway.prompting import PromptConnection
from flaskbus_gateway.websocket_protocol import UNANSWERED, WebSocketProtocol

if TYPE_CHECKING:
    from flaskbus_gateway.worker import Worker

_gunicorn: Any = protocol  # the stubs leave out what is overridden here

HEADER_LIMIT = 64 * 1024
"""Largest header in bytes, where it comes in several pieces."""

LINGER = 1.0
"""Seconds that a client has for what a well-behaved one does at once: hear of a close, or finish a header."""

LINGER_ON = 30.0
"""Seconds that a client has in all which goes on sending after its answer, with no pause of :data:`LINGER`."""

CLOSE = (b"connection", b"close")
"""With this header an app ends its client's connection."""

_gunicorn._CACHED_SERVER_HEADER = b"Server: %s\r\n" % SERVER
# Otherwise 207, 416 and others are "Unknown".
_gunicorn._REASON_PHRASES.update(PHRASES)


class _BodyReceiver(_gunicorn.BodyReceiver):  # type: ignore[misc]
    """Joins what came to pieces of a frame: what a client sends in many small chunks would be as many frames."""

    __slots__ = ()

    def _pop_chunk(self) -> dict[str, Any]:
        chunks = self._chunks
        if len(chunks) > 1:
            piece = [chunks.popleft()]
            size = len(piece[0])
            while chunks and size + len(chunks[0]) <= wire.MAX_CHUNK:
                size += len(chunks[0])
                piece.append(chunks.popleft())
            chunks.appendleft(b"".join(piece) if len(piece) > 1 else piece[0])
        message: dict[str, Any] = super()._pop_chunk()
        return message


_gunicorn.BodyReceiver = _BodyReceiver


class Connection(PromptConnection):
    """One client's connection: HTTP/1, HTTP/2 or, after an upgrade, a WebSocket."""

    _callback_parser: Any

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._header_size = 0  # bytes of an unfinished header
        self._answering = False  # the head of this exchange's response went out
        self._refused = False  # an error response went out, and nothing follows it
        self._last = False  # the response said that it is the last
        self._unsent = 0  # bytes that waited when the client stalled
        self._farewell: asyncio.Task[None] | None = None
        self._h2_conn: Any = None

    # A connection's life

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.worker.heading.start(self, self.worker.loop.time())
        super().connection_made(transport)
        self.worker.connections.add(self)
        self._task.add_done_callback(self._settle)

    def connection_lost(self, exc: Exception | None) -> None:
        for deadlines in self.worker.deadlines:
            deadlines.stop(self)
        super().connection_lost(exc)
        if self._flow_control is not None:
            # A send() that waits for the client would wait for ever.
            self._flow_control.resume_writing()
        if self._awaiting_request:
            # No need to keep what is over until its task is cancelled.
            self._request_ready.set()
        self._settle()

    def _settle(self, _: object = None) -> None:
        if self._conn_lost_handled and self._task.done():
            self.worker.forget(self)

    def _cancel_task_if_pending(self) -> None:
        """The app heard ``http.disconnect`` and ends by itself: cancelled, it would lose track of its request."""

    async def _cancel_http2_streams(self) -> None:
        if self._h2_tasks:
            await asyncio.wait(self._h2_tasks)

    # Deadlines

    def _feed_callback_parser(self, data: bytes) -> bool:
        """All of HTTP/1 comes this way, the tail of pipelined requests too."""
        try:
            more: bool = super()._feed_callback_parser(data)
        except Exception as error:  # noqa: BLE001 - such as int() of a Content-Length of 5,000 digits
            self.log.debug("refused a request: %r", error)
            self._refuse(400, "The request cannot be understood.")
            return False
        if self._current_request is None and more:
            self._header_size += len(data)
            if self._header_size > HEADER_LIMIT:
                self._refuse(431, f"The header is larger than {HEADER_LIMIT} bytes.")
                return False
            self.worker.idle.stop(self)
            self.worker.heading.start(self, self.worker.loop.time())
        return more

    def _on_headers_complete(self) -> bool:
        self._header_size = 0
        self._answering = False
        self.worker.heading.stop(self)
        skip_body: bool = super()._on_headers_complete()
        request = self._current_request
        if request.chunked:
            _check_codings(request.headers_bytes)
        if request.version < (1, 1):
            # gunicorn would keep it open without saying so, even where only the close ends the body.
            request.must_close = True
        return skip_body

    def _start_http2_stream(self, *args: Any) -> None:
        self.worker.heading.stop(self)
        super()._start_http2_stream(*args)

    def _arm_keepalive_timer(self) -> None:
        if not self._header_size:
            self.worker.idle.start(self, self.worker.loop.time())

    def _cancel_keepalive_timer(self) -> None:
        self.worker.idle.stop(self)

    def pause_writing(self) -> None:
        self._watch_client()
        super().pause_writing()

    def resume_writing(self) -> None:
        self.worker.stalled.stop(self)
        super().resume_writing()

    def _watch_client(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self.worker.stalled.start(self, self.worker.loop.time())

    def header_overdue(self) -> None:
        if self._header_size:
            self._refuse(408, "The request's header did not arrive in time.")
        self._leave()

    def idle_overdue(self) -> None:
        if self._current_request is None:
            self._leave()

    def stalled_overdue(self) -> None:
        if self.transport.get_write_buffer_size() < self._unsent:
            self._watch_client()  # slow, but not gone
        else:
            # Otherwise the kernel would go on offering what it still has for minutes.
            self._reset_on_close()
            self.transport.abort()

    def _build_http_scope(self, *args: Any) -> dict[str, Any]:
        scope: dict[str, Any] = super()._build_http_scope(*args)
        if self._body_receiver is not None and not self._body_receiver._complete:
            # While the rest of a body is left where it is, receive() is not called, and send() says nothing.
            scope["extensions"] = {**scope.get("extensions", {}), IS_LOST: lambda: self._conn_lost_handled}
        return scope

    def _build_websocket_scope(self, *args: Any) -> dict[str, Any]:
        scope: dict[str, Any] = super()._build_websocket_scope(*args)
        extensions = {"websocket.http.response": {}, IS_LOST: lambda: self._conn_lost_handled}
        return scope | {"extensions": extensions}

    def _handle_http_request(self, request: Any, *args: Any) -> Awaitable[bool]:
        serving: Awaitable[bool] = super()._handle_http_request(request, *args)
        return serving if request.version >= (1, 1) else self._reset_if_broken(serving, *args)

    async def _reset_if_broken(
        self, serving: Awaitable[bool], _: object, __: object, complete: asyncio.Future[bool]
    ) -> bool:
        """HTTP/1.0 has no chunks: what breaks off would end as what is whole does, by the close of the connection."""
        keepalive = await serving
        if self._answering and not complete.done() and not self._conn_lost_handled:
            self._reset_on_close()
            if self.transport.get_extra_info("ssl_object"):
                self.transport.abort()  # close() would say that this was all
            else:
                self.transport.close()  # when all was sent that there is
        return keepalive

    def _reset_on_close(self) -> None:
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def _serve_http_request(self, *args: Any) -> bool:
        receiver = self._body_receiver
        keepalive: bool = await super()._serve_http_request(*args)
        # ASGI: after the response receive() says http.disconnect. gunicorn forgets who waits there.
        receiver.signal_disconnect()
        return keepalive and not self._last

    # WebSockets

    def _is_websocket_upgrade(self, request: Any) -> bool:
        return is_handshake(request.method, request.version, request.headers_bytes)

    async def _handle_websocket(
        self, request: Any, sockname: tuple[str, int], peername: tuple[str, int]
    ) -> None:
        early = self._callback_parser.remaining()
        self._callback_parser = None
        if wrong := mistake(request.headers_bytes):
            self._send_error_response(*wrong)
            return
        now = self.worker.loop.time
        websocket = WebSocketProtocol(
            self.transport,
            self._build_websocket_scope(request, sockname, peername),
            self.app,
            self.log,
            limit=self.worker.settings.message_limit,
            drain=self._flow_control.drain,
            respond=self._answer_handshake,
            hang_up=self._hang_up,
        )
        self._websocket = websocket
        websocket.feed_data(early)
        began = now()
        if self.worker.silent.span:
            self.worker.silent.start(self, began)
        try:
            await websocket.run()
        finally:
            self._refused = not websocket.accepted  # the client may have said more
            if self.log.access_log_enabled:
                response = _gunicorn.ASGIResponseInfo(websocket.status, (), websocket.sent)
                environ = self._build_environ(request, sockname, peername)
                self.log.access(response, request, environ, _gunicorn._RequestTime(now() - began))

    def _answer_handshake(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._send_response_start(status, headers, self._current_request, close=True)
        self._safe_write(self._response_buffer)

    def _hang_up(self, lingers: bool) -> None:
        """A WebSocket has ended by its own rules, while the app may not have noticed."""
        if lingers:
            self._linger()
        else:
            self.transport.close()

    def silence_overdue(self) -> None:
        websocket = self._websocket
        if websocket.closed or self._farewell is not None:
            return
        self.worker.silent.start(self, self.worker.loop.time())
        if not websocket.ping():
            self._say_goodbye(*UNANSWERED)

    def _say_goodbye(self, code: int, reason: str) -> None:
        self._farewell = self.worker.loop.create_task(self._websocket._send_close(code, reason))
        self.worker.loop.call_later(LINGER, self.transport.abort)

    # Errors

    def _send_response_start(
        self, status: int, headers: list[tuple[bytes, bytes]], *args: Any, **kwargs: Any
    ) -> None:
        self._answering = True
        receiver = self._body_receiver
        if receiver is not None and not receiver._complete and CLOSE not in headers:
            # What is left of the body is not read: the next request on this connection would never be.
            headers = [*headers, CLOSE]
        # gunicorn says what the app says, and then goes on all the same (RFC 9112 section 9.6).
        self._last = CLOSE in headers
        super()._send_response_start(status, headers, *args, **kwargs)

    def _refuse(self, status: int, detail: str) -> None:
        self._send_error_response(status, detail)
        self._close_transport()

    def _send_error_response(
        self, status: int, message: str, extra_headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """An error that the app has no part in, as a problem document (RFC 9457)."""
        if self._answering and self._current_request is not None:
            return  # it would land in the middle of the app's response
        self._refused = True
        cause = sys.exception()
        about = _NAMED.get(type(cause)) if cause else None
        title, body = _problem(status, f"{about} {message!r}" if about else message)
        head = [
            f"HTTP/1.1 {status} {title}",
            f"Server: {SERVER.decode()}",
            "Content-Type: application/problem+json",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in extra_headers),
            "Connection: close",
        ]
        date: bytes = _gunicorn._get_cached_date_header()
        self._safe_write("\r\n".join(head).encode("ascii") + b"\r\n" + date + b"\r\n" + body)

    async def _serve_http2_request(self, request: Any, connection: Any, *args: Any) -> None:
        mistake = _mistake(request.method, request.uri)
        if mistake is None:
            # h2 took the bytes for UTF-8, and gunicorn would make Latin-1 of them.
            request.headers = [
                (name, value if value.isascii() else value.encode().decode("latin-1"))
                for name, value in request.headers
            ]
            await super()._serve_http2_request(request, connection, *args)
        else:
            stream = request.stream.stream_id
            _, body = _problem(400, mistake)
            headers = [("content-type", "application/problem+json"), ("content-length", str(len(body)))]
            await connection.send_response(stream, 400, headers, body)
            connection.cleanup_stream(stream)

    async def _handle_http2_request(self, request: Any, *args: Any) -> None:
        await super()._handle_http2_request(request, *args)
        if request.stream.response_complete and not request.stream.body_complete:
            await self._take_rest(request.stream)

    async def _take_rest(self, stream: Any) -> None:
        """Drop what a client still sends on a stream that has its answer, as :meth:`_linger` does with a connection.

        It need not be sent at all (RFC 9113 section 8.1: RST_STREAM with NO_ERROR, which follows), but many clients
        wait for a window to send it, whatever else they get.
        """
        now = self.worker.loop.time
        end = now() + LINGER_ON
        with contextlib.suppress(TimeoutError, HTTP2StreamError):
            while now() < end and not self.worker.stopping:
                if await asyncio.wait_for(stream.read_body_chunk(), LINGER) is None:
                    break

    # The end

    def _close_transport(self) -> None:
        receiver = self._body_receiver
        unread = self._refused or (receiver is not None and not receiver._complete)
        if unread and not self._closed:
            self._linger()
        else:
            super()._close_transport()
        if not self._conn_lost_handled and self.transport.get_write_buffer_size():
            self._watch_client()

    def _linger(self) -> None:
        """RFC 9112 section 9.6: a close with unread bytes is a reset, which can destroy the response on its way."""
        self._closed = True
        self._callback_parser = None
        self.transport.set_protocol(_Lingering(self, self.worker.loop.time() + LINGER_ON))
        self.worker.heading.stop(self)
        if self._body_receiver is not None:
            self._body_receiver.signal_disconnect()
        self._resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.worker.lingering.start(self, self.worker.loop.time())

    def _will_close(self, *args: Any) -> bool:
        return self.worker.stopping or super()._will_close(*args)

    def wind_down(self) -> None:
        """The worker stops: say goodbye to a WebSocket, and to HTTP/2 between two streams. Harmless when called again.

        With HTTP/1 the next response says it.
        """
        if self._h2_conn is not None and not self._h2_tasks and self._farewell is None:
            last = self._h2_conn.h2_conn.highest_inbound_stream_id
            self._farewell = self.worker.loop.create_task(self._h2_conn.close(last_stream_id=last))
        socket = self._websocket
        if socket is not None and self._farewell is None and socket.accepted and not socket.closed:
            self._say_goodbye(CLOSE_GOING_AWAY, "shutting down")

    def refuse_streams(self) -> None:
        """Begin no further stream of HTTP/2 (REFUSED_STREAM); its client may send it again elsewhere."""
        if self._h2_conn is not None:
            self._h2_conn.draining = True
            self._h2_conn.peer_last_stream_id = self._h2_conn.h2_conn.highest_inbound_stream_id


class _Lingering(asyncio.Protocol):
    """Drops what a client still sends which has its answer; many read it only when they have sent all."""

    def __init__(self, connection: Connection, end: float) -> None:
        self._connection = connection
        self._end = end

    def data_received(self, data: bytes) -> None:
        worker = self._connection.worker
        now = worker.loop.time()
        if now < self._end and not worker.stopping and self._connection in worker.lingering:
            worker.lingering.stop(self._connection)
            worker.lingering.start(self._connection, now)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()


def _problem(status: int, detail: str) -> tuple[str, bytes]:
    """The reason phrase, and a problem document."""
    title: str = _gunicorn._REASON_PHRASES[status]
    error = BusError(detail, executed="unknown") if status == 500 else InvalidRequest(detail)
    return title, json.dumps(error.problem() | {"status": status, "title": title}).encode()


def _mistake(method: str, target: str) -> str | None:
    """What is wrong with a request of HTTP/2; HTTP/1's parser knows it by itself."""
    if not target.isascii():
        return "The request target is not ASCII; all else is percent-encoded."
    if not _METHOD.fullmatch(method):
        return "The method is not one."
    # RFC 9113 section 8.3.1: the host has a pseudo-header of its own, and gunicorn would forget the target's.
    if not target.startswith("/") and target != "*" and method != "CONNECT":
        return "The request target is not a path."
    return None


_METHOD = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Z]+")


def _check_codings(headers: list[tuple[bytes, bytes]]) -> None:
    """RFC 9112 section 6.1: gunicorn takes ``gzip, chunked`` too, and hands the app what it did not decode."""
    for name, value in headers:
        if name == b"transfer-encoding" and value.lower() != b"chunked":
            raise parser.UnsupportedTransferCoding(value.decode("latin-1"))


_NAMED: dict[type[BaseException], str] = {
    parser.InvalidHeaderName: "invalid header name",
    parser.InvalidRequestMethod: "invalid method",
    parser.InvalidHTTPVersion: "unsupported version",
    parser.UnsupportedTransferCoding: "unsupported transfer coding",
}
"""Errors of gunicorn whose text is only what they are about."""
