"""WebSockets by unmodified flask-sock, and by bare hands; what the apps heard goes to a file for the tests."""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha1
from pathlib import Path
from typing import Any, TypeVar

from flask import Flask, request
from flask_sock import Sock
from simple_websocket import ConnectionClosed

Handler = TypeVar("Handler", bound=Callable[..., None])

app = Flask(__name__)
app.config["SOCK_SERVER_OPTIONS"] = {
    "subprotocols": ["chat", "soap"],
    "ping_interval": float(os.environ.get("PING_INTERVAL", 0)) or None,
}
sock = Sock(app)
route: Callable[[str], Callable[[Handler], Handler]] = sock.route

GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def note(token: str, **facts: Any) -> None:
    """Append to what is known of a connection; one line, one write."""
    line = json.dumps({"token": token, "pid": os.getpid(), "at": time.time(), **facts}) + "\n"
    with Path(os.environ["LEDGER"]).open("ab", buffering=0) as ledger:
        ledger.write(line.encode())


@app.get("/plain")
def plain() -> str:
    return f"plain {os.getpid()}"


@route("/echo")
def echo(ws: Any) -> None:
    while True:
        ws.send(ws.receive())


@route("/listen/<token>")
def listen(ws: Any, token: str) -> None:
    """Notes how it ends."""
    note(token, event="open", subprotocol=ws.subprotocol)
    try:
        while (message := ws.receive()) is not None:
            note(token, event="message", size=len(message))
            ws.send(message)
    except ConnectionClosed as closed:
        note(token, event="closed", code=closed.reason, reason=closed.message)


@route("/close/<int:code>")
def close(ws: Any, code: int) -> None:
    ws.receive()
    ws.close(code, request.args.get("reason"))


@route("/send/<int:count>/<int:size>/<token>")
def send(ws: Any, count: int, size: int, token: str) -> None:
    """Sends as fast as it may, and notes how far it is."""
    for number in range(count):
        ws.send(b"x" * size)
        note(token, sent=number + 1)
    ws.receive()


@route("/at-once")
def at_once(ws: Any) -> None:
    """Sends something, and is over."""
    ws.send("hello")
    ws.send("goodbye")


@route("/raises")
def raises(ws: Any) -> None:
    ws.receive()
    raise ValueError("after the handshake")


@app.get("/raises-before", websocket=True)
def raises_before() -> str:
    raise ValueError("before the handshake")


@app.get("/refuses", websocket=True)
def refuses() -> tuple[str, int, dict[str, str]]:
    return "not for you", 403, {"X-Why": "because"}


@app.get("/streams", websocket=True)
def streams() -> Any:
    """A stream for who wanted a WebSocket."""
    return iter(["one ", "two ", "three"])


@route("/die")
def die(ws: Any) -> None:
    ws.receive()
    os._exit(9)


@route("/deaf/<token>")
def deaf(ws: Any, token: str) -> None:
    """Does not hear that the agent stops."""
    note(token, event="open")
    while True:
        time.sleep(0.05)


def accept() -> socket.socket:
    """The server's side of the handshake, by hand."""
    ours: socket.socket = request.environ["werkzeug.socket"]
    digest = sha1((request.headers["Sec-WebSocket-Key"] + GUID).encode()).digest()
    ours.sendall(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nX-Made: by hand\r\n"
        b"Sec-WebSocket-Accept: " + b64encode(digest) + b"\r\n\r\n"
    )
    return ours


@app.get("/bytes/<token>", websocket=True)
def write_bytes(token: str) -> str:
    """Takes the handshake, writes the bytes of the query, and notes all that comes back."""
    ours = accept()
    ours.sendall(bytes.fromhex(request.args["hex"]))
    heard = b""
    while data := ours.recv(65536):
        heard += data
    note(token, heard=heard.hex())
    return ""


@app.get("/garbage", websocket=True)
def garbage() -> str:
    request.environ["werkzeug.socket"].sendall(b"this is no handshake\r\n\r\n")
    return "and this is nobody's"


gates: dict[str, threading.Event] = {}


@app.get("/unread/<token>", websocket=True)
def unread(token: str) -> str:
    """Reads nothing, before it is told to; then all that there is, and notes how much."""
    ours = accept()
    note(token, event="open")
    ours.settimeout(None)
    gate = gates.setdefault(token, threading.Event())
    while not gate.wait(0.05):
        # An end is seen without reading what came before it.
        if select_hang_up(ours):
            note(token, event="hung up")
            return ""
    size = 0
    ours.settimeout(1.0)
    try:
        while data := ours.recv(1 << 20):
            size += len(data)
    except TimeoutError:
        pass
    note(token, read=size)
    return ""


@app.get("/sips/<int:size>/<token>", websocket=True)
def sips(size: int, token: str) -> str:
    """Reads so many bytes, with little pauses, and notes how long that took."""
    ours = accept()
    began, read = time.monotonic(), 0
    while read < size:
        read += len(ours.recv(65536))
        time.sleep(0.002)
    note(token, seconds=time.monotonic() - began)
    return ""


def select_hang_up(ours: socket.socket) -> bool:
    poll = select.poll()
    poll.register(ours, 0)  # POLLHUP is always told
    return bool(poll.poll(0))


@app.post("/gate/<token>")
def gate(token: str) -> str:
    gates.setdefault(token, threading.Event()).set()
    return "open"


@app.get("/small", websocket=True)
def small() -> str:
    """20,000 messages of one byte."""
    ours = accept()
    ours.sendall(bytes.fromhex("82012e") * 20_000)
    ours.recv(1)
    return ""


@app.get("/large/<int:size>/<int:parts>", websocket=True)
def large(size: int, parts: int) -> str:
    """One message in some frames."""
    ours = accept()
    for number in range(parts):
        begin, end = size * number // parts, size * (number + 1) // parts
        first = (0x80 if number == parts - 1 else 0) | (0 if number else 2)
        ours.sendall(bytes([first, 127]) + (end - begin).to_bytes(8, "big") + b"x" * (end - begin))
    ours.recv(1)
    return ""


@route("/ticks/<int:count>/<int:size>/<token>")
def ticks(ws: Any, count: int, size: int, token: str) -> None:
    """Waits for a file of this name beside the ledger; then a message every 20 ms."""
    note(token, event="open")
    start = Path(os.environ["LEDGER"]).with_name(token)
    while not start.exists():
        time.sleep(0.02)
    for number in range(count):
        ws.send(f"{number}".encode().ljust(size, b" "))
        time.sleep(0.02)
    ws.receive()


@app.get("/drip")
def drip() -> Any:
    def drops() -> Any:
        while True:
            yield "drop"
            time.sleep(0.5)

    return drops()
