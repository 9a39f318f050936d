"""The part of a client's connection that has prompt exchanges; see :mod:`flaskbus_gateway.prompt`."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from gunicorn.asgi import protocol

from flaskbus_gateway.http import BEGUN, PROMPTS, address
from flaskbus_gateway.plain import write

if TYPE_CHECKING:
    from flaskbus.messages import Reply
    from flaskbus_gateway.prompt import Begun, Peer, Prompt
    from flaskbus_gateway.worker import Worker

_gunicorn: Any = protocol  # the stubs leave out what is used here


class PromptConnection(_gunicorn.ASGIProtocol):  # type: ignore[misc]
    """Between two requests of HTTP/1 it looks whether what came is a plain one.

    While that runs, gunicorn's side of the connection waits for a request. It gets it where it has to be served
    otherwise, byte for byte, and with it the exchange.
    """

    worker: Worker
    _header_size: int

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._peer: Peer | None = None
        self._prompt: Prompt | None = None  # what runs
        self._begun: Begun | None = None  # what gunicorn is to serve next
        self._taken: Begun | None = None  # what it is about to serve
        self._bytes = b""  # of what runs

    def data_received(self, data: bytes) -> None:
        if self._prompt is not None:
            self._prompt.serve_otherwise()  # it may be the next request, or the start of one
        elif self._is_between() and self._begin(data):
            return
        super().data_received(data)

    def _is_between(self) -> bool:
        return bool(
            self._callback_parser is not None
            and not self._closed
            and self._keepalive
            # It waits for a request, or will when its task begins.
            and (self._awaiting_request or not self.req_count)
            and self._current_request is None
            and not self._header_size
            and not self._finishing_calls
            and not self.worker.stopping
            and not self._flow_control.write_paused
        )

    def _begin(self, data: bytes) -> bool:
        peer = self._peer
        if peer is None:
            prompts = self.worker.state.get(PROMPTS)
            if prompts is None or self.log.access_log_enabled:
                return False
            ends = [address(self.transport.get_extra_info(name)) for name in ("peername", "sockname")]
            peer = self._peer = prompts.peer(self, *ends, "https" if self._is_ssl else "http")
        prompt = peer.begin(data)
        if prompt is None:
            return False
        self.worker.heading.stop(self)
        self.worker.idle.stop(self)
        self._prompt, self._bytes = prompt, data
        return True

    def answer(self, reply: Reply) -> bool:
        close = self.worker.stopping
        pieces = write(reply, _gunicorn._get_cached_date_header(), close=close)
        if pieces is None:
            return False
        self._prompt, self._bytes = None, b""
        self.worker.nr += 1
        self._safe_write(b"".join(pieces))
        if close:
            self._leave()
        else:
            self.worker.idle.start(self, self.worker.loop.time())
        return True

    def serve(self, begun: Begun) -> None:
        self._prompt, self._begun = None, begun
        data, self._bytes = self._bytes, b""
        self._feed_callback_parser(data)

    def _handle_http_request(self, *args: Any) -> Awaitable[bool]:
        # Now, and not when its task begins: if the client leaves in between, it is the app that hears of it.
        self._taken, self._begun = self._begun, None
        serving: Awaitable[bool] = super()._handle_http_request(*args)
        return serving

    def _build_http_scope(self, *args: Any) -> dict[str, Any]:
        scope: dict[str, Any] = super()._build_http_scope(*args)
        begun, self._taken = self._taken, None
        if begun is not None:
            scope["extensions"] = {**scope.get("extensions", {}), BEGUN: begun}
        return scope

    def connection_lost(self, exc: Exception | None) -> None:
        prompt, self._prompt = self._prompt, None
        begun, self._begun = self._begun, None
        if prompt is not None:
            prompt.abandon()
        elif begun is not None and self._peer is not None:
            self._peer.prompts.take_back(begun)
        super().connection_lost(exc)

    def _leave(self) -> None:
        """Close a connection that has no exchange."""
        self._close_transport()
        if self._request_ready is not None:
            self._request_ready.set()
