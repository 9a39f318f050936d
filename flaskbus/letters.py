"""Dead letters: what is kept of a request that is given up, for people with ``redis-cli`` and ``flaskbus dead``.

A letter is one entry of the stream ``flaskbus:{/myapp}:dead``. Its plain fields are always there; what follows
them depends on what was buried:

=======================================  ====================================================================
``id method target``                     of the request, as far as they can be read
``reason``                               why it was given up
``attempt``                              how many runs it had, that one included
``at``                                   when, by the clock of whoever gave it up (RFC 3339)
``size``                                 bytes of the body that it had; of the whole entry, where that is not ours
``cut``                                  what was not kept whole: ``body``, ``headers``, ``fields``, or nothing
``from entry``                           the gateway that waited, and the id of the request's own entry
``ttl traceparent head body``            the rest of a request of ours, as in :mod:`flaskbus.wire`
``was:NAME``                             the fields of an entry that is not ours, each under its own name
=======================================  ====================================================================

Credentials do not stay. The values of headers and query parameters whose name says that they are secret become
``(redacted)``; a field of an entry that cannot be read ends where such a name begins. A head stays readable: a
header is kept whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

from flaskbus import wire
from flaskbus.errors import UsageError, WireError
from flaskbus.keys import DEAD_FIELD
from flaskbus.messages import Headers, Request

if TYPE_CHECKING:
    from datetime import datetime

Field = str | bytes | int

HEADERS_KEPT = 64 * 1024
"""Bytes of headers, names and values, that a letter keeps."""

FIELDS_KEPT = 32
"""Fields of an entry that is not ours that a letter keeps."""

NAME_KEPT = 256
"""Bytes of the name of such a field."""

REASON_KEPT = 500
"""Characters of a reason, which may quote what could not be read."""

REDACTED = "(redacted)"

_WORDS = (
    rb"authorization|authenticat|cookie|token|secret|passw|pwd|passphrase|credential|signature|session|jwt"
    rb"|api[-_]?key|access[-_]?key|private[-_]?key"
)
_SECRET = re.compile(rb"%s|(?:^|[-_])(?:auth|sig)$|^key$" % _WORDS, re.IGNORECASE)
_ANYWHERE = re.compile(_WORDS, re.IGNORECASE)
_PARAMETER = re.compile(r"([^=&;]+)=([^&;]+)")
_WAS = b"was:"


def is_secret(name: bytes) -> bool:
    """Whether a header or query parameter of this name usually holds a credential (RFC 9110, RFC 6265, RFC 6750)."""
    return _SECRET.search(name) is not None


def redact_target(target: str) -> str:
    """The target without the values of query parameters that are secret."""
    path, mark, query = target.partition("?")
    return path + mark + _PARAMETER.sub(_redact_parameter, query)


def _redact_parameter(found: re.Match[str]) -> str:
    secret = is_secret(unquote_plus(found[1], "latin-1").encode("latin-1", "replace"))
    return f"{found[1]}={REDACTED}" if secret else found[0]


# Writing


def of_request(request: Request, reason: str, *, at: datetime, entry: bytes | str, keep: int) -> list[Field]:
    """The fields of the letter for a request that is given up; ``keep`` is how much of its body stays, in bytes."""
    headers, whole = _keep_headers(request.headers)
    cut = [*(() if whole else ("headers",)), *(("body",) if len(request.body) > keep else ())]
    kept = replace(request, target=redact_target(request.target), headers=headers, body=request.body[:keep])
    fields = wire.encode_request(kept)
    letter = _letter(
        request_id=request.id,
        method=request.method,
        target=kept.target.encode("latin-1"),
        reason=reason,
        attempt=request.attempt,
        at=at,
        size=len(request.body),
        cut=" ".join(cut),
        sender=request.gateway,
        entry=entry,
    )
    rest = (pair for pair in zip(fields[::2], fields[1::2], strict=True) if pair[0] not in _PLAIN)
    return letter + [part for pair in rest for part in pair]


_PLAIN = frozenset({"id", "method", "target", "attempt", "from"})


def of_stranger(fields: Sequence[bytes], reason: str, *, at: datetime, entry: bytes | str) -> list[Field]:
    """The fields of the letter for an entry that cannot be read: flat names and values, of anybody's making."""
    sender, attempt = wire.peek_sender(fields)
    had = list(zip(fields[::2], fields[1::2], strict=False))
    said = dict(had)
    kept = [(name[:NAME_KEPT], _keep_field(name, value)) for name, value in had[:FIELDS_KEPT]]
    letter = _letter(
        request_id=wire.peek_id(fields) or "",
        method=said.get(b"method", b"")[:DEAD_FIELD],
        target=_keep_field(b"target", said.get(b"target", b"")),
        reason=reason,
        attempt=attempt,
        at=at,
        size=sum(map(len, fields)),
        cut="" if kept == had else "fields",
        sender=sender.encode("latin-1")[:DEAD_FIELD],
        entry=entry,
    )
    return letter + [part for name, value in kept for part in (_WAS + name, value)]


