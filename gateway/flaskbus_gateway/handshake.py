"""A WebSocket's opening handshake, before an app sees it (RFC 6455 section 4.2.1). Pure."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from typing import NamedTuple

Headers = Iterable[tuple[bytes, bytes]]


class Mistake(NamedTuple):
    """Why a handshake is refused: the status, the reason, and headers of the answer."""

    status: int
    detail: str
    headers: tuple[tuple[str, str], ...] = ()


def is_handshake(method: str, version: tuple[int, int], headers: Headers) -> bool:
    """Whether a request asks for a WebSocket; names of headers are in lower case.

    Whatever asks for another protocol, or asks in another way, is an ordinary request: a server may ignore
    ``Upgrade``, and that of HTTP/1.0 it has to (RFC 9110 section 7.8).
    """
    headers = tuple(headers)
    return (
        method == "GET"
        and version >= (1, 1)
        and b"websocket" in _tokens(headers, b"upgrade")
        and b"upgrade" in _tokens(headers, b"connection")
    )


def mistake(headers: Headers) -> Mistake | None:
    """What is wrong with a handshake."""
    headers = tuple(headers)
    if _values(headers, b"sec-websocket-version") != [b"13"]:
        return Mistake(
            426,
            "This server speaks version 13 of WebSocket.",
            (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13")),
        )
    keys = _values(headers, b"sec-websocket-key")
    if len(keys) != 1 or not _is_key(keys[0]):
        return Mistake(400, "Sec-WebSocket-Key is not one, of 16 bytes in base64.")
    if _values(headers, b"transfer-encoding") or set(_values(headers, b"content-length")) - {b"0"}:
        return Mistake(400, "A WebSocket's handshake has no body.")
    return None


def _values(headers: Headers, wanted: bytes) -> list[bytes]:
    return [value.strip() for name, value in headers if name == wanted]


def _tokens(headers: Headers, wanted: bytes) -> set[bytes]:
    return {token.strip().lower() for value in _values(headers, wanted) for token in value.split(b",")}


def _is_key(value: bytes) -> bool:
    try:
        return len(base64.b64decode(value, validate=True)) == 16
    except binascii.Error:
        return False
