"""``flaskbus redis``: redis-cli for machines that have none."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, BinaryIO, cast

import click
import hiredis

from flaskbus import resp
from flaskbus.address import Node
from flaskbus.broker import Address, mask, one_server, parse_url, raw_connection
from flaskbus.cluster import key_of, slot_of
from flaskbus.cluster_client import cluster_map
from flaskbus.commands.tools import broker_errors, with_defaults
from flaskbus.errors import StartError
from flaskbus.options import FlaskbusCommand, settings_options
from flaskbus.settings import CommonSettings

ENDLESS = {"MONITOR", "SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE"}
CONNECT_TIMEOUT = 5.0


@click.command(
    "redis",
    cls=FlaskbusCommand,
    short_help="Ask the broker, as redis-cli does.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    examples="""
    flaskbus redis XINFO GROUPS 'flaskbus:{/myapp}:requests'
    flaskbus redis XPENDING 'flaskbus:{/myapp}:requests' agents
    flaskbus redis --decode XRANGE 'flaskbus:{/myapp}:requests' - + COUNT 3
    flaskbus redis
    """,
)
@settings_options(CommonSettings, only=("redis",))
@click.option(
    "--raw/--no-raw", default=None, help="Bare strings, a line each; the default if not on a terminal."
)
@click.option("--decode", is_flag=True, help="Show what flaskbus packed with msgpack as JSON.")
@click.argument("words", nargs=-1, metavar="[COMMAND [ARGUMENT]...]")
def redis_cli(settings: CommonSettings, raw: bool | None, decode: bool, words: tuple[str, ...]) -> int:
    """Ask the broker, as redis-cli does, for machines where that is not installed.

    Without COMMAND it prompts for commands; a redis-cli or valkey-cli on PATH does that better and is run in
    its place. Options come before the COMMAND. The exit code is 1 if the answer is an error.
    """
    url = with_defaults(settings).redis
    bare = not sys.stdout.isatty() if raw is None else raw
    if words:
        session = Session(url, bare=bare, decode=decode)
        with broker_errors(url):
            return session.run([os.fsencode(word) for word in words])
    program = shutil.which("redis-cli") or shutil.which("valkey-cli")
    if program and not decode and sys.stdin.isatty():
        with broker_errors(url):
            arguments, environ = delegation(one_server(url), raw, cluster=parse_url(url).kind == "cluster")
        os.execve(program, [program, *arguments], {**os.environ, **environ})  # noqa: S606
    with broker_errors(url):
        return prompt(Session(url, bare=bare, decode=decode), one_server(url))


def delegation(
    address: Address, raw: bool | None, *, cluster: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of a real redis-cli; the password is in the environment, where ps cannot see it."""
    arguments = ["-s", address.path] if address.path else ["-h", address.host, "-p", str(address.port)]
    arguments += ["-n", str(address.db)]
    if address.username:
        arguments += ["--user", address.username]
    if cluster:
        arguments.append("-c")
    if address.tls is not None:
        tls = address.tls
        arguments.append("--tls")
        for file, option in ((tls.ca_certs, "--cacert"), (tls.certfile, "--cert"), (tls.keyfile, "--key")):
            arguments += [option, file] if file else []
        if tls.verify == "none":
            arguments.append("--insecure")
    if raw is not None:
        arguments.append("--raw" if raw else "--no-raw")
    return arguments, {"REDISCLI_AUTH": address.password} if address.password else {}


class Session:
    """One connection, on which commands are sent and replies shown; opened on first use."""

    def __init__(self, url: str, *, bare: bool, decode: bool):
        self.url = url
        self._address = parse_url(url)
        self._asked: Node | None = None
        self._bare = bare
        self._decode = decode
        self._connection: Any = None
        self._stream: BinaryIO | None = None

    def run(self, words: Sequence[bytes]) -> int:
        """Send a command and show its reply; 1 for an error. Raises redis-py's connection errors, StartError."""
        self._open(self._node(words))
        reply = self._exchange(hiredis.pack_command(cast(Any, tuple(words))))
        self._show(reply)
        if words[0].decode("ascii", "replace").upper() in ENDLESS and not isinstance(reply, resp.Error):
            with suppress(KeyboardInterrupt):
                while True:
                    self._show(self._exchange(b""))
        return int(isinstance(reply, resp.Error))

    def _exchange(self, command: bytes) -> resp.Reply:
        try:
            self._connection._sock.sendall(command)
            return resp.read(cast(BinaryIO, self._stream))
        except (OSError, ValueError) as error:
            self.close()
            raise StartError(f"the connection to the broker at {mask(self.url)} broke: {error}") from None
        except KeyboardInterrupt:
            self.close()  # its answer would be taken for the next command's
            raise

    def _node(self, words: Sequence[bytes]) -> Node | None:
        """Of a cluster, who is to be asked: whoever has the key, or whoever was asked last."""
        if self._address.kind != "cluster":
            return None
        nodes = cluster_map(self._address)
        key = key_of(words)
        return self._asked or nodes.any() if key is None else nodes.owner(slot_of(key))

    def _open(self, node: Node | None) -> None:
        if node != self._asked:
            self.close()
        if self._stream is None:
            self._asked = node
            connection: Any = raw_connection(
                self._address, timeout=CONNECT_TIMEOUT, name="flaskbus-redis", node=node
            )
            connection.connect()
            # From here on the types of replies matter, which redis-py does not tell; and a command may block.
            connection._sock.settimeout(None)
            self._connection, self._stream = connection, connection._sock.makefile("rb")

    def _show(self, reply: resp.Reply) -> None:
        if self._bare:
            sys.stdout.buffer.write(resp.raw(reply, decode=self._decode) + b"\n")
            sys.stdout.flush()
        else:
            click.echo(resp.formatted(reply, decode=self._decode))

    def close(self) -> None:
        if self._connection is not None:
            cast(BinaryIO, self._stream).close()
            self._connection.disconnect()
            self._connection = self._stream = None


def prompt(session: Session, address: Address) -> int:
    """Read commands until the end of input, ``quit`` or ``exit``; the exit code of the last."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines and remembers them, once it is imported
    where = address.path or f"{address.host}:{address.port}"
    text = f"{where}{f'[{address.db}]' if address.db else ''}> " if sys.stdin.isatty() else ""
    code = 0
    while True:
        try:
            words = resp.split(input(text))
            if words and words[0].lower() in (b"quit", b"exit"):
                return code
            if words:
                with broker_errors(session.url):
                    code = session.run(words)
        except EOFError:
            return code
        except KeyboardInterrupt:
            click.echo()
        except ValueError:
            click.echo("Invalid argument(s)", err=True)
            code = 1
        except StartError as error:
            if not text:
                raise
            click.echo(f"(error) {error}", err=True)