def _letter(
    *,
    request_id: str,
    method: str | bytes,
    target: bytes,
    reason: str,
    attempt: int,
    at: datetime,
    size: int,
    cut: str,
    sender: str | bytes,
    entry: bytes | str,
) -> list[Field]:
    """What every letter begins with."""
    # fmt: off
    return [
        "id", request_id, "method", method, "target", target, "reason", reason[:REASON_KEPT], "attempt", attempt,
        "at", at.isoformat(timespec="seconds"), "size", size, "cut", cut, "from", sender, "entry", entry,
    ]
    # fmt: on


def _keep_headers(headers: Headers) -> tuple[Headers, bool]:
    """The headers that a letter keeps, and whether those are all."""
    kept: list[tuple[bytes, bytes]] = []
    room = HEADERS_KEPT
    for name, value in headers:
        if is_secret(name):
            value = REDACTED.encode()
        elif name == b"referer":
            value = redact_target(value.decode("latin-1")).encode("latin-1")
        room -= len(name) + len(value)
        if room < 0:
            return tuple(kept), False
        kept.append((name, value))
    return tuple(kept), True


def _keep_field(name: bytes, value: bytes) -> bytes:
    """What is kept of a field: up to a length, and up to where its bytes name a credential."""
    if is_secret(name):
        return REDACTED.encode()
    value = value[:DEAD_FIELD]
    if name == b"target":
        value = redact_target(value.decode("latin-1")).encode("latin-1")
    elif found := _ANYWHERE.search(value):
        value = value[: found.start()] + REDACTED.encode()
    return value[:DEAD_FIELD]


# Reading


