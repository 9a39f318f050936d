"""Raw bytes that try to be read in two ways, and what comes of each: the table behind docs/reference/attack-surface.md.

Behind the bytes of each row, on the same connection, goes :data:`AFTER`, an honest request. It tells whether the
connection was closed, and whether something was smuggled in before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.faults.attacks_http2 import ATTACKS2, Attack2, fields

MOUNTS = {"myapp": ("/myapp", ""), "other": ("/other", ""), "admin": ("/", "admin.example")}
"""App -> prefix and host."""

BODY_LIMIT = 100_000
"""``body_limit`` of the gateway that the rows are sent to."""

AFTER = b"GET /myapp/after HTTP/1.1\r\nHost: bus.example\r\nConnection: close\r\n\r\n"
SMUGGLED = b"GET /other/smuggled HTTP/1.1\r\nHost: bus.example\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"


@dataclass(frozen=True)
class Attack:
    """``status`` is that of each answer, and ``then`` that of :data:`AFTER`, 0 where the connection is closed.

    ``reached`` is what arrived at apps, each as ``APP: METHOD HOST SCRIPT_NAME PATH_INFO?QUERY``, then the beginning of
    its body and the headers that tell something.
    """

    name: str
    sent: bytes
    status: int
    why: str
    reached: tuple[str, ...] = ()
    then: int = 0

    @property
    def statuses(self) -> list[int]:
        """The statuses of all answers on the connection."""
        return [self.status] * (len(self.reached) or 1) + [self.then] * bool(self.then)


def get(
    target: bytes,
    *lines: bytes,
    method: bytes = b"GET",
    host: bytes | None = b"bus.example",
    version: bytes = b"HTTP/1.1",
    body: bytes = b"",
) -> bytes:
    head = [b" ".join((method, target, version)), *([] if host is None else [b"Host: " + host]), *lines]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def post(body: bytes, *lines: bytes) -> bytes:
    return get(b"/myapp/p", *lines, method=b"POST", body=body)


def chunks(body: bytes, *lines: bytes) -> bytes:
    return post(body, CHUNKED, *lines)


def refused(name: str, sent: bytes, why: str, status: int = 400) -> Attack:
    """The server in front refuses it, and closes the connection."""
    return Attack(name, sent, status, why)


def answered(name: str, sent: bytes, why: str, status: int = 400) -> Attack:
    """The gateway refuses it; where it ends is certain, so the connection stays."""
    return Attack(name, sent, status, why, then=200)


def passes(name: str, sent: bytes, why: str, *reached: str) -> Attack:
    return Attack(name, sent, 200, why, reached, then=200)


def posted(body: str = "", headers: str = "") -> str:
    return " ".join(filter(None, ["myapp: POST bus.example /myapp /p", body and f"body={body}", headers]))


def got(target: str, headers: str = "", *, app: str = "myapp", host: str = "bus.example") -> str:
    return " ".join(filter(None, [f"{app}: GET {host} {MOUNTS[app][0].rstrip('/')} {target}", headers]))


FRAMING = [
    refused(
        "length and chunks, with a request behind",
        post(b"0\r\n\r\n" + SMUGGLED, b"Content-Length: 4", CHUNKED),
        "CL.TE: whoever counts the length sees another end than whoever reads chunks (RFC 9112 6.1)",
    ),
    refused(
        "chunks and length",
        post(b"0\r\n\r\n" + SMUGGLED, CHUNKED, b"Content-Length: 4"),
        "TE.CL: the same in the other order",
    ),
    refused(
        "codings in two fields",
        post(b"0\r\n\r\n" + SMUGGLED, CHUNKED, b"Transfer-Encoding: identity"),
        "TE.TE: which of them counts is guesswork",
    ),
    refused(
        "an empty coding before the chunks",
        post(b"0\r\n\r\n" + SMUGGLED, b"Transfer-Encoding: ,chunked"),
        "only the one coding that is decoded here is taken, spelt plainly",
        501,
    ),
    passes(
        "a tab before the coding",
        post(b"0\r\n\r\n", b"Transfer-Encoding:\tchunked"),
        "white space is allowed there",
        posted(),
    ),
    passes(
        "a coding in capitals",
        post(b"0\r\n\r\n", b"transfer-encoding: CHUNKED"),
        "case means nothing",
        posted(),
    ),
    refused(
        "a coding with a space before the colon",
        post(b"0\r\n\r\n" + SMUGGLED, b"Transfer-Encoding : chunked"),
        "RFC 9112 5.1",
    ),
    refused(
        "a coding in a folded field",
        post(b"0\r\n\r\n" + SMUGGLED, b"X: y", b" Transfer-Encoding: chunked"),
        "obs-fold: one field or two (RFC 9112 5.2)",
    ),
    refused(
        "a coding behind a bare LF",
        post(b"0\r\n\r\n" + SMUGGLED, b"X: y\nTransfer-Encoding: chunked"),
        "one field for one reader, two for another",
    ),
    Attack(
        "a coding with an underscore",
        post(b"0\r\n\r\n", b"Transfer_Encoding: chunked"),
        200,
        "it is no framing, so the body is empty; what follows is not HTTP and ends the connection",
        (posted(),),
        then=400,
    ),
    refused("two lengths", post(b"abc", b"Content-Length: 3", b"Content-Length: 4"), "RFC 9112 6.3"),
    refused("a list of lengths", post(b"abc", b"Content-Length: 3, 3"), "a list is not one number"),
    refused("a negative length", post(b"abc", b"Content-Length: -3"), "digits only"),
    refused("a signed length", post(b"abc", b"Content-Length: +3"), "digits only"),
    refused("a length in hexadecimal", post(b"abc", b"Content-Length: 0x3"), "digits only"),
    refused(
        "a length in Arabic digits",
        post(b"abc", b"Content-Length: \xd9\xa3"),
        "what Python calls a digit is not one of HTTP's",
    ),
    refused(
        "a length with an underscore",
        post(b"abc", b"Content-Length: 0_3"),
        "what Python's int() takes is not HTTP's number",
    ),
    passes(
        "a length with white space and a zero",
        post(b"abc", b"Content-Length:  03 "),
        "1*DIGIT, white space around it",
        posted("abc"),
    ),
    refused(
        "a length of 20 digits",
        post(b"abc", b"Content-Length: 18446744073709551619"),
        "no overflow: too large is too large",
        413,
    ),
    passes(
        "no length and a request behind",
        post(SMUGGLED),
        "a second request on its own, as it was sent: it meets the same rules",
        posted(),
        got("/smuggled", app="other"),
    ),
    passes(
        "a GET with a body",
        get(b"/myapp/g", b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED),
        "a body belongs to its request, whatever the method",
        got("/g", f"body={SMUGGLED[:20].decode()}"),
    ),
    refused(
        "an extension of 1 MB",
        chunks(b"3;" + b"x" * 1_000_000 + b"\r\nabc\r\n0\r\n\r\n"),
        "the line of a chunk's size is bounded",
    ),
    refused(
        "an extension with a bare LF",
        chunks(b"3;\nx\r\nabc\r\n0\r\n\r\n"),
        "TERM.EXT: where the line ends is certain",
    ),
    refused("an extension with a bare CR", chunks(b"3;\rx\r\nabc\r\n0\r\n\r\n"), "the same"),
    refused("chunks that end with LF", chunks(b"3\nabc\n0\n\n"), "CRLF and nothing else"),
    refused("a chunk without its CRLF", chunks(b"3\r\nabcX\r\n0\r\n\r\n"), "its size and its data disagree"),
    refused("a negative chunk", chunks(b"-3\r\nabc\r\n0\r\n\r\n"), "hexadecimal digits only"),
    refused("a signed chunk", chunks(b"+3\r\nabc\r\n0\r\n\r\n"), "the same"),
    refused("a chunk of 0_3", chunks(b"0_3\r\nabc\r\n0\r\n\r\n"), "the same"),
    refused("a chunk with a space", chunks(b" 3\r\nabc\r\n0\r\n\r\n"), "the same"),
    Attack(
        "a chunk of 2^64 + 3",
        chunks(b"10000000000000003\r\nabc\r\n0\r\n\r\n"),
        408,
        "no overflow: the rest of that chunk never comes",
    ),
    refused(
        "chunks beyond the limit",
        chunks(b"1ffff\r\n" + b"x" * 0x1FFFF + b"\r\n0\r\n\r\n"),
        "body_limit counts what comes, stated or not",
        413,
    ),
    refused(
        "a length in the trailer",
        chunks(b"0\r\nContent-Length: 60\r\n\r\n"),
        "framing is settled before the body",
    ),
    refused("a coding in the trailer", chunks(b"0\r\nTransfer-Encoding: chunked\r\n\r\n"), "the same"),
    refused(
        "a host in the trailer",
        chunks(b"0\r\nHost: admin.example\r\n\r\n"),
        "routing is settled before the body",
    ),
    refused(
        "credentials in the trailer", chunks(b"0\r\nAuthorization: Basic YTpi\r\n\r\n"), "RFC 9110 6.5.1"
    ),
    passes(
        "another trailer",
        chunks(b"3\r\nabc\r\n0\r\nX-Trailer: y\r\n\r\n"),
        "read to its end, and dropped",
        posted("abc"),
    ),
    refused("a request as a trailer", chunks(b"0\r\n" + SMUGGLED), "its Host is refused"),
    refused(
        "5,000 trailers",
        chunks(b"0\r\n" + b"X: y\r\n" * 5000 + b"\r\n"),
        "the trailer is bounded as the header is",
        431,
    ),
]

HOSTS = [
    answered("no Host", get(b"/myapp/", host=None), "RFC 9112 3.2"),
    refused("two Hosts", get(b"/myapp/", b"Host: admin.example"), "which one counts is guesswork"),
    *(
        answered(f"the Host {host.decode('latin-1')}", get(b"/x", host=host), why)
        for host, why in {
            b"a/b@c": "a name and a port, nothing else",
            b"a b": "the same",
            b"a,b": "the same",
            b"bus.example, admin.example": "the same",
            b"user:pw@admin.example": "the same",
            b"admin.example#x": "the same",
            b"admin.example\\x": "the same",
            b"%61dmin.example": "no escapes in names",
            b"admin..example": "no empty label",
            b"a:99999": "no such port",
            b"a:b": "no such port",
            b"[::1": "no address",
            b"*.example": "no glob ever becomes part of a lookup or key",
            b"{/other}": "no brace either",
            b"admin\xe3\x80\x82example": "names are ASCII (IDNA)",
        }.items()
    ),
    answered("a Host of 300 bytes", get(b"/x", host=b"a" * 300), "no name of DNS is that long"),
    *(
        passes(
            f"the Host {host}",
            get(b"/x", host=host.encode()),
            "the same name",
            got("/x", app="admin", host=host),
        )
        for host in ("ADMIN.example", "admin.example.", "admin.example:81")
    ),
    passes(
        "a target with a host of its own",
        get(b"http://admin.example/x"),
        "the target's host replaces Host, for the app too (RFC 9112 3.2.2)",
        got("/x", app="admin", host="admin.example"),
    ),
    answered(
        "the same beside a Host that is none",
        get(b"http://admin.example/x", host=b"a/b@c"),
        "an invalid Host is refused even where it does not count",
    ),
    answered(
        "the same without a Host", get(b"http://admin.example/x", host=None), "HTTP/1.1 has to have one"
    ),
    answered("a target with a user", get(b"http://bus.example@admin.example/x"), "two readings of its host"),
    answered(
        "a target with a backslash", get(b"http://bus.example\\@admin.example/x"), "two readings of its host"
    ),
    answered("a target of another scheme", get(b"ftp://admin.example/x"), "only http and https"),
    refused("a tunnel", get(b"admin.example:443", method=b"CONNECT"), "this is no proxy"),
]

ESCAPES = "another reading of the path leads to another mount, or out of all"
PATHS = [
    *(
        answered(target.decode(), get(target), ESCAPES)
        for target in (
            b"/myapp/../other/secret",
            b"/myapp/%2e%2e/other/secret",
            b"/myapp/..%2fother/secret",
            b"/myapp%2f..%2fother/secret",
            b"//other/secret",
            b"/./other/secret",
            b"/myapp/..;/other/secret",
            b"/myapp;x/a",
            b"/;/other/secret",
            b"/myapp\\..\\other",
            b"/myapp/%5c..%5c../other",
            b"/%256fther/secret",
            b"/myapp/..",
            b"/other/..",
        )
    ),
    answered("http://bus.example/myapp/../other/x", get(b"http://bus.example/myapp/../other/x"), ESCAPES),
    answered("thirty steps out", get(b"/myapp" + b"/..;" * 30), "and it costs no more than others"),
    answered("/myapp/%00", get(b"/myapp/%00"), "where C ends a string, Python does not"),
    answered("/myapp%00", get(b"/myapp%00"), "the same"),
    answered("/myapp/#x", get(b"/myapp/#x"), "a target has no fragment"),
    refused("bytes above ASCII", get(b"/myapp/\xc3\xa9"), "they have to be percent-encoded"),
    answered("/MYAPP/", get(b"/MYAPP/"), "case means something in paths", 404),
    answered("/myappx", get(b"/myappx"), "prefixes end with a segment", 404),
    answered("/myapp{x}*", get(b"/myapp{x}*?[b]"), "no path is a pattern", 404),
    answered(
        "a key of Redis", get(b"/flaskbus:{/other}:requests"), "no key is built from what a client says", 404
    ),
    passes(
        "/%6fther/secret", get(b"/%6fther/secret"), "every reading leads there", got("/secret", app="other")
    ),
    passes(
        "/other//secret",
        get(b"/other//secret"),
        "every reading stays inside; the app gets it as it is",
        got("//secret", app="other"),
    ),
    passes("/myapp/a/../b", get(b"/myapp/a/../b"), "the same", got("/a/../b")),
    passes("/myapp/a;x=1", get(b"/myapp/a;x=1"), "the same", got("/a;x=1")),
    passes(
        "overlong UTF-8",
        get(b"/myapp/%c0%ae%c0%ae/other/x"),
        "it is no dot, and stays bytes",
        got("/\xc0\xae\xc0\xae/other/x"),
    ),
    passes(
        "overlong slash",
        get(b"/myapp/%c0%af..%c0%afother"),
        "it is no slash",
        got("/\xc0\xaf..\xc0\xafother"),
    ),
    passes("/myapp/%zz%", get(b"/myapp/%zz%"), "an escape that is none is itself", got("/%zz%")),
    passes(
        "/myapp/{a}*[b]", get(b"/myapp/{a}*[b]"), "below its mount a path is the app's own", got("/{a}*[b]")
    ),
    passes("a query with dots", get(b"/myapp/?/../other"), "a query routes nothing", got("/?/../other")),
    passes(
        "an encoded CRLF",
        get(b"/myapp/%0d%0aX:y"),
        "data to the app; what it writes into a header is refused there",
        got("/\r\nX:y"),
    ),
]

HEADERS = [
    Attack(
        "a field that Connection names",
        get(b"/myapp/", b"Connection: close, x-secret", b"X-Secret: 1"),
        200,
        "it was meant for us (RFC 9110 7.6.1); and it is the end of the connection",
        (got("/"),),
    ),
    passes(
        "Host and length that Connection names",
        get(b"/myapp/", b"Connection: host, content-length", b"Content-Length: 3", body=b"abc"),
        "framing and routing cannot be named away",
        got("/", "body=abc"),
    ),
    passes(
        "hop-by-hop fields",
        get(
            b"/myapp/",
            b"TE: trailers",
            b"Trailer: X",
            b"Keep-Alive: timeout=9",
            b"Proxy-Connection: x",
            b"Upgrade: x",
            b"HTTP2-Settings: AAMA",
        ),
        "not the app's",
        got("/"),
    ),
    passes(
        "an upgrade to HTTP/2",
        get(b"/myapp/", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMA"),
        "h2c smuggling: it is not upgraded, and the app does not hear of it",
        got("/"),
    ),
    passes(
        "names with an underscore",
        get(b"/myapp/", b"X_User: root", b"Script_Name: /x", b"X-Forwarded_For: 192.0.2.1"),
        "CGI cannot tell them from those with a hyphen",
        got("/"),
    ),
    passes(
        "Proxy",
        get(b"/myapp/", b"Proxy: http://evil.example"),
        "httpoxy: HTTP_PROXY in the environ of CGI",
        got("/"),
    ),
    passes(
        "X-Request-ID",
        get(b"/myapp/", b"X-Request-ID: {/other}"),
        "an ordinary header: no id of ours comes from a client",
        got("/", "X_REQUEST_ID={/other}"),
    ),
    passes(
        "a correlation id of somebody else's form",
        get(b"/myapp/", b"Flaskbus-Request-ID: 1-1"),
        "the same",
        got("/", "FLASKBUS_REQUEST_ID=1-1"),
    ),
    refused("a NUL in a value", get(b"/myapp/", b"X: a\0b"), "no control characters"),
    refused("a bare CR in a value", get(b"/myapp/", b"X: a\rX-Secret: 1"), "a line end for some"),
    refused("a name above ASCII", get(b"/myapp/", b"\xc3\xa9: a"), "names are tokens"),
    refused("a tab in a name", get(b"/myapp/", b"X\t: a"), "names are tokens"),
    refused("101 fields", get(b"/myapp/", *[b"X: a"] * 101), "a bound on their number", 431),
    refused("a field of 9,000 bytes", get(b"/myapp/", b"X: " + b"a" * 9000), "a bound on each", 431),
    refused("a target of 9,000 bytes", get(b"/myapp/" + b"a" * 9000), "a bound on the target", 414),
    refused(
        "a length beyond the limit",
        post(b"", b"Content-Length: %d" % (BODY_LIMIT + 1)),
        "before a byte of it is read",
        413,
    ),
]

SECTIONS = {
    "Where a request ends": FRAMING,
    "Which host": HOSTS,
    "Which path": PATHS,
    "What the app is told": HEADERS,
}
ATTACKS = [attack for section in SECTIONS.values() for attack in section]


def page() -> str:
    """The tables in Markdown."""
    tables = {f"HTTP/1: {title}": map(_row, attacks) for title, attacks in SECTIONS.items()}
    tables["HTTP/2"] = map(_row2, ATTACKS2)
    head = "| sent | outcome | why |\n| --- | --- | --- |\n"
    return "\n".join(f"## {title}\n\n{head}{''.join(rows)}" for title, rows in tables.items())


def _row(attack: Attack) -> str:
    outcome = f"{attack.status}"
    if attack.reached:
        outcome = ", ".join(f"`{_escaped(each.encode('latin-1'))}`" for each in attack.reached)
    elif not attack.then:
        outcome += ", closed"
    name = _escaped(attack.name.encode("latin-1")).replace("*", "\\*")
    return f"| {name}<br>`{_escaped(_telling(attack.sent))}` | {outcome} | {attack.why} |\n"


def _row2(attack: Attack2) -> str:
    usual = fields()
    told = b", ".join(b": ".join(pair) for pair in attack.fields if pair not in usual)
    if len(told) > 120:
        told = told[:60] + b"..." + told[-30:]
    outcome = f"`{attack.outcome}`" if ":" in attack.outcome else attack.outcome
    return f"| {attack.name}<br>`{_escaped(told)}` | {outcome} | {attack.why} |\n"


def _telling(sent: bytes) -> bytes:
    """The bytes without what every row has, and not all of what is only long."""
    head, _, body = sent.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if line != b"Host: bus.example"]
    told = b"\r\n".join(
        lines[1:] if lines[0].endswith((b" /myapp/p HTTP/1.1", b" /myapp/ HTTP/1.1")) else lines
    )
    told += b"\r\n\r\n" + body if body else b""
    return told if len(told) <= 120 else told[:60] + b"..." + told[-30:]


def _escaped(data: bytes) -> str:
    text = data.decode("latin-1").replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")
    shown = "".join(each if " " <= each <= "~" else f"\\x{ord(each):02x}" for each in text)
    return shown.replace("|", "\\|").replace("`", "'")
