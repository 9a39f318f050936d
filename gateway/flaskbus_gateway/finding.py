"""Where to connect: asked anew for every connection, because masters and nodes come and go.

A finder says where the broker is (:meth:`find`); whether it has left the place where an answer is overdue
(:meth:`left`), or is known to be elsewhere (:meth:`elsewhere`); and it is told when its word led nowhere
(:meth:`doubt`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Protocol

import hiredis

from flaskbus.address import Address, Node
from flaskbus.cluster import Topology, parse_slots
from flaskbus.cluster_client import not_a_cluster
from flaskbus.connections import (
    LOOK,
    is_no_sentinel,
    listed,
    no_sentinel,
    not_a_sentinel,
    tls_context,
    unknown_service,
)
from flaskbus.errors import StartError
from flaskbus_gateway.answers import Answer, AnswerError, Command, LinkDown


class Finder(Protocol):
    is_master_doubtful: bool
    """Whether a connection has to ask the server itself if it is the master."""

    async def find(self) -> Node: ...
    async def left(self, node: Node) -> bool: ...
    def elsewhere(self, node: Node) -> bool: ...
    def doubt(self) -> None: ...


class Fixed:
    """The URL says where."""

    is_master_doubtful = False

    def __init__(self, node: Node) -> None:
        self.node = node

    async def find(self) -> Node:
        return self.node

    async def left(self, node: Node) -> bool:
        return False

    def elsewhere(self, node: Node) -> bool:
        return False

    def doubt(self) -> None:
        pass


class Sentinels:
    """The sentinels know who is master."""

    is_master_doubtful = True

    def __init__(self, address: Address) -> None:
        self.address = address
        self._nodes = list(address.nodes)
        self._found: Node | None = None
        self._login = replace(address, username=address.sentinel_username, password=address.sentinel_password)

    async def find(self) -> Node:
        """Ask one after the other, first the one that knew it last time.

        Raises :class:`~flaskbus.errors.StartError` where all that answer do not know the service, are no sentinels,
        or refuse us, and :class:`LinkDown` where none answers.
        """
        answered, trouble, mistake = False, "", ""
        for node in tuple(self._nodes):
            try:
                master = await self._master(node)
            except (OSError, TimeoutError) as error:
                trouble = str(error) or type(error).__name__
            except AnswerError as error:
                if not is_no_sentinel(str(error)):
                    raise StartError(f"the sentinel {node[0]}:{node[1]} refuses us: {error}") from None
                mistake = not_a_sentinel(self.address, node)
            else:
                if master is not None:
                    self._found = master
                    return master
                answered = True
            self.doubt()
        if answered:
            raise StartError(unknown_service(self.address))
        if mistake:
            raise StartError(mistake)
        raise LinkDown(no_sentinel(self.address, trouble))

    async def left(self, node: Node) -> bool:
        """Whether any of them says that somebody else is master: they do not hear of it at the same time."""
        for sentinel in tuple(self._nodes):
            with contextlib.suppress(OSError, TimeoutError, AnswerError):
                if await self._master(sentinel) not in (None, node):
                    return True
            self.doubt()
        return False

    def elsewhere(self, node: Node) -> bool:
        """Whether another connection of this process was sent elsewhere last."""
        return self._found not in (None, node)

    async def _master(self, sentinel: Node) -> Node | None:
        command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.address.service)
        [master] = await ask(self._login, sentinel, command)
        return None if master is None else (master[0].decode(), int(master[1]))

    def doubt(self) -> None:
        self._nodes.append(self._nodes.pop(0))


class ClusterNodes:
    """Any node of a cluster: the one that answered when it was asked for all of them."""

    is_master_doubtful = False

    def __init__(self, address: Address) -> None:
        self.address = address
        self.nodes: list[Node] = list(address.nodes)

    async def look(self) -> Topology:
        """Which node serves what, as the first that answers has it; that one is asked first from now on.

        Raises :class:`~flaskbus.errors.StartError` for a broker that is no cluster, or refuses us, and
        :class:`LinkDown` where no node answers, or none serves anything.
        """
        trouble = ""
        for node in tuple(dict.fromkeys((*self.nodes, *self.address.nodes))):
            try:
                [slots] = await ask(self.address, node, ("CLUSTER", "SLOTS"))
            except (OSError, TimeoutError) as error:
                trouble = trouble or str(error) or type(error).__name__
            except AnswerError as error:
                if "cluster support disabled" in str(error):
                    raise StartError(not_a_cluster(node)) from None
                if error.code in ("NOAUTH", "WRONGPASS", "NOPERM", "ERR"):
                    raise StartError(f"the broker at {node[0]}:{node[1]} refuses us: {error}") from None
                trouble = str(error)
            else:
                topology = parse_slots(slots, node)
                self.nodes = [node, *(one for one in topology.nodes if one != node)]
                if topology.primaries:
                    return topology
                trouble = f"{node[0]}:{node[1]} knows of no slots; is the cluster made (CLUSTER ADDSLOTS)?"
        raise LinkDown(f"no node of the cluster at {listed(self.address)} answers ({trouble})")

    async def find(self) -> Node:
        await self.look()
        return self.nodes[0]

    async def left(self, node: Node) -> bool:
        """Any other is as good as one that does not answer."""
        return len(self.nodes) > 1

    def elsewhere(self, node: Node) -> bool:
        return False

    def doubt(self) -> None:
        self.nodes.append(self.nodes.pop(0))


_sentinels = cache(Sentinels)
"""One for all connections of a process, so that they agree."""


def finder_of(address: Address) -> Finder:
    """For a connection to the broker, whichever kind it is; of a cluster, any node."""
    if address.kind == "sentinel":
        return _sentinels(address)
    if address.kind == "cluster":
        return ClusterNodes(address)
    return Fixed(address.nodes[0])


async def ask(address: Address, node: Node, *commands: Command) -> Sequence[Answer]:
    """The answers to some commands, over a connection of their own.

    Raises :class:`OSError` or :class:`TimeoutError` where it is away, :class:`AnswerError`, and
    :class:`~flaskbus.errors.StartError` where TLS fails.
    """
    async with asyncio.timeout(LOOK):
        context = tls_context(address)
        reader, writer = await asyncio.open_connection(
            *node, ssl=context, ssl_handshake_timeout=LOOK if context else None
        )
        try:
            login = credentials(address)
            wanted = [("AUTH", *login), *commands] if login else list(commands)
            writer.write(b"".join(hiredis.pack_command(command) for command in wanted))
            answers: list[Answer] = []
            parser = hiredis.Reader(notEnoughData=...)
            while len(answers) < len(wanted):
                data = await reader.read(65536)
                if not data:
                    raise ConnectionResetError(f"{node[0]}:{node[1]} hung up")
                parser.feed(data)
                while (answer := parser.gets()) is not ...:
                    if isinstance(answer, hiredis.ReplyError):
                        raise AnswerError(str(answer))
                    answers.append(answer)
        except hiredis.ProtocolError as error:
            raise ConnectionResetError(f"{node[0]}:{node[1]} is no broker: {error}") from None
        except ssl.SSLError as error:
            raise ConnectionResetError(str(error)) from error
        finally:
            writer.close()
    return answers[1:] if login else answers


def credentials(address: Address) -> tuple[str, ...]:
    """The arguments of AUTH, or none."""
    if not address.password:
        return ()
    return (address.username, address.password) if address.username else (address.password,)
