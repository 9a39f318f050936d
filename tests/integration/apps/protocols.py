"""Servers of protocols built on HTTP, as WSGI apps; what they store is below ``PROTOCOLS_ROOT``.

``create_app()`` is all of them as one WSGI server without the bus has it; :data:`MOUNTS` says where each is.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from xmlrpc.server import SimpleXMLRPCDispatcher

import flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.wsgi import ClosingIterator

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

MODULE = "tests.integration.apps.protocols"
ROOT = Path(os.environ.get("PROTOCOLS_ROOT", "."))
BLOCK = 64 * 1024


# Git's smart HTTP: git's own CGI program, and dulwich


def cgi(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """``git http-backend`` (RFC 3875): a body of any length goes in while the answer comes out."""
    variables = {key: str(value) for key, value in environ.items() if key.isupper()}
    variables |= {
        "PATH": os.environ["PATH"],
        "GIT_PROJECT_ROOT": str(ROOT / "git"),
        "GIT_HTTP_EXPORT_ALL": "1",
    }
    variables |= {"REMOTE_USER": "tester", "GIT_CONFIG_NOSYSTEM": "1", "HOME": str(ROOT)}
    process = subprocess.Popen(
        ["git", "http-backend"], env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    feeder = threading.Thread(target=_feed, args=(environ["wsgi.input"], process.stdin))
    feeder.start()
    headers: list[tuple[str, str]] = []
    status = "200 OK"
    for line in iter(process.stdout.readline, b"\r\n"):
        name, _, value = line.decode("latin-1").partition(":")
        if name == "Status":
            status = value.strip()
        else:
            headers.append((name, value.strip()))
    start_response(status, headers)
    return _output(process, feeder)


def _feed(source: IO[bytes], sink: IO[bytes]) -> None:
    with suppress(OSError), sink:  # the client is gone, or the program has read enough
        while data := source.read(BLOCK):
            sink.write(data)


def _output(process: subprocess.Popen[bytes], feeder: threading.Thread) -> Iterator[bytes]:
    output = process.stdout
    assert isinstance(output, io.BufferedReader)
    try:
        yield from iter(lambda: output.read1(BLOCK), b"")
    finally:
        output.close()
        process.terminate()
        process.wait()
        feeder.join()


def dulwich_app() -> WSGIApplication:
    from dulwich.repo import Repo
    from dulwich.server import DictBackend
    from dulwich.web import make_wsgi_chain

    app: WSGIApplication = make_wsgi_chain(DictBackend({"/both.git": Repo(str(ROOT / "git/both.git"))}))
    return app


# Mercurial


def hg_app() -> WSGIApplication:
    from mercurial import demandimport

    demandimport.disable()
    from mercurial.hgweb import hgweb

    app: WSGIApplication = hgweb(str(ROOT / "hg").encode())
    return app


# WebDAV


def dav_app() -> WSGIApplication:
    from wsgidav.wsgidav_app import WsgiDAVApp

    config = {
        "provider_mapping": {"/": str(ROOT / "dav")},
        "mount_path": "/dav",
        "simple_dc": {"user_mapping": {"*": True}},
        "lock_storage": True,
        "property_manager": True,
        "logging": {"enable": False},
        "verbose": 1,
    }
    app: WSGIApplication = WsgiDAVApp(config)
    return app


# S3


def s3_app() -> WSGIApplication:
    from moto.server import DomainDispatcherApplication, create_backend_app

    app: WSGIApplication = DomainDispatcherApplication(create_backend_app)
    return app


# A package index


def index_app() -> WSGIApplication:
    from pypiserver import app_from_config
    from pypiserver.config import Config

    arguments = ["run", "-P", ".", "-a", ".", "--overwrite", str(ROOT / "packages")]
    app: WSGIApplication = app_from_config(Config.from_args(arguments))
    return app


# tus, XML-RPC, and what goes both ways at the same time


OPEN = 0
"""How many requests of the small app are being run, but those that ask for this."""
_count = threading.Lock()


def counted(app: WSGIApplication) -> WSGIApplication:
    def count(change: int) -> None:
        global OPEN
        with _count:
            OPEN += change

    def counting(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/open":
            return app(environ, start_response)
        count(1)
        try:
            body = app(environ, start_response)
        except BaseException:
            count(-1)
            raise
        return ClosingIterator(body, partial(count, -1))

    return counting


def small_app() -> WSGIApplication:
    app = flask.Flask(MODULE)
    app.add_url_rule("/rpc", view_func=xml_rpc, methods=["POST"])
    app.add_url_rule("/echo", view_func=echo, methods=["POST", "PUT"])
    app.add_url_rule("/sums", view_func=sums, methods=["POST"])
    app.add_url_rule("/events", view_func=events)
    app.add_url_rule("/endless", view_func=endless)
    app.add_url_rule("/open", view_func=lambda: str(OPEN))
    app.add_url_rule("/files", view_func=tus_create, methods=["POST"])
    app.add_url_rule("/files/<name>", view_func=tus_file, methods=["HEAD", "PATCH", "DELETE"])
    return counted(app)


def xml_rpc() -> flask.Response:
    dispatcher = SimpleXMLRPCDispatcher(allow_none=True)
    dispatcher.register_introspection_functions()
    dispatcher.register_multicall_functions()
    dispatcher.register_function(lambda *numbers: sum(numbers), "add")
    dispatcher.register_function(lambda data: data, "same")
    answer = dispatcher._marshaled_dispatch(flask.request.stream.read())
    return flask.Response(answer, content_type="text/xml")


def echo() -> flask.Response:
    """Each line comes back as soon as it is there."""
    stream = flask.request.environ["wsgi.input"]
    return flask.Response(iter(stream.readline, b""), content_type="application/x-ndjson")


def sums() -> flask.Response:
    """For each line with a JSON array of numbers, a line with their sum and that of all so far."""
    stream = flask.request.environ["wsgi.input"]

    def line() -> bytes:
        found = bytearray()
        # Byte by byte: gunicorn's readline() may wait for what comes after the line.
        while (byte := stream.read(1)) not in (b"", b"\n"):
            found += byte
        return bytes(found)

    def answers() -> Iterator[str]:
        whole = 0
        while said := line():
            part = sum(json.loads(said))
            whole += part
            yield json.dumps({"sum": part, "all": whole}) + "\n"

    return flask.Response(answers(), content_type="application/x-ndjson")


EVENTS = 40


def events() -> flask.Response:
    """Events 1 to :data:`EVENTS`, after the one that the client has seen; every tenth breaks off the stream."""
    seen = int(flask.request.headers.get("Last-Event-ID", 0))

    def some() -> Iterator[str]:
        yield ": a comment\n\nretry: 10\n"
        for number in range(seen + 1, EVENTS + 1):
            yield f"id: {number}\nevent: tick\ndata: first of {number}\ndata: ä second\n\n"
            if number % 10 == 0:
                return

    return flask.Response(some(), content_type="text/event-stream; charset=utf-8")


def endless() -> flask.Response:
    """A body without end."""
    block = os.urandom(BLOCK)
    pause = float(flask.request.args.get("pause", 0))

    def blocks() -> Iterator[bytes]:
        while True:
            yield block
            time.sleep(pause)

    return flask.Response(blocks(), content_type="application/octet-stream")


_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
TUS = {"Tus-Resumable": "1.0.0", "Tus-Version": "1.0.0", "Tus-Extension": "creation,termination"}


def tus_create() -> flask.Response:
    """The extension "creation" of tus 1.0.0: https://tus.io/protocols/resumable-upload"""
    name = uuid.uuid4().hex
    (ROOT / "tus" / name).touch()
    (ROOT / "tus" / f"{name}.length").write_text(flask.request.headers["Upload-Length"])
    return flask.Response(
        status=201, headers={**TUS, "Location": flask.url_for("tus_file", name=name, _external=True)}
    )


