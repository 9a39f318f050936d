"""A request as it travels -> the environ of PEP 3333."""

from __future__ import annotations

import io
import re
from functools import lru_cache
from typing import IO, TYPE_CHECKING, TextIO
from urllib.parse import unquote_to_bytes

import werkzeug.wsgi

from flaskbus.messages import Headers, Request
from flaskbus.wire import MAX_CHUNK, REPEATED, Plain, RequestHead, decode_head

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


class FileWrapper(werkzeug.wsgi.FileWrapper):
    """``wsgi.file_wrapper``: reads blocks of the largest chunk, since frameworks suggest 8 KiB."""

    def __init__(self, file: IO[bytes], block_size: int = MAX_CHUNK):
        super().__init__(file, max(block_size, MAX_CHUNK))


def build_environ(
    request: Request, *, errors: TextIO, multithread: bool, multiprocess: bool
) -> WSGIEnvironment:
    """The environ of a request; beyond PEP 3333 and CGI it has ``REQUEST_URI`` and ``RAW_URI`` (the target as
    sent), ``flaskbus.request_id`` and ``flaskbus.attempt``.
    """
    size = sum([len(value) for _, value in request.headers])
    environ = _of_head(
        (
            request.version, request.scheme, request.http_version, request.client, request.server,
            request.script_name, request.headers,
        ),
        (_known_variables if size <= REPEATED else _variables)(request.headers),
        multithread, multiprocess,
    )  # fmt: skip
    environ["wsgi.errors"] = errors
    body = None if request.inbound else request.body
    _add(environ, request.script_name, request.method, request.target, request.id, request.attempt, body)
    return environ


def plain_environ(plain: Plain, *, errors: TextIO, multithread: bool, multiprocess: bool) -> WSGIEnvironment:
    """The same for a plain entry. Raises :class:`~flaskbus.errors.WireError` where its head is not readable."""
    of = _known_head if len(plain.head) <= REPEATED else _read_head
    script_name, known = of(plain.head, multithread, multiprocess)
    environ = known.copy()
    environ["wsgi.errors"] = errors
    _add(environ, script_name, plain.method, plain.target, plain.id, plain.attempt, plain.body)
    return environ


def _read_head(data: bytes, multithread: bool, multiprocess: bool) -> tuple[str, WSGIEnvironment]:
    """The name of the script, and what all requests with this head have in their environ."""
    head = decode_head(data)
    return head[5], _of_head(head, _variables(head[6]), multithread, multiprocess)


_known_head = lru_cache(256)(_read_head)
"""The same for a client that repeats its head; not to be changed."""


def _of_head(
    head: RequestHead, variables: WSGIEnvironment, multithread: bool, multiprocess: bool
) -> WSGIEnvironment:
    _, scheme, http_version, client, server, script_name, _ = head
    name, port = _server(server, scheme, variables.get("HTTP_HOST", ""))
    return {
        "SCRIPT_NAME": _decoded(script_name),
        "SERVER_PROTOCOL": f"HTTP/{http_version}",
        "SERVER_SOFTWARE": "flaskbus",
        "SERVER_NAME": name,
        "SERVER_PORT": port,
        "REMOTE_ADDR": client[0],
        "REMOTE_PORT": str(client[1]),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scheme,
        "wsgi.input_terminated": True,
        "wsgi.multithread": multithread,
        "wsgi.multiprocess": multiprocess,
        "wsgi.run_once": False,
        "wsgi.file_wrapper": FileWrapper,
        **variables,
    }


def _add(
    environ: WSGIEnvironment,
    script_name: str,
    method: str,
    target: str,
    request_id: str,
    attempt: int,
    body: bytes | None,
) -> None:
    """What each request has of its own; without a ``body`` where that comes in parts."""
    path, _, query = target.partition("?")
    environ["REQUEST_METHOD"] = method
    environ["PATH_INFO"] = _decoded(_below(script_name, path))
    environ["QUERY_STRING"] = query
    environ["REQUEST_URI"] = environ["RAW_URI"] = target
    environ["wsgi.input"] = io.BytesIO(body or b"")
    environ["flaskbus.request_id"] = request_id
    environ["flaskbus.attempt"] = attempt
    # A body that is here whole has a known length, whatever framing brought it.
    if body or (body is not None and "CONTENT_LENGTH" in environ):
        environ["CONTENT_LENGTH"] = str(len(body))


def _variables(headers: Headers) -> WSGIEnvironment:
    """What the headers are in the environ."""
    variables: WSGIEnvironment = {}
    repeated: dict[str, list[str]] = {}
    for name, value in headers:
        key = _environ_key(name)
        if not key:
            continue
        if key in variables:
            repeated.setdefault(key, [variables[key]]).append(value.decode("latin-1"))
        else:
            variables[key] = value.decode("latin-1")
    for key, values in repeated.items():
        variables[key] = _joined(key, values)
    return variables


_known_variables = lru_cache(256)(_variables)
"""The same for a client that repeats its headers; not to be changed."""


def _decoded(path: str) -> str:
    """Percent-decoded bytes, as latin-1 text (PEP 3333, "Unicode Issues")."""
    if "%" not in path:
        return path
    return unquote_to_bytes(path.encode("latin-1")).decode("latin-1")


def _below(script_name: str, path: str) -> str:
    """What is left of the path. Cut by segments: the client may have spelt the prefix with other escapes."""
    taken = script_name.count("/")
    if not taken:
        return path
    segments = path.split("/", taken + 1)
    return "/" + segments[-1] if len(segments) > taken + 1 else ""


@lru_cache(1024)
def _environ_key(name: bytes) -> str:
    """``b"user-agent"`` -> ``"HTTP_USER_AGENT"``; empty for what the app must not see.

    An underscore would make ``X_User`` and ``X-User`` one variable.
    """
    key = name.upper().decode("latin-1")
    if "_" in key or key == "TRANSFER-ENCODING":
        return ""
    key = key.replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else "HTTP_" + key


def _joined(key: str, values: list[str]) -> str:
    if key == "HTTP_COOKIE":
        return "; ".join(values)
    return ",".join(values) if key.startswith("HTTP_") else values[-1]


_HOST = re.compile(r"(.+?)(?::([0-9]{1,5})?)?")


def _server(server: tuple[str, int], scheme: str, host: str) -> tuple[str, str]:
    """Name and port of the server, which PEP 3333 wants even where a Unix socket has neither."""
    name, port = server
    if not name:
        match = _HOST.fullmatch(host)
        name, port = (match[1], int(match[2] or 0)) if match else ("localhost", 0)
    return name, str(port or (443 if scheme == "https" else 80))
