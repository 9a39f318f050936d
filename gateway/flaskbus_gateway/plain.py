"""HTTP/1.1 that needs no state: a request that came as a whole and asks for an answer and no more. Pure.

Most are of this kind, and a regular expression reads them in a fraction of the time of a parser which can stop at
any byte. What is read here is a part of what gunicorn's parser takes, in the same sense; the rest is left to that:
what is wrong or ambiguous, HTTP/1.0, chunked, ``Expect``, upgrades, a connection's last request.
"""

from __future__ import annotations

import re
from functools import lru_cache
from http import HTTPStatus
from typing import NamedTuple

from flaskbus.messages import Reply
from flaskbus_gateway.http import HOP_BY_HOP, SERVER, TOKEN, is_token

LARGEST_HEADER = 8190
"""Bytes of a header that may be plain: the limit for one line of any."""

MOST_FIELDS = 100

_VALUE = rb"[^\x00-\x08\x0a-\x1f\x7f]*"
_LINE = re.compile(rb"([A-Z]{3,20}) (/[!-~]*) HTTP/1\.1\r\n")
_FIELDS = re.compile(rb"(?:%b:%b\r\n)*\r\n" % (TOKEN, _VALUE))
_FIELD = re.compile(rb"(%b):[\t ]*(%b)\r\n" % (TOKEN, _VALUE))

_SINGLE = (b"host", b"content-length", b"content-type", b"connection")
_OTHER_METHODS = (b"CONNECT", b"HEAD")
_OTHERS = frozenset((b"transfer-encoding", b"expect", b"upgrade", b"http2-settings"))


class Header(NamedTuple):
    """The fields of a request: as they came, as pairs with names in lower case, and how long its body is."""

    raw: bytes
    fields: tuple[tuple[bytes, bytes], ...]
    length: int


class Plain(NamedTuple):
    """``target`` is in origin-form."""

    method: bytes
    target: bytes
    header: Header
    body: bytes


def read(data: bytes, last: Header | None = None) -> Plain | None:
    """The request that these bytes are, if they are exactly one that is plain.

    ``last`` is that of the one before on the same connection: clients repeat their headers to the byte.
    """
    line = _LINE.match(data)
    if line is None or line[1] in _OTHER_METHODS:
        return None
    begin, end = line.end(), data.find(b"\r\n\r\n") + 4
    if end > LARGEST_HEADER or end < begin:
        return None
    raw = data[begin:end]
    header = last if last is not None and last.raw == raw else _read(raw)
    if header is None or end + header.length != len(data):
        return None
    return Plain(line[1], line[2], header, data[end:])


def _read(raw: bytes) -> Header | None:
    if not _FIELDS.fullmatch(raw):
        return None
    fields = tuple([(name.lower(), value.rstrip(b" \t")) for name, value in _FIELD.findall(raw)])
    names = [name for name, _ in fields]
    unique = set(names)
    if len(names) > MOST_FIELDS or not unique.isdisjoint(_OTHERS):
        return None
    if len(unique) < len(names) and any(names.count(name) > 1 for name in _SINGLE):
        return None
    values = dict(fields)
    length = values.get(b"content-length", b"0")
    if values.get(b"connection", b"keep-alive").lower() != b"keep-alive":
        return None
    return Header(raw, fields, int(length)) if length.isdigit() and len(length) <= 9 else None


# Responses

_SERVER_LINE = b"Server: %s\r\n" % SERVER
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]").search
_BODILESS = frozenset((204, 205, 304))


def write(reply: Reply, date: bytes, *, close: bool) -> list[bytes] | None:
    """A whole response over HTTP/1.1 to anything but HEAD, in pieces; ``None`` where its framing is not plain.

    ``date`` is a header line for what brings none; ``close`` says that the connection ends with it.
    """
    if reply.status < 200 or reply.status in _BODILESS:
        return None
    pieces = [_status_line(reply.status)]
    length: bytes | None = None
    server, dated = _SERVER_LINE, date
    for name, value in reply.headers:
        lower = _known(name)
        if not lower or _CONTROL(value):
            return None
        if lower == b"content-length":
            if length is not None:
                return None
            length = value
        elif lower == b"server":
            server = b""
        elif lower == b"date":
            dated = b""
        pieces += (name, b": ", value, b"\r\n")
    body = reply.body
    if length is None or length != b"%d" % len(body):
        return None
    pieces += (server, dated, b"Connection: close\r\n\r\n" if close else b"\r\n", body)
    return pieces


@lru_cache(1024)
def _known(name: bytes) -> bytes:
    """A header's name in lower case; empty where it is none that is relayed."""
    lower = name.lower()
    return lower if is_token(name) and lower not in HOP_BY_HOP else b""


# Those that differ between versions of Python are gunicorn's.
_OLDER = {413: "Payload Too Large", 414: "URI Too Long", 422: "Unprocessable Entity"}
PHRASES = {each.value: each.phrase for each in HTTPStatus} | _OLDER
"""Reason phrases by status."""


@lru_cache(1024)
def _status_line(status: int) -> bytes:
    phrase = PHRASES.get(status, "Unknown")
    return f"HTTP/1.1 {status} {phrase}\r\n".encode("ascii")
