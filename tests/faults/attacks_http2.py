"""The same over HTTP/2: fields as they are sent, and what comes of each.

HTTP/2 has no framing of its own in fields, so whatever looks like some can only be meant for somebody behind us.
"""

from __future__ import annotations

from dataclasses import dataclass

Fields = list[tuple[bytes, bytes]]

ENDED = "connection error"
"""The server ends the connection with GOAWAY (RFC 9113 section 5.4.1)."""

RESET = "stream error"
"""The server resets the stream, and the others go on (RFC 9113 section 5.4.2)."""


@dataclass(frozen=True)
class Attack2:
    """``outcome`` is :data:`ENDED`, :data:`RESET`, a status, or what reached an app (as in attacks.py)."""

    name: str
    fields: Fields
    outcome: str
    why: str
    body: bytes | None = None


def fields(
    *more: tuple[bytes, bytes],
    method: bytes = b"GET",
    scheme: bytes = b"https",
    authority: bytes | None = b"bus.example",
    path: bytes | None = b"/myapp/x",
) -> Fields:
    pseudo = [(b":method", method), (b":scheme", scheme), (b":path", path), (b":authority", authority)]
    return [(name, value) for name, value in pseudo if value is not None] + list(more)


def post(*more: tuple[bytes, bytes]) -> Fields:
    return fields(*more, method=b"POST")


REACHED = "myapp: GET bus.example /myapp /x"

ATTACKS2 = [
    Attack2(
        "a coding",
        post((b"transfer-encoding", b"chunked")),
        ENDED,
        "H2.TE: it would frame the body for somebody behind us (RFC 9113 8.2.2)",
        b"0\r\n\r\nGET /other/smuggled HTTP/1.1\r\n\r\n",
    ),
    Attack2("a length that is too small", post((b"content-length", b"1")), ENDED, "H2.CL", b"abc"),
    Attack2("a length that is too large", post((b"content-length", b"9")), ENDED, "H2.CL", b"abc"),
    Attack2("a signed length", post((b"content-length", b"+3")), ENDED, "digits only", b"abc"),
    Attack2(
        "two lengths",
        post((b"content-length", b"3"), (b"content-length", b"4")),
        ENDED,
        "which of them counts is guesswork",
        b"abc",
    ),
    Attack2("Connection", fields((b"connection", b"x-secret")), ENDED, "HTTP/2 has none"),
    Attack2("Upgrade", fields((b"upgrade", b"websocket")), ENDED, "HTTP/2 has none"),
    Attack2("TE", fields((b"te", b"gzip")), ENDED, "only trailers"),
    Attack2("a line end in a value", fields((b"x", b"a\r\nevil: 1")), ENDED, "RFC 9113 8.2.1"),
    Attack2("a NUL in a value", fields((b"x", b"a\0b")), ENDED, "the same"),
    Attack2("a line end in a name", fields((b"x\r\nevil", b"1")), ENDED, "the same"),
    Attack2("a colon in a name", fields((b"x:y", b"1")), ENDED, "the same"),
    Attack2("a space in a name", fields((b"x y", b"1")), ENDED, "the same"),
    Attack2("capitals in a name", fields((b"X-Upper", b"1")), ENDED, "the same"),
    Attack2("an empty name", fields((b"", b"1")), ENDED, "the same"),
    Attack2(
        "a line end in the path", fields(path=b"/myapp/x HTTP/1.1\r\nHost: evil"), ENDED, "request splitting"
    ),
    Attack2("a space in the path", fields(path=b"/myapp/x y"), "400", "the same"),
    Attack2(
        "a line end in the method", fields(method=b"GET / HTTP/1.1\r\nX: y\r\n\r\nGET"), ENDED, "the same"
    ),
    Attack2("a space in the method", fields(method=b"GE T"), RESET, "the same"),
    Attack2("a method in lower case", fields(method=b"get"), "400", "as over HTTP/1"),
    Attack2("two paths", fields((b":path", b"/other/x")), ENDED, "RFC 9113 8.3"),
    Attack2("two authorities", fields((b":authority", b"admin.example")), ENDED, "the same"),
    Attack2(
        "a path behind the fields",
        fields((b"a", b"b"), (b":path", b"/other/x"), path=None),
        ENDED,
        "the same",
    ),
    Attack2("a pseudo-field of its own", fields((b":evil", b"1")), ENDED, "the same"),
    Attack2("no path", fields(path=None), ENDED, "the same"),
    Attack2("no host", fields(authority=None), ENDED, "the same"),
    Attack2(
        "another Host beside the authority",
        fields((b"host", b"admin.example")),
        ENDED,
        "which of them counts is guesswork",
    ),
    Attack2("the same Host", fields((b"host", b"bus.example")), REACHED, "one meaning"),
    Attack2("Host alone", fields((b"host", b"bus.example"), authority=None), REACHED, "one meaning"),
    Attack2("an authority with a path", fields(authority=b"a/b@c"), "400", "a name and a port, nothing else"),
    Attack2("an authority with a user", fields(authority=b"x@admin.example"), "400", "the same"),
    Attack2(
        "a path with a host",
        fields(path=b"http://admin.example/myapp/x"),
        "400",
        "the host has a field of its own (RFC 9113 8.3.1)",
    ),
    Attack2("a path without a slash", fields(path=b"myapp/x"), "400", "the same"),
    Attack2("a path that leads out", fields(path=b"/myapp/../other"), "400", "as over HTTP/1"),
    Attack2(
        "a tunnel",
        [(b":method", b"CONNECT"), (b":authority", b"admin.example:443")],
        "400",
        "this is no proxy",
    ),
    Attack2(
        "a tunnel for a WebSocket",
        fields((b":protocol", b"websocket"), (b"sec-websocket-version", b"13"), method=b"CONNECT"),
        "400",
        "not offered in SETTINGS (RFC 8441 section 3)",
    ),
    Attack2(
        "another scheme", fields(scheme=b"javascript"), REACHED, "the app is told http or https, nothing else"
    ),
    Attack2("a name with an underscore", fields((b"x_user", b"root")), REACHED, "as over HTTP/1"),
    Attack2("Proxy", fields((b"proxy", b"http://evil")), REACHED, "as over HTTP/1"),
    Attack2(
        "cookies in pieces",
        fields((b"cookie", b"a=1"), (b"cookie", b"b=2")),
        f"{REACHED} COOKIE=a=1; b=2",
        "put together (RFC 9113 8.2.3)",
    ),
    Attack2(
        "200 fields",
        fields(*((b"x%d" % number, b"1") for number in range(200))),
        RESET,
        "a bound on their number",
    ),
    Attack2("a field of 9,000 bytes", fields((b"x", b"a" * 9000)), RESET, "a bound on each"),
    Attack2("a path of 9,000 bytes", fields(path=b"/" + b"a" * 9000), RESET, "a bound on the target"),
    Attack2(
        "160,000 bytes of fields",
        fields(*((b"x%d" % number, b"a" * 8000) for number in range(20))),
        ENDED,
        "a bound on all",
    ),
]
