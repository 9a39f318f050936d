"""The address that a gateway listens on, and its certificate: used, or refused with the reason in one line."""

from __future__ import annotations

import ctypes
import errno
import socket
import ssl
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from gunicorn import sock
from gunicorn.config import Config
from gunicorn.glogging import Logger

from flaskbus.errors import StartError, UsageError
from flaskbus.settings import GatewaySettings


def bind_address(settings: GatewaySettings) -> str:
    """``127.0.0.1:5000``, ``[::1]:5000`` or ``unix:/path``."""
    host = settings.host
    if host.startswith("unix:"):
        return host
    return f"[{host.strip('[]')}]:{settings.port}" if ":" in host else f"{host}:{settings.port}"


def listen(settings: GatewaySettings, cfg: Config, logger: Logger | None) -> sock.BaseSocket:
    """Bind and listen, once; raises :class:`~flaskbus.errors.StartError` with the reason."""
    host = settings.host
    if host.startswith("unix:"):
        return _listen_unix(host.removeprefix("unix:").removeprefix("//"), cfg, logger)
    kind: Any = sock.TCP6Socket if ":" in host else sock.TCPSocket
    try:
        listener: sock.BaseSocket = kind((host.strip("[]"), settings.port), cfg, logger)
    except socket.gaierror:
        raise StartError(f"cannot listen on {host}: the name is not known") from None
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror)
        raise StartError(f"cannot listen on {host} port {settings.port}: {reason}") from None
    return listener


_REASONS = {
    errno.EADDRINUSE: "another process listens there; stop it, or choose another --port",
    errno.EACCES: "not allowed; ports below 1024 need the right to bind them, so choose a higher --port",
    errno.EADDRNOTAVAIL: "this machine has no such address; 0.0.0.0 is all it has",
}


def _listen_unix(path: str, cfg: Config, logger: Logger | None) -> sock.BaseSocket:
    if _answers(path):
        raise StartError(f"another process listens on {path}: stop it, or choose another path")
    try:
        return sock.UnixSocket(path, cfg, logger)  # type: ignore[arg-type]
    except OSError as error:
        raise StartError(f"cannot listen on {path}: {error.strerror or error}") from None
    except ValueError:
        raise StartError(f"cannot listen on {path}: there is a file of that name, not a socket") from None


def _answers(path: str) -> bool:
    # gunicorn would take the path away from a server that is alive.
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def turn_away(listener: sock.BaseSocket) -> None:
    """Let the kernel begin no more connections, and end the handshakes that it has begun.

    Closing a listener resets who connected since its last accept(). Who is not heard at all asks again after a second
    (RFC 6298, section 2.1), and is then refused, or served by a successor. Nothing happens where the system cannot.
    """
    if sys.platform != "linux" or listener.sock.family == socket.AF_UNIX:
        return
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in _NO_SYN))
    with suppress(OSError):
        listener.sock.setsockopt(
            socket.SOL_SOCKET,
            _SO_ATTACH_FILTER,
            struct.pack("HP", len(_NO_SYN), ctypes.addressof(program)),
        )


_SO_ATTACH_FILTER = 26
_NO_SYN = (
    (0x30, 0, 0, 13),  # load the byte of the TCP header that has the flags
    (0x45, 0, 1, 0x02),  # is it a SYN?
    (0x06, 0, 0, 0),  # then drop it
    (0x06, 0, 0, 0xFFFFFFFF),
)
"""Berkeley Packet Filter (socket(7), linux/filter.h): code, where to go on if it holds and if not, operand."""


def url(listener: sock.BaseSocket, settings: GatewaySettings) -> str:
    """Where a listener can be reached, as a browser or a client wants it."""
    name = listener.getsockname()
    if not isinstance(name, tuple):
        return f"unix:{name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"{'https' if settings.certfile else 'http'}://{host}:{name[1]}"


def check_tls(settings: GatewaySettings) -> None:
    """Raises where the certificate or the key cannot be used, before anything is started with them."""
    if settings.http2 and not settings.certfile:
        raise UsageError("--http2 needs TLS: give --certfile (and --keyfile)")
    if settings.keyfile and not settings.certfile:
        raise UsageError("--keyfile needs --certfile")
    if not settings.certfile:
        return
    for path in filter(None, (settings.certfile, settings.keyfile)):
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise StartError(f"cannot read {path}: {error.strerror}") from None
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.certfile, settings.keyfile or None)
    except ssl.SSLError as error:
        reason = "they do not belong together" if "MISMATCH" in (error.reason or "") else "no valid PEM"
        files = " and ".join(filter(None, (settings.certfile, settings.keyfile)))
        raise StartError(f"cannot use {files} for TLS: {reason}") from None
