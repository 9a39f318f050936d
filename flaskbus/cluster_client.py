"""A cluster for redis-py's commands: each goes to the node that serves its key.

Not redis-py's ``RedisCluster``, because a write whose answer is lost must not be sent again: its pipelines do
that whatever their ``retry`` is. docs/decisions/0013-clusters-by-hand.md has the rest of the reasons.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar, cast

import redis
from redis.client import Pipeline, PubSub
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from flaskbus.address import Address, Node
from flaskbus.cluster import PATIENCE, PAUSE, Topology, key_of, parse_slots, slot_of
from flaskbus.connections import LOOK, Misconfigured, Unavailable, listed, node_pool

T = TypeVar("T")

NOT_CARRIED_OUT = (AskError, TryAgainError, ClusterDownError)
"""Answers (MOVED is an ASK to redis-py) after which a command may be sent again, to whomever it is for."""


class NotSent(redis.exceptions.ConnectionError):
    """No connection could be made: the command was surely not carried out."""


class ClusterMap:
    """Which node serves what, as all threads of a process know it.

    Every method that gives a node looks first, where nothing is known or the last look is in doubt; it raises
    redis-py's ``ConnectionError`` where no node answers.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._topology = Topology()
        self._last: tuple[Node, ...] = ()
        """The node that answered the last look, or none where it is time for another."""
        self._lock = threading.Lock()

    def owner(self, slot: int) -> Node:
        """The primary of a slot."""
        self._settle()
        node = self._topology.owner(slot)
        if node is None:
            self.doubt()
            raise redis.exceptions.ConnectionError(f"no node of the cluster serves slot {slot} now")
        return node

    def any(self) -> Node:
        """A node that answered a short time ago."""
        return self._settle()

    def primaries(self) -> tuple[Node, ...]:
        self._settle()
        return self._topology.primaries

    def moved(self, slot: int, node: Node) -> None:
        self._topology.moved(slot, node)
        self.doubt()

    def doubt(self) -> None:
        """Look again before the next node is given: a slot moved, or a node did not answer."""
        self._last = ()

    def _settle(self) -> Node:
        last = self._last
        if last:
            return last[0]
        with self._lock:
            if not self._last:
                self._topology, node = self._look()
                self._last = (node,)
            return self._last[0]

    def _look(self) -> tuple[Topology, Node]:
        trouble, cause = "", None
        # The last ones that answered come first: a host that is gone costs its whole time.
        for node in dict.fromkeys((*self._topology.nodes, *self.address.nodes)):
            connection: Any = node_pool(self.address, node, LOOK, "").make_connection()
            try:
                connection.send_command("CLUSTER", "SLOTS")
                topology = parse_slots(connection.read_response(), node)
            except ResponseError as error:
                if "cluster support disabled" in str(error):
                    raise Misconfigured(not_a_cluster(node)) from None
                if isinstance(error, redis.exceptions.NoPermissionError):
                    raise
                trouble = str(error)
            except Unavailable as error:
                trouble, cause = trouble or str(error), error
                if isinstance(error, Misconfigured | redis.exceptions.AuthenticationError):
                    raise
            else:
                if topology.primaries:
                    return _first(topology, node), node
                trouble = f"{node[0]}:{node[1]} knows of no slots; is the cluster made (CLUSTER ADDSLOTS)?"
            finally:
                connection.disconnect()
        raise redis.exceptions.ConnectionError(
            f"no node of the cluster at {listed(self.address)} answers ({trouble.rstrip('.')})"
        ) from cause


def _first(topology: Topology, node: Node) -> Topology:
    topology.nodes = (node, *(other for other in topology.nodes if other != node))
    return topology


def not_a_cluster(node: Node) -> str:
    return (
        f"{node[0]}:{node[1]} is not in cluster mode; say redis:// (or rediss://) instead of redis+cluster://"
    )


cluster_map = cache(ClusterMap)
"""The map of a cluster, one for a process."""


def follow(
    nodes: ClusterMap,
    key: str | bytes | None,
    send: Callable[[Node, bool], T],
    teach: Callable[[Node], object] | None = None,
) -> T:
    """Send a command to the node of its key, and after redirections; ``send(node, asking)`` gives its answer.

    ``teach`` loads its script into a node that does not know it, which need not be the owner of the slot.

    It is sent again only where it was surely not carried out: after an answer that says so, for
    :data:`~flaskbus.cluster.PATIENCE` at most, or to the successor of a node that cannot be reached. What else goes
    wrong is :data:`~flaskbus.connections.Unavailable`.
    """
    slot = None if key is None else slot_of(key)
    deadline = time.monotonic() + PATIENCE
    ask: Node | None = None
    taught: set[Node] = set()
    trouble: ResponseError
    while True:
        node = ask or (nodes.any() if slot is None else nodes.owner(slot))
        try:
            return send(node, ask is not None)
        except NoScriptError:
            if teach is None or node in taught:
                raise
            teach(node)
            taught.add(node)
            continue
        except AskError as error:
            to = error.host or node[0], error.port
            if isinstance(error, MovedError):
                nodes.moved(error.slot_id, to)
            ask, trouble = (None if isinstance(error, MovedError) else to), error
            pause = 0.0
        except (TryAgainError, ClusterDownError) as error:
            nodes.doubt()
            ask, trouble, pause = None, error, PAUSE
        except Unavailable as error:
            nodes.doubt()
            if not isinstance(error, NotSent) or slot is None or nodes.owner(slot) == node:
                raise
            continue  # it has a successor
        if time.monotonic() > deadline:
            raise redis.exceptions.ConnectionError(
                f"the cluster has not settled within {PATIENCE:g} s: {trouble}"
            )
        time.sleep(pause)


