"""What ``Idempotency-Key`` means on a mount that opted in. Pure.

A request with such a key has a *record* on the broker. Its name is made from all that tells one operation from
another: method, host, target, key and caller. The record remembers a fingerprint of the body, and the first
answer. The scripts ``remember``, ``finish``, ``withdraw``, ``requeue`` and ``bury`` are its life.

The header is that of draft-ietf-httpapi-idempotency-key-header: a string of RFC 8941, or the bare value that
most clients send.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import ClassVar, Literal, Self

from flaskbus.errors import InvalidRequest
from flaskbus.messages import NOT_RUN, Failure, Frame, Headers, Reply

HEADER = b"idempotency-key"

REPLAYED = (b"idempotency-replayed", b"true")
"""What is added to an answer that is given again."""

SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
"""RFC 9110 section 9.2.1: these change nothing, and their key, if any, means nothing here."""

CREDENTIALS = (b"authorization", b"cookie")
"""The headers that always tell one caller from another."""

LONGEST_KEY = 255

_BARE = re.compile(rb"[!#-+\--~]{1,%d}" % LONGEST_KEY)  # visible ASCII without quotes and commas
_QUOTED = re.compile(rb'"((?:[ !#-\[\]-~]|\\["\\])+)"')  # RFC 8941 section 3.3.3
_PORT = re.compile(r":\d*\Z")
_HEADER_NAME = re.compile(r"[a-z0-9!#$%&'*+.^`|~-]+")  # of RFC 9110 section 5.6.2, without the underscore


@dataclass(frozen=True, slots=True)
class Policy:
    """What a mount that opted in asks for.

    ``ttl`` is how many milliseconds a key is remembered; ``identity`` names headers, in lower case, that tell
    callers apart beside :data:`CREDENTIALS`.
    """

    ttl: int
    identity: tuple[bytes, ...] = ()

    FIELDS: ClassVar = ("idempotency_ttl", "idempotency_identity")

    def fields(self) -> dict[str, str | int]:
        """What the mount's own hash says of it."""
        return dict(zip(self.FIELDS, (self.ttl, b",".join(self.identity).decode()), strict=True))

    @classmethod
    def load(cls, ttl: bytes | None, identity: bytes | None) -> Self | None:
        """From those two fields; ``None`` where the mount has not opted in."""
        if not ttl or not ttl.isdigit() or len(ttl) > 15:
            return None
        return cls(int(ttl), tuple(name for name in (identity or b"").split(b",") if name))

    def record(self, method: str, host: str, target: str, headers: Headers) -> str:
        """The name of a request's record; empty where it has no key that counts.

        Raises :class:`~flaskbus.errors.InvalidRequest` for a header that is not one key.
        """
        if method in SAFE:
            return ""
        values = [value for name, value in headers if name == HEADER]
        if not values:
            return ""
        return record_name(method, host, target, parse_key(values), caller(headers, self.identity))


def header_names(text: str) -> tuple[bytes, ...]:
    """``"X-User, x-tenant"`` -> names in lower case; ValueError for what is no name of a header that is relayed."""
    names = [name for part in text.lower().split(",") if (name := part.strip())]
    for name in names:
        if not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a header that apps get")
    return tuple(name.encode("ascii") for name in names)


def parse_key(values: Sequence[bytes]) -> bytes:
    """The key in the header's values: one, of 1 to 255 visible ASCII characters, spaces too if it is quoted.

    A quoted key is the same as a bare one. Raises :class:`~flaskbus.errors.InvalidRequest`.
    """
    if len(values) == 1:
        value = values[0].strip(b" \t")
        if _BARE.fullmatch(value):
            return value
        quoted = _QUOTED.fullmatch(value)
        if quoted:
            key = re.sub(rb"\\(.)", rb"\1", quoted[1])
            if len(key) <= LONGEST_KEY:
                return key
    raise InvalidRequest(
        f"Idempotency-Key must be one key of 1 to {LONGEST_KEY} visible ASCII characters, bare or in double quotes"
    )


def caller(headers: Headers, identity: Iterable[bytes] = ()) -> bytes:
    """Who sends a request, as far as its credentials say: a hash, and empty where it has none."""
    parts: list[bytes] = []
    for name in (*CREDENTIALS, *identity):
        values = [value for header, value in headers if header == name]
        if name == b"cookie" and values:
            values = [b"; ".join(values)]  # RFC 9113 section 8.2.3: HTTP/2 may cut it into several
        for value in values:
            parts += (name, value)
    return sha256(_joined(parts)).digest() if parts else b""


def record_name(method: str, host: str, target: str, key: bytes, who: bytes) -> str:
    """64 hexadecimal digits. ``host`` counts without its port: a repeat may come through another gateway."""
    name = _PORT.sub("", host).lower()
    parts = (method.encode(), name.encode("latin-1"), target.encode("latin-1"), key, who)
    return sha256(_joined(parts)).hexdigest()


def fingerprint(headers: Headers, body: bytes) -> str:
    """What a repeat must have in common with the first request: its body, and how that is to be read."""
    described = (pair for pair in headers if pair[0] in (b"content-type", b"content-encoding"))
    parts = [part for pair in described for part in pair]
    return sha256(_joined([*parts, sha256(body).digest()])).hexdigest()


Fate = Literal["answered", "unkept", "released"]
"""What becomes of a record when an agent ends its request."""


@dataclass(frozen=True, slots=True)
class Keeper:
    """What an agent keeps of answers: for ``life`` milliseconds, if their frame has up to ``limit`` bytes."""

    life: int
    limit: int
    identity: tuple[bytes, ...] = ()

    def fate(self, request: Headers, frames: Sequence[Frame], size: int) -> Fate:
        """What these last frames of ``size`` bytes, to a request with these headers, make of its record."""
        last = frames[-1]
        if isinstance(last, Failure) and last.code == NOT_RUN:
            return "released"
        if not isinstance(last, Reply) or size > self.limit:
            return "unkept"
        return "answered" if may_keep(request, last.headers, self.identity) else "unkept"


def may_keep(request: Headers, reply: Headers, identity: Iterable[bytes] = ()) -> bool:
    """Whether a repeat may get this answer: one that gives a cookie to a caller without credentials starts a
    session, and anybody may come with the same key.
    """
    return bool(caller(request, identity)) or not any(name.lower() == b"set-cookie" for name, _ in reply)


def _joined(parts: Iterable[bytes]) -> bytes:
    """Parts so that no two sequences of them are joined to the same bytes."""
    return b"".join(len(part).to_bytes(8) + part for part in parts)
