"""The rules of a cluster: which slot a key is in, which node serves a slot, what a redirection says. Pure.

https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flaskbus.address import Node

SLOTS = 16384

PATIENCE = 5.0
"""Seconds that a command which was surely not carried out is tried again, while slots move and primaries change."""

PAUSE = 0.05
"""Seconds between two tries, where the cluster says only that it cannot now."""

UNSETTLED = frozenset({"TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "LOADING"})
"""Codes of answers that say: not carried out, try again soon."""

_KEYLESS = frozenset(
    {
        "ACL", "ASKING", "AUTH", "BGREWRITEAOF", "BGSAVE", "CLIENT", "CLUSTER", "COMMAND", "CONFIG", "DBSIZE",
        "ECHO", "EXEC", "FLUSHALL", "FLUSHDB", "HELLO", "INFO", "KEYS", "LASTSAVE", "LATENCY", "MONITOR", "MULTI",
        "PING", "PSUBSCRIBE", "PUBSUB", "RANDOMKEY", "READONLY", "READWRITE", "ROLE", "SAVE", "SCAN",
        "SCRIPT", "SELECT", "SHUTDOWN", "SLOWLOG", "SUBSCRIBE", "TIME", "WAIT",
    }
)  # fmt: skip
_KEY_AFTER_SUBCOMMAND = frozenset({"DEBUG", "MEMORY", "OBJECT", "XGROUP", "XINFO"})
_SCRIPTS = frozenset({"EVAL", "EVALSHA", "EVALSHA_RO", "EVAL_RO", "FCALL", "FCALL_RO"})
_STREAMS = frozenset({"XREAD", "XREADGROUP"})


def slot_of(key: str | bytes) -> int:
    """The slot of a key: CRC16 (XMODEM) of its hash tag, or of all of it."""
    data = key.encode() if isinstance(key, str) else key
    start = data.find(b"{")
    if start >= 0:
        end = data.find(b"}", start + 1)
        if end > start + 1:
            data = data[start + 1 : end]
    return crc_hqx(data, 0) % SLOTS


def key_of(command: Sequence[Any]) -> str | bytes | None:
    """The first key of a command, or ``None`` for one that any node can carry out.

    All keys of one of our commands share a slot, so the first stands for all. The channel of a PUBLISH, which any
    node takes, counts as one, so that it follows what was written to the keys of its mount. A name may have its
    subcommand in the same word, as redis-py has it: ``XINFO GROUPS``.
    """
    first = command[0]
    words = (first.decode() if isinstance(first, bytes) else str(first)).upper().split()
    name = words[0]
    at = 1
    if name in _KEYLESS:
        return None
    if name in _SCRIPTS:
        if len(command) < 3 or _upper(command[2]) in ("", "0"):
            return None
        at = 3
    elif name in _STREAMS:
        at = next((i for i, word in enumerate(command) if _upper(word) == "STREAMS"), len(command)) + 1
    elif name in _KEY_AFTER_SUBCOMMAND and len(words) == 1:
        at = 2
    if at >= len(command):
        return None
    key = command[at]
    return key if isinstance(key, (str, bytes)) else str(key)


def _upper(word: object) -> str:
    return (word.decode("latin-1") if isinstance(word, bytes) else str(word)).upper()


@dataclass(frozen=True, slots=True)
class Redirect:
    """Another node serves this slot: from now on, or for this command alone (``ask``, after ASKING)."""

    slot: int
    node: Node
    ask: bool


def parse_redirect(text: str, asked: Node) -> Redirect | None:
    """``MOVED 3999 host:port`` or ``ASK …`` -> where to go; ``None`` for any other answer.

    Without a host it is that of the node which was asked.
    """
    words = text.split(" ")
    if len(words) != 3 or words[0] not in ("MOVED", "ASK"):
        return None
    host, _, port = words[2].rpartition(":")
    if not (words[1].isdecimal() and port.isdecimal()):
        return None
    return Redirect(int(words[1]), (host or asked[0], int(port)), words[0] == "ASK")


class Topology:
    """Which node serves which slot, as far as we know."""

    __slots__ = ("_owners", "nodes")

    def __init__(self, ranges: Iterable[tuple[int, int, Node]] = (), replicas: Iterable[Node] = ()) -> None:
        self._owners: list[Node | None] = [None] * SLOTS
        nodes: dict[Node, None] = {}
        for start, end, node in ranges:
            self._owners[start : end + 1] = [node] * (end - start + 1)
            nodes[node] = None
        self.nodes: tuple[Node, ...] = tuple(nodes | dict.fromkeys(replicas))
        """All of them, primaries first."""

    def owner(self, slot: int) -> Node | None:
        """``None`` where nobody serves it, or we do not know who."""
        return self._owners[slot]

    def moved(self, slot: int, node: Node) -> None:
        self._owners[slot] = node
        if node not in self.nodes:
            self.nodes = (node, *self.nodes)

    @property
    def primaries(self) -> tuple[Node, ...]:
        """The nodes that serve a slot at all."""
        owners = dict.fromkeys(self._owners)
        return tuple(node for node in owners if node is not None)


def parse_slots(answer: Sequence[Any], asked: Node) -> Topology:
    """The answer to CLUSTER SLOTS, from the node ``asked``, whose host stands for a missing one."""
    ranges, replicas = [], []
    for start, end, primary, *others in answer:
        ranges.append((int(start), int(end), _parse_node(primary, asked)))
        replicas += [_parse_node(one, asked) for one in others]
    return Topology(ranges, replicas)


def _parse_node(fields: Sequence[Any], asked: Node) -> Node:
    host, port = fields[0], int(fields[1])
    name = host.decode() if isinstance(host, bytes) else host
    # A node that does not know its own address, or is told not to say it.
    return (asked[0] if name in (None, "", "?") else name), port
