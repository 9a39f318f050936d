"""The link to a cluster: a connection to every primary, and each command to the one that serves its key.

Rules of this module:

* MOVED, ASK, TRYAGAIN and CLUSTERDOWN say that a command was not carried out: it is sent again, an XADD too. A
  connection that broke says nothing of the kind: :class:`LinkLost`, for what was sent to that node.
* What cannot be sent now waits, for :data:`~flaskbus.cluster.PATIENCE` at most, and then it was not sent.
* Commands for one key are carried out in the order in which they were given. So a slot that moved is sent to
  its new node only when the old one has answered all that it was sent.
* A node that answers says itself what it does not serve any more. What others say of it is taken where it does
  not.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from flaskbus.address import Address, Node, parse_url
from flaskbus.broker import mask, script_sha, script_source
from flaskbus.cluster import (
    PATIENCE,
    PAUSE,
    SLOTS,
    UNSETTLED,
    Redirect,
    Topology,
    key_of,
    parse_redirect,
    slot_of,
)
from flaskbus.errors import StartError
from flaskbus_gateway.answers import Answer, AnswerError, Command, LinkDown, Packed
from flaskbus_gateway.finding import ClusterNodes, finder_of
from flaskbus_gateway.link import Link, NodeLink, log

HOPS = 2
"""Redirections that are followed at once: to the new owner of a slot, and on to where it is moving its keys."""

LOOK_PAUSE = 0.2
"""Seconds between two looks at who serves what, while somebody does not answer or something has moved."""


def link_to(
    url: str,
    name: str,
    *,
    on_up: Callable[[], None] | None = None,
    on_down: Callable[[], None] | None = None,
) -> Link:
    """The link that the kind of this URL wants."""
    address = parse_url(url)
    if address.kind == "cluster":
        return ClusterLink(url, address, name, on_up=on_up, on_down=on_down)
    return NodeLink(url, address, finder_of(address), name, on_up=on_up, on_down=on_down)


class _Errand(asyncio.Future[Any]):
    """A command on its way, and the future of its answer. ``slot`` is None where any node can take it."""

    def __init__(self, command: Command | Packed, slot: int | None, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.command = command
        self.slot = slot
        self.deadline = 0.0
        """When it is given up (monotonic seconds); 0 as long as no node refused it, and it did not have to wait."""
        self.hops = 0
        """Redirections that were followed since it last waited."""


class _InCluster:
    """The place of one node, until the others say that it serves nothing any more."""

    is_master_doubtful = False

    def __init__(self, node: Node, look: Callable[[], Any], serves: Callable[[Node], bool]) -> None:
        self.node = node
        self._look = look
        self._serves = serves

    async def find(self) -> Node:
        return self.node

    async def left(self, node: Node) -> bool:
        await self._look()
        return not self._serves(node)

    def elsewhere(self, node: Node) -> bool:
        return False

    def doubt(self) -> None:
        pass


class ClusterLink:
    """A connection to each primary of a cluster, and the map that tells which is for what."""

    def __init__(
        self,
        url: str,
        address: Address,
        name: str,
        *,
        on_up: Callable[[], None] | None = None,
        on_down: Callable[[], None] | None = None,
    ) -> None:
        self.url = url
        self.address = address
        self.name = name
        self.on_up = on_up
        self.on_down = on_down
        self.up = asyncio.Event()
        self.refused: StartError | None = None
        self.loop = asyncio.get_running_loop()
        self._nodes = ClusterNodes(address)
        self._topology = Topology()
        self._reported: tuple[Node, ...] = ()
        """The primaries, as of the last look."""
        self._links: dict[Node, NodeLink] = {}
        self._parked: deque[_Errand] = deque()
        self._retry: asyncio.TimerHandle | None = None
        self._moving: dict[int, deque[_Errand]] = {}
        """What came for a slot since its node said that it moved, until that node has answered all it was sent."""
        self._doubt = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    # Life

    def start(self) -> None:
        self._keeper = self.loop.create_task(self._keep())

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._retry is not None:
            self._retry.cancel()
        await asyncio.gather(*(link.close() for link in self._links.values()), *self._closing)
        for errand in (*self._parked, *(one for queue in self._moving.values() for one in queue)):
            self._give_up(errand, "the link is closed")

    async def _keep(self) -> None:
        told = False
        while True:
            self._doubt.clear()
            try:
                await self._look()
            except LinkDown as error:
                if not told:
                    log.warning("broker %s cannot be used (%s); trying again", mask(self.url), error)
                    told = True
                await asyncio.sleep(LOOK_PAUSE)
                continue
            except StartError as error:
                self.refused = error
                await asyncio.sleep(1.0)
                continue
            told = False
            if self._all_up():
                self.refused = None
                await self._doubt.wait()
            await asyncio.sleep(LOOK_PAUSE)

    async def _look(self) -> None:
        """Learn who serves what, as far as those whom it concerns do not say it themselves."""
        reported = await self._nodes.look()
        self._reported = reported.primaries
        for slot in range(SLOTS):
            owner, said = self._topology.owner(slot), reported.owner(slot)
            if owner != said and said is not None and (owner is None or not self._answers(owner)):
                self._topology.moved(slot, said)
        serving = self._topology.primaries
        for node in serving:
            if node not in self._links:
                self._connect(node)
        for node in self._links.keys() - {*serving, *reported.primaries}:
            self._let_go(node)
        self._settle()

    def _answers(self, node: Node) -> bool:
        link = self._links.get(node)
        return link is not None and link.up.is_set()

    def _connect(self, node: Node) -> NodeLink:
        finder = _InCluster(node, self._look_quietly, lambda one: one in self._reported)
        link = self._links[node] = NodeLink(
            self.url, self.address, finder, self.name, on_up=self._settle, on_down=self._settle
        )
        link.called = f"{mask(self.url)} (its node {node[0]}:{node[1]})"
        link.on_error = lambda future, text: self._failed(link, future, text)
        link.start()
        return link

    async def _look_quietly(self) -> None:
        with contextlib.suppress(LinkDown, StartError):
            await self._look()

    def _let_go(self, node: Node) -> None:
        task = self.loop.create_task(self._links.pop(node).close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _all_up(self) -> bool:
        serving = self._topology.primaries
        return bool(serving) and all(map(self._answers, serving))

    @property
    def incarnation(self) -> str:
        """As the nodes say it; see :class:`~flaskbus_gateway.link.Link`."""
        return ",".join(sorted(self._links[node].incarnation for node in self._topology.primaries))

    def _settle(self) -> None:
        """A connection was made or lost, or something moved: is all of the cluster there?"""
        for link in self._links.values():
            if link.refused is not None:
                self.refused = link.refused
        up = self._all_up()
        if not up:
            self._doubt.set()
        if up == self.up.is_set():
            return
        if up:
            self.up.set()
            if self.on_up is not None:
                self.on_up()
        else:
            self.up.clear()
            if self.on_down is not None:
                self.on_down()

    # Commands

    def call(self, *command: str | bytes | int) -> asyncio.Future[Answer]:
        key = key_of(command)
        return self._give(command, None if key is None else slot_of(key))

    def send(self, key: str, packed: bytes) -> asyncio.Future[Answer]:
        return self._give(packed, slot_of(key))

    def tell(self, *command: str | bytes | int) -> None:
        self.call(*command).add_done_callback(_forgotten)

    def each(self) -> Sequence[Link]:
        return [self._links[node] for node in self._topology.primaries if node in self._links]

    async def script(self, name: str, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Answer:
        command = ("EVALSHA", script_sha(name), len(keys), *keys, *args)
        slot = slot_of(keys[0])
        try:
            return await self._give(command, slot)
        except AnswerError as error:
            if error.code != "NOSCRIPT":
                raise
        for link in self._links.values():  # it may be the next owner of the slot that does not know it
            link.tell("SCRIPT", "LOAD", script_source(name))
        return await self._give(command, slot)

    def _give(self, command: Command | Packed, slot: int | None) -> _Errand:
        errand = _Errand(command, slot, self.loop)
        if slot in self._moving:
            self._moving[slot].append(errand)
        else:
            self._dispatch(errand)
        return errand

    def _dispatch(self, errand: _Errand) -> None:
        node = self._nodes.nodes[0] if errand.slot is None else self._topology.owner(errand.slot)
        link = None if node is None else self._links.get(node)
        if link is None and errand.slot is None:
            link = next((one for one in self._links.values() if one.up.is_set()), None)
        if link is not None and link.up.is_set():
            link.post(errand, errand.command)
        else:
            self._park(errand)

    def _park(self, errand: _Errand) -> None:
        """It was not carried out: try again soon, for a bounded time."""
        now = self.loop.time()
        errand.deadline = errand.deadline or now + PATIENCE
        if now >= errand.deadline:
            self._give_up(errand, f"its slot has not been served for {PATIENCE:g} s")
            return
        self._doubt.set()
        self._parked.append(errand)
        if self._retry is None:
            self._retry = self.loop.call_later(PAUSE, self._again)

    def _again(self) -> None:
        self._retry = None
        parked, self._parked = self._parked, deque()
        for errand in parked:
            if not errand.done():
                errand.hops = 0
                self._dispatch(errand)

    def _give_up(self, errand: _Errand, why: str) -> None:
        if not errand.done():
            errand.set_exception(LinkDown(f"broker {mask(self.url)}: {why}"))
            errand.exception()  # a caller need not look

    # Answers that are errors

    def _failed(self, link: NodeLink, future: asyncio.Future[Answer], text: str) -> bool:
        """Whether the answer was a redirection or a delay, which is then seen to."""
        if not isinstance(future, _Errand):
            return False
        redirect = parse_redirect(text, link.node)
        if redirect is not None:
            self._redirect(link, future, redirect)
            return True
        if text.partition(" ")[0] in UNSETTLED:
            self._park(future)
            return True
        return False

    def _redirect(self, old: NodeLink, errand: _Errand, redirect: Redirect) -> None:
        link = self._links.get(redirect.node) or self._connect(redirect.node)
        if not redirect.ask:
            self._topology.moved(redirect.slot, redirect.node)
            self._doubt.set()
            if redirect.slot not in self._moving:
                self._moving[redirect.slot] = deque()
                # Its answer is the last of those that were asked before.
                old.call("PING").add_done_callback(lambda _: self._moved(redirect.slot))
            self._settle()
        errand.deadline = errand.deadline or self.loop.time() + PATIENCE
        errand.hops += 1
        if link.up.is_set() and errand.hops <= HOPS:
            link.post(errand, errand.command, asking=redirect.ask)
        else:  # also where nodes name each other
            self._park(errand)

    def _moved(self, slot: int) -> None:
        for errand in self._moving.pop(slot):
            self._dispatch(errand)


def _forgotten(future: asyncio.Future[Answer]) -> None:
    """Nobody wants to know."""
    if not future.cancelled():
        future.exception()
