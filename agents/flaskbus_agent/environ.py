"""A request as it travels -> the environ of PEP 3333."""

from __future__ import annotations

import io
import re
from functools import lru_cache
from typing import IO, TYPE_CHECKING, TextIO
from urllib.parse import unquote_to_bytes

import werkzeug.wsgi

from flaskbus.messages import Headers, Request
from flaskbus.wire import MAX_CHUNK, REPEATED

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
    path, _, query = request.target.partition("?")
    environ: WSGIEnvironment = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": _decoded(request.script_name),
        "PATH_INFO": _decoded(_below(request.script_name, path)),
        "QUERY_STRING": query,
        "REQUEST_URI": request.target,
        "RAW_URI": request.target,
        "SERVER_PROTOCOL": f"HTTP/{request.http_version}",
        "SERVER_SOFTWARE": "flaskbus",
        "REMOTE_ADDR": request.client[0],
        "REMOTE_PORT": str(request.client[1]),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": request.scheme,
        "wsgi.input": io.BytesIO(request.body),
        "wsgi.input_terminated": True,
        "wsgi.errors": errors,
        "wsgi.multithread": multithread,
        "wsgi.multiprocess": multiprocess,
        "wsgi.run_once": False,
        "wsgi.file_wrapper": FileWrapper,
        "flaskbus.request_id": request.id,
        "flaskbus.attempt": request.attempt,
    }
    size = sum([len(value) for _, value in request.headers])
    environ.update((_known_variables if size <= REPEATED else _variables)(request.headers))
    # A body that is here whole has a known length, whatever framing brought it.
    if not request.inbound and (request.body or "CONTENT_LENGTH" in environ):
        environ["CONTENT_LENGTH"] = str(len(request.body))
    environ["SERVER_NAME"], environ["SERVER_PORT"] = _server(request, environ.get("HTTP_HOST", ""))
    return environ


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


def _server(request: Request, host: str) -> tuple[str, str]:
    """Name and port of the server, which PEP 3333 wants even where a Unix socket has neither."""
    name, port = request.server
    if not name:
        match = _HOST.fullmatch(host)
        name, port = (match[1], int(match[2] or 0)) if match else ("localhost", 0)
    return name, str(port or (443 if request.scheme == "https" else 80))
