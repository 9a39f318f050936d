"""Flask-SocketIO in its threading mode."""

from __future__ import annotations

import threading

from flask import Flask
from flask_socketio import SocketIO, emit

app = Flask(__name__)
socketio = SocketIO(app, async_mode="threading", cors_allowed_origins="*")


@app.get("/plain")
def plain() -> str:
    return "plain"


@app.get("/open")
def count() -> str:
    """Whether a WebSocket's reading thread is there."""
    threads = [thread.name for thread in threading.enumerate() if "simple_websocket" in thread.name]
    return "busy" if threads else "idle"


@socketio.on("say")  # type: ignore[untyped-decorator]
def say(word: str) -> None:
    emit("said", word)
