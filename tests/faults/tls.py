"""TLS in front of servers that have none of their own: certificates, and a front that takes them off."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificates:
    """PEM files of a CA, of a server on the loopback address, and of a client."""

    ca: str
    client: str
    server: str
    authority: trustme.CA

    @classmethod
    def make(cls, directory: Path) -> Certificates:
        authority = trustme.CA()
        server = authority.issue_cert("127.0.0.1", "localhost")
        client = authority.issue_cert("agent@example.com")
        authority.cert_pem.write_to_path(str(directory / "ca.pem"))
        client.private_key_and_cert_chain_pem.write_to_path(str(directory / "client.pem"))
        server.private_key_and_cert_chain_pem.write_to_path(str(directory / "server.pem"))
        ca, client_file, server_file = (str(directory / f"{name}.pem") for name in ("ca", "client", "server"))
        return cls(ca, client_file, server_file, authority)

    def context(self, name: str = "127.0.0.1", *, clients: bool = False) -> ssl.SSLContext:
        """A server's, for this name; with ``clients`` it wants a certificate of those too."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(name).configure_cert(context)
        if clients:
            context.verify_mode = ssl.CERT_REQUIRED
            self.authority.configure_trust(context)
        return context


class Front:
    """Takes TLS off and passes on to a port; what begins without TLS is passed on as it is where ``both`` is set."""

    def __init__(self, port: int, context: ssl.SSLContext, *, both: bool = False, listen: int = 0) -> None:
        self._target, self._context, self._both = port, context, both
        self._listener = socket.create_server(("127.0.0.1", listen), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for sock in tuple(self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client:
            self._open.add(client)
            try:
                if not self._both or client.recv(1, socket.MSG_PEEK) == b"\x16":
                    client = self._context.wrap_socket(client, server_side=True)
                with client, socket.create_connection(("127.0.0.1", self._target)) as server:
                    self._open.add(client)
                    relay(client, server)
            finally:
                self._open.discard(client)


def relay(client: socket.socket, server: socket.socket) -> None:
    """Bytes both ways until one side is done."""
    while True:
        pending = isinstance(client, ssl.SSLSocket) and client.pending()
        ready = [client] if pending else select.select([client, server], [], [])[0]
        for source in ready:
            data = source.recv(65536)
            if not data:
                return
            (server if source is client else client).sendall(data)