def tus_file(name: str) -> flask.Response:
    """What arrived is kept, also of a request that breaks off; the client goes on from there."""
    path = ROOT / "tus" / name
    if not path.exists():
        return flask.Response(status=404, headers=TUS)
    length = int((ROOT / "tus" / f"{name}.length").read_text())
    if flask.request.method == "HEAD":
        stored = {"Upload-Offset": str(path.stat().st_size), "Upload-Length": str(length)}
        return flask.Response(status=200, headers={**TUS, **stored, "Cache-Control": "no-store"})
    if flask.request.method == "DELETE":
        path.unlink()
        return flask.Response(status=204, headers=TUS)
    lock = _locks[name]
    if not lock.acquire(blocking=False):
        return flask.Response(status=423, headers=TUS)  # what broke off is still being read
    with ExitStack() as stack:
        stack.callback(lock.release)
        file = stack.enter_context(path.open("ab", buffering=0))
        if int(flask.request.headers["Upload-Offset"]) != path.stat().st_size:
            return flask.Response(status=409, headers=TUS)
        shutil.copyfileobj(flask.request.stream, file, 16 * 1024)
    return flask.Response(status=204, headers={**TUS, "Upload-Offset": str(path.stat().st_size)})


# Socket.IO


def chat_app() -> WSGIApplication:
    import socketio

    server = socketio.Server(
        async_mode="threading", cors_allowed_origins="*", ping_interval=2, ping_timeout=5
    )

    def connect(sid: str, environ: WSGIEnvironment, auth: Any) -> None:
        server.save_session(sid, {"name": (auth or {}).get("name", "")})

    def say(sid: str, *said: Any) -> Any:
        with server.session(sid) as session:
            server.emit("said", (session["name"], *said), room="all")
        return len(said)

    def join(sid: str) -> str:
        server.enter_room(sid, "all")
        return "joined"

    def burst(sid: str, count: int) -> None:
        for number in range(count):
            server.emit("number", {"number": number, "data": "\xff" * 50}, to=sid)

    for handler in (connect, say, join, burst):
        server.on(handler.__name__, handler)
    app: WSGIApplication = socketio.WSGIApp(server, socketio_path="socket.io")
    return app


MOUNTS = {
    "/": "s3_app",
    "/git": "cgi",
    "/dulwich": "dulwich_app",
    "/hg": "hg_app",
    "/dav": "dav_app",
    "/index": "index_app",
    "/small": "small_app",
    "/chat": "chat_app",
}
"""Prefix -> the app, or what makes it."""


def prepare(root: Path) -> None:
    """Make the folders that the apps store things in."""
    for name in ("git", "hg", "dav", "packages", "tus"):
        (root / name).mkdir()


def __getattr__(name: str) -> WSGIApplication:
    """``s3``: what ``s3_app()`` makes, for a server that wants an attribute."""
    make = globals().get(f"{name}_app")
    if make is None:
        raise AttributeError(name)
    app: WSGIApplication = make()
    return app


def create_app() -> WSGIApplication:
    module = import_module(MODULE)
    apps = {prefix: getattr(module, app.removesuffix("_app")) for prefix, app in MOUNTS.items()}
    return DispatcherMiddleware(apps.pop("/"), apps)
