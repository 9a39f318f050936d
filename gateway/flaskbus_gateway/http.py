"""ASGI's HTTP <-> messages. Pure: no broker, no clock, no I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from email.utils import formatdate
from typing import Any
from urllib.parse import quote

from flaskbus.errors import BusError, InvalidRequest
from flaskbus.messages import Headers
from flaskbus.routing import check_host, origin_form
from flaskbus_gateway.forwarding import FORWARDING, Origin, TrustedProxies, read_origin

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

SERVER = b"flaskbus"
"""Names us in responses whose app names nobody."""

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
"""RFC 9110 section 5.6.2, as a regular expression."""

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""RFC 9110 section 7.6.1: they speak of one connection, and are not relayed."""

# ``Proxy`` is nobody's header, and as HTTP_PROXY it would choose the proxy of what an app runs (CVE-2016-5385).
_REMOVED = HOP_BY_HOP | FORWARDING | {b"expect", b"http2-settings", b"proxy"}

PROMPTS = "flaskbus.prompts"
"""Where the state of the lifespan has the gateway's :class:`~flaskbus_gateway.prompt.Prompts`."""

BEGUN = "flaskbus.begun"
"""The extension of a scope whose request is a prompt exchange that is served otherwise from now on."""

IS_LOST = "flaskbus.is_lost"
"""The extension of a scope that says whether the connection of its request is lost: ``() -> bool``."""

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class Fields:
    """What the header of a request says beside its target, with no regard to its mount.

    ``client`` is the peer's address; where that is one of the ``proxies``, it is believed who its own client is.
    """

    __slots__ = ("client", "content_length", "headers", "host", "prefix", "scheme", "traceparent")

    def __init__(
        self,
        headers: Iterable[tuple[bytes, bytes]],
        http_version: str,
        client: tuple[str, int],
        scheme: str,
        proxies: TrustedProxies,
    ) -> None:
        self.client = client
        self.scheme = scheme
        self.prefix = ""
        self.content_length: int | None = None
        self.traceparent = ""
        """The client's trace context (W3C Trace Context), if it is one."""
        kept: list[tuple[bytes, bytes]] = []
        forwarding: list[tuple[bytes, bytes]] = []
        named: set[bytes] = set()
        hosts: list[bytes] = []
        for name, value in headers:
            if name in _REMOVED:
                if name in FORWARDING:
                    forwarding.append((name, value))
                elif name == b"connection":
                    named.update(token.strip().lower() for token in value.split(b","))
                continue
            if name == b"host":
                hosts.append(value)
            elif name == b"content-length":
                if not value.isdigit() or self.content_length is not None:
                    raise InvalidRequest("Content-Length is not one whole number")
                self.content_length = int(value)
            elif name == b"traceparent":
                if _TRACEPARENT.fullmatch(value):
                    self.traceparent = value.decode("ascii")
            elif b"_" in name:
                continue  # CGI cannot tell it from the name with a hyphen
            kept.append((name, value))
        named -= {b"close", b"keep-alive", b"upgrade", b"host", b"content-length"}
        if named:
            kept = [pair for pair in kept if pair[0] not in named]
        if len(hosts) > 1 or (not hosts and http_version == "1.1"):
            raise InvalidRequest("the request must have exactly one Host")
        self.host = hosts[0].decode("latin-1") if hosts else ""
        self.headers = kept
        if forwarding and self.client[0] in proxies:
            self._believe(read_origin(forwarding, self.client[0], self.scheme, proxies))

    def _believe(self, origin: Origin) -> None:
        """Take over what a trusted proxy says, and tell the app the same as one right hop."""
        if origin.client != self.client[0]:
            self.client = (origin.client, 0)
        self.scheme = origin.scheme
        self.prefix = origin.prefix
        said = [(b"x-forwarded-for", origin.client), (b"x-forwarded-proto", origin.scheme)]
        if origin.host:
            self.host = origin.host
            self.headers = [(b"host", origin.host.encode("latin-1")), *_without_host(self.headers)]
            said.append((b"x-forwarded-host", origin.host))
        if origin.port:
            said.append((b"x-forwarded-port", origin.port))
        self.headers.extend((name, value.encode("latin-1")) for name, value in said)


class Incoming(Fields):
    """What of a request can be told before its mount is known."""

    __slots__ = ("path", "server", "target")

    def __init__(self, scope: Scope, proxies: TrustedProxies) -> None:
        raw_path: bytes | None = scope.get("raw_path")
        self.path = raw_path.decode("latin-1") if raw_path else quote(scope["path"])
        self.server = address(scope.get("server"))
        # Over HTTP/2 it is what the client says.
        scheme = "https" if scope.get("scheme") in ("https", "wss") else "http"
        super().__init__(
            scope["headers"], scope["http_version"], address(scope.get("client")), scheme, proxies
        )
        if not self.path.startswith("/"):
            check_host(self.host)
            self.path, self.host = origin_form(self.path, self.host)
            self.headers = [(b"host", self.host.encode("latin-1")), *_without_host(self.headers)]
        query: bytes = scope["query_string"]
        # A prefix that a proxy took off was part of what the client asked for.
        target = self.prefix + self.path
        self.target = f"{target}?{query.decode('latin-1')}" if query else target


def address(end: object) -> tuple[str, int]:
    """One end of the connection. A Unix socket's has neither name nor port, whatever the server makes of its path."""
    match end:
        case [str(host), int(port), *_]:
            return host, port
    return "", 0


def _without_host(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [pair for pair in headers if pair[0] != b"host"]


def has_body(scope: Scope, incoming: Incoming) -> bool:
    """Whether a body may follow; only HTTP/1 says so for certain in its header."""
    if incoming.content_length is not None:
        return incoming.content_length > 0
    if scope["http_version"].startswith("1"):
        return any(name == b"transfer-encoding" for name, _ in scope["headers"])
    return True


def relayed_headers(headers: Headers) -> list[tuple[bytes, bytes]]:
    """An app's headers as the client gets them.

    The agent has checked them, but is believed in nothing that could break the framing. Where it names no length,
    or several, the server says where the body ends.
    """
    kept = []
    lengths = []
    for name, value in headers:
        lower = name.lower()
        if lower in HOP_BY_HOP or not is_token(name) or _BREAKING(value):
            continue
        if lower == b"content-length":
            lengths.append(value)
        kept.append((name, value))
    if lengths and (len(lengths) > 1 or not lengths[0].isdigit()):
        return [pair for pair in kept if pair[0].lower() != b"content-length"]
    return kept


def stated_length(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """How many bytes the body of a response has, by its relayed headers; ``None`` where they do not say."""
    return next((int(value) for name, value in headers if name.lower() == b"content-length"), None)


is_token = re.compile(TOKEN).fullmatch
_BREAKING = re.compile(rb"[\r\n\0]").search


def add_date(headers: list[tuple[bytes, bytes]]) -> None:
    """The time as HTTP writes it (RFC 9110 section 5.6.7); servers add it, but gunicorn's not to HTTP/2."""
    if not any(name.lower() == b"date" for name, _ in headers):
        headers.append((b"date", formatdate(usegmt=True).encode()))


def problem(error: BusError, request_id: str = "") -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of an error that the bus itself makes (RFC 9457)."""
    body = json.dumps(error.problem(request_id), ensure_ascii=False).encode()
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    return error.status, headers, body