@dataclass(frozen=True, slots=True)
class Letter:
    """A letter as it lies on the broker; ``key`` is its id in the stream of dead letters.

    ``request`` is the request as far as it was kept, ``None`` where the entry was not one of ours; ``fields``
    then holds what it had. Texts may hold any character at all.
    """

    key: str
    id: str
    method: str
    target: str
    reason: str
    attempt: int
    at: str
    size: int
    cut: tuple[str, ...]
    sender: str
    entry: str
    request: Request | None
    fields: tuple[tuple[bytes, bytes], ...] = ()

    @classmethod
    def load(cls, key: bytes, fields: Mapping[bytes, bytes]) -> Letter:
        """A letter from its entry. Raises nothing: whatever lies in the stream has to be shown."""

        def text(name: bytes) -> str:
            return fields.get(name, b"").decode("utf-8", "backslashreplace")

        flat = [part for pair in fields.items() for part in pair]
        try:
            # What is here already is no larger for being unpacked.
            request = wire.decode_request(flat, max_body=len(fields.get(b"body", b"")))
        except WireError:
            request = None
        return cls(
            key=key.decode("ascii"),
            id=text(b"id"),
            method=text(b"method"),
            target=fields.get(b"target", b"").decode("latin-1"),
            reason=text(b"reason"),
            attempt=_number(fields.get(b"attempt", b"")),
            at=text(b"at"),
            size=_number(fields.get(b"size", b"")),
            cut=tuple(text(b"cut").split()),
            sender=text(b"from"),
            entry=text(b"entry"),
            request=request,
            fields=() if request else tuple(
                (name.removeprefix(_WAS), value)
                for name, value in fields.items()
                if name.startswith(_WAS) or name not in _LETTERS_OWN
            ),
        )  # fmt: skip

    @property
    def redacted(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the headers, and of the query parameters, whose values did not stay."""
        mark = REDACTED.encode()
        headers = self.request.headers if self.request else ()
        names = dict.fromkeys(name.decode("latin-1") for name, value in headers if value == mark)
        _, _, query = self.target.partition("?")
        parameters = [found[1] for found in _PARAMETER.finditer(query) if found[2] == REDACTED]
        return tuple(names), tuple(dict.fromkeys(parameters))


_LETTERS_OWN = frozenset(
    {b"id", b"method", b"target", b"reason", b"attempt", b"at", b"size", b"cut", b"from", b"entry"}
)


def _number(value: bytes) -> int:
    return int(value) if value.isdigit() and len(value) < 16 else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mend:
    """What a person gives in the place of what was not kept: headers with names in lower case, body, target."""

    headers: Headers = ()
    body: bytes | None = None
    target: str | None = None
    without_credentials: bool = False


def mended(letter: Letter, mend: Mend) -> Request:
    """The request to be sent again. Raises :class:`~flaskbus.errors.UsageError` with the mend where it is not whole."""
    request = letter.request
    if request is None:
        raise UsageError(f"letter {letter.key} is not a request of ours, so it cannot be sent again; drop it")
    if "headers" in letter.cut:
        raise UsageError(
            f"letter {letter.key} has lost headers, which were larger than {HEADERS_KEPT // 1024} KiB; "
            f"send it anew with: flaskbus request {request.method} …"
        )
    if mend.body is None and ("body" in letter.cut or len(request.body) < letter.size):
        raise UsageError(
            f"letter {letter.key} has only {len(request.body)} of the {letter.size} bytes of its body; "
            "give the whole with --data @FILE"
        )
    given = {name for name, _ in mend.headers}
    names, parameters = letter.redacted
    missing = [name for name in names if name.encode("latin-1") not in given]
    if missing and not mend.without_credentials:
        raise UsageError(
            f"letter {letter.key} was kept without the value of {', '.join(missing)}; "
            f"say -H '{missing[0].title()}: …', or send it --without-credentials"
        )
    if parameters and mend.target is None and not mend.without_credentials:
        raise UsageError(
            f"letter {letter.key} was kept without the value of {', '.join(parameters)} in its query; "
            "say --target '/…?…', or send it --without-credentials"
        )
    mark = REDACTED.encode()
    headers = [pair for pair in request.headers if pair[0] not in given and pair[1] != mark] + [*mend.headers]
    body = request.body if mend.body is None else mend.body
    if mend.body is not None:
        headers = [pair for pair in headers if pair[0] != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
    target = mend.target or _without_redacted(request.target)
    # Its Idempotency-Key may be used again, and the record is then another request's.
    return replace(request, target=target, headers=tuple(headers), body=body, idempotency="")


def _without_redacted(target: str) -> str:
    path, mark, query = target.partition("?")
    kept = _REDACTED_PARAMETER.sub("", query)
    return target if kept == query else path + (mark + kept.rstrip("&;") if kept else "")


_REDACTED_PARAMETER = re.compile(rf"[^=&;]+={re.escape(REDACTED)}(?:[&;]|$)")
