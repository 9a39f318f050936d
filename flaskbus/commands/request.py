"""``flaskbus request``: curl for the bus."""

from __future__ import annotations

import re
import sys
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, urlsplit

import click

from flaskbus import __version__, units
from flaskbus.answer import Answer
from flaskbus.client import Outgoing
from flaskbus.commands.tools import Bus, bus_client, with_bus
from flaskbus.errors import BusError, UsageError
from flaskbus.messages import Headers
from flaskbus.options import FlaskbusCommand
from flaskbus.routing import origin_form

BAD_STATUS = 1
BUS_FAILED = 3

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_BREAKING = re.compile(r"[\r\n\0]")


@click.command(
    "request",
    cls=FlaskbusCommand,
    short_help="Send one request straight through the bus.",
    examples="""
    flaskbus request /myapp/hello
    flaskbus request POST /myapp/items -d '{"name": "tea"}' -H 'Content-Type: application/json'
    flaskbus request PUT /myapp/photo -d @photo.jpg
    flaskbus request -i https://shop.example.com/cart
    """,
)
@with_bus
@click.argument("words", nargs=-1, required=True, metavar="[METHOD] TARGET")
@click.option("--header", "-H", "headers", multiple=True, metavar="'NAME: VALUE'", help="Send a header.")
@click.option("--data", "-d", metavar="DATA", help="Send a body: text, @FILE, or - for standard input.")
@click.option("--host", metavar="NAME", help="The Host that is asked for.  [default: localhost]")
@click.option(
    "--timeout",
    default="30s",
    show_default=True,
    metavar="DURATION",
    help="How long to wait for the reply's head.",
)
@click.option("--include", "-i", is_flag=True, help="Show status and headers too.")
def request(
    bus: Bus,
    words: tuple[str, ...],
    headers: tuple[str, ...],
    data: str | None,
    host: str | None,
    timeout: str,
    include: bool,
) -> int:
    """Send one request straight through the bus: no gateway, no HTTP port.

    METHOD is GET, or POST where there is a body, unless it is said. TARGET is a path or a URL, whose host
    counts as --host. The body is shown as it comes; it is sent as a form unless a Content-Type says otherwise.

    Exit code: 0 for a status below 400, 1 for any other, 3 where the bus could not bring an answer (which is
    then told as its gateway would).
    """
    body, seconds = read_body(data), duration(timeout)
    try:
        outgoing = build(words, headers, body, host, seconds)
        with bus_client(bus).send(outgoing) as answer:
            show(answer, sys.stdout.buffer, include or outgoing.method == "HEAD")
    except BusError as error:
        click.echo(f"flaskbus request: {error.title}: {error.detail} (executed: {error.executed})", err=True)
        return BUS_FAILED
    return BAD_STATUS if answer.status >= 400 else 0


def build(
    words: tuple[str, ...], lines: tuple[str, ...], body: bytes | None, host: str | None, timeout: float
) -> Outgoing:
    """The request that was meant. Raises :class:`~flaskbus.errors.UsageError` and ``InvalidRequest``."""
    if len(words) > 2:
        raise UsageError(f"a request has a method and a target; what is {words[2]!r}?")
    *methods, target = words
    method = methods[0].upper() if methods else "GET" if body is None else "POST"
    if not _TOKEN.fullmatch(method):
        raise UsageError(f"{method!r} is not a method; say it as in: flaskbus request GET /myapp/hello")
    headers = [header(line) for line in lines]
    named = dict(headers)
    scheme = urlsplit(target).scheme if "://" in target else "http"
    if scheme not in ("http", "https"):
        raise UsageError(f"{target!r} is neither a path nor an http or https URL")
    if not target.startswith("/") and "://" not in target:
        raise UsageError(f"target {target!r} has to begin with a slash; did you mean /{target}?")
    host = host or named.pop(b"host", b"localhost").decode("latin-1")
    target, host = origin_form(quote(target, safe=_RAW), host)
    defaults = {b"user-agent": f"flaskbus/{__version__}".encode(), b"accept": b"*/*"}
    if body is not None:
        defaults[b"content-type"] = b"application/x-www-form-urlencoded"
        defaults[b"content-length"] = str(len(body)).encode()
        named.pop(b"content-length", None)
    sent: Headers = (
        (b"host", host.encode("latin-1", "replace")),
        *((name, value) for name, value in defaults.items() if name not in named),
        *((name, value) for name, value in headers if name in named),
    )
    return Outgoing(
        method=method,
        target=target,
        host=host,
        headers=sent,
        body=body or b"",
        scheme=scheme,
        timeout=timeout,
    )


_RAW = "".join(map(chr, range(0x21, 0x7F)))
"""What a person may have typed as it is; the rest is percent-encoded as UTF-8."""


def header(line: str) -> tuple[bytes, bytes]:
    """``Name: value`` -> name in lower case and value. Raises :class:`~flaskbus.errors.UsageError`."""
    name, colon, value = line.partition(":")
    name = name.strip()
    if not colon or not _TOKEN.fullmatch(name) or _BREAKING.search(value):
        raise UsageError(f"--header {line!r} is not a header; say it as in: -H 'Accept: text/html'")
    return name.lower().encode(), value.strip().encode("utf-8")


def read_body(data: str | None) -> bytes | None:
    """The body that ``--data`` means. Raises :class:`~flaskbus.errors.UsageError`."""
    if data == "-":
        return sys.stdin.buffer.read()
    if data and data.startswith("@"):
        try:
            return Path(data[1:]).read_bytes()
        except OSError as error:
            raise UsageError(f"--data {data}: {error.strerror}") from None
    return None if data is None else data.encode("utf-8", "surrogateescape")


def duration(text: str) -> float:
    try:
        value = units.seconds(text)
    except ValueError:
        raise UsageError(f"--timeout must be a duration such as 30, 500ms or 5m, not {text!r}") from None
    if value <= 0:
        raise UsageError(f"--timeout must be more than 0, not {text}")
    return value


def show(answer: Answer, out: BinaryIO, include: bool) -> None:
    """Write the answer as it comes."""
    if include:
        try:
            phrase = HTTPStatus(answer.status).phrase
        except ValueError:
            phrase = ""
        lines = [f"HTTP/1.1 {answer.status} {phrase}".rstrip().encode()]
        lines += [name + b": " + value for name, value in answer.headers]
        out.write(b"\r\n".join(lines) + b"\r\n\r\n")
        out.flush()
    for chunk in answer:
        out.write(chunk)
        out.flush()
