"""A WebSocket whose handshake may be answered by the app (ASGI's WebSocket Denial Response), which gunicorn cannot."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from gunicorn.asgi import websocket

_gunicorn: Any = websocket


class WebSocketConnection(_gunicorn.WebSocketProtocol):  # type: ignore[misc]
    """gunicorn's, with ``websocket.http.response.start`` and ``.body``."""

    async def _send(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "websocket.http.response.start":
            self._deny_with(message["status"], message["headers"])
        elif kind == "websocket.http.response.body":
            self._write_body(message.get("body", b""), message.get("more_body", False))
        else:
            await super()._send(message)

    def _deny_with(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._denied = True
        phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
        # The connection ends with the response, so that nothing has to be known of its length.
        lines = [f"HTTP/1.1 {status} {phrase}".encode()]
        lines += [name + b": " + value for name, value in headers]
        lines += [b"Connection: close", b"", b""]
        self.transport.write(b"\r\n".join(lines))

    def _write_body(self, data: bytes, more: bool) -> None:
        self.transport.write(data)
        if not more:
            self.closed = True
            self._close_event.set()
            self.transport.close()


def install() -> None:
    """Gunicorn looks its class up by this name, for each handshake."""
    _gunicorn.WebSocketProtocol = WebSocketConnection