class ClusterClient(redis.Redis):
    """A client whose commands go to the nodes of their keys; those without a key, to any node.

    What has to be asked of every node is asked through :meth:`each`.
    """

    def __init__(self, address: Address, timeout: float, name: str) -> None:
        self.map = cluster_map(address)
        self._timeout, self._name = timeout, name
        self._clients: dict[Node, redis.Redis] = {}
        # Every connection is made by the clients of the nodes; this pool serves only what redis-py asks it.
        super().__init__(connection_pool=node_pool(address, address.nodes[0], timeout, name))

    def at(self, node: Node) -> redis.Redis:
        """The client of one node."""
        client = self._clients.get(node)
        if client is None:
            pool = node_pool(self.map.address, node, self._timeout, self._name)
            client = self._clients.setdefault(node, redis.Redis.from_pool(pool))
        return client

    def each(self) -> Iterator[redis.Redis]:
        """A client for each primary."""
        for node in self.map.primaries():
            yield self.at(node)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        return follow(self.map, key_of(args), lambda node, asking: self._send(node, asking, args, options))

    def script(self, source: str, *evalsha: Any) -> Any:
        """EVALSHA; where a node does not know the script, its ``source`` is loaded first."""
        return follow(
            self.map,
            key_of(evalsha),
            lambda node, asking: self._send(node, asking, evalsha, {}),
            lambda node: self.at(node).script_load(source),
        )

    def _send(self, node: Node, asking: bool, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        client = self.at(node)
        pool = client.connection_pool
        try:
            pool.release(pool.get_connection())
        except Unavailable as error:
            raise NotSent(str(error)) from error
        if not asking:
            return client.execute_command(*args, **options)  # type: ignore[no-untyped-call]
        with client.pipeline(transaction=False) as pipe:
            pipe.execute_command("ASKING")  # type: ignore[no-untyped-call]
            pipe.execute_command(*args, **options)  # type: ignore[no-untyped-call]
            answer = pipe.execute(raise_on_error=False)[1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        """Commands for several nodes; a transaction is for keys of one slot."""
        return _ClusterPipeline(self, transaction)

    def pubsub(self, **options: Any) -> PubSub:
        """Hears what is published on any node."""
        return cast(PubSub, self.at(self.map.any()).pubsub(**options))  # type: ignore[no-untyped-call]

    def scan_iter(self, *args: Any, **options: Any) -> Iterator[Any]:
        for client in self.each():
            yield from client.scan_iter(*args, **options)

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        super().close()


class _ClusterPipeline(Pipeline):
    def __init__(self, client: ClusterClient, transaction: bool) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, transaction, None)
        self._client = client
        self._atomic = transaction

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Node by node; a connection that breaks raises, and nothing is sent again."""
        stack, client = self.command_stack, self._client
        self.reset()
        places: dict[Node, list[int]] = {}
        for place, (args, _) in enumerate(stack):
            key = key_of(args)
            node = client.map.any() if key is None else client.map.owner(slot_of(key))
            places.setdefault(node, []).append(place)
        if self._atomic and len(places) > 1:
            raise RedisError("a transaction is for keys of one slot")
        answers: list[Any] = [None] * len(stack)
        for node, mine in places.items():
            with client.at(node).pipeline(transaction=self._atomic) as pipe:
                for place in mine:
                    pipe.execute_command(*stack[place][0], **stack[place][1])  # type: ignore[no-untyped-call]
                try:
                    answered = pipe.execute(raise_on_error=False)
                except Unavailable:
                    client.map.doubt()
                    raise
            for place, answer in zip(mine, answered, strict=True):
                answers[place] = answer
        for place, (args, options) in enumerate(stack):
            if isinstance(answers[place], NOT_CARRIED_OUT) and not self._atomic:
                try:
                    answers[place] = client.execute_command(*args, **options)
                except ResponseError as error:
                    answers[place] = error
            if raise_on_error and isinstance(answers[place], Exception):
                raise answers[place]
        return answers
