"""gunicorn's ASGI worker with :class:`~flaskbus_gateway.connection.Connection` s.

At shutdown the listeners close first; WebSockets (1001) are closed at once, connections that are idle, silent or
lingering as soon as they have been so for a second, running ones when their response is out. Shortly before
``graceful_timeout`` is over, event streams are ended at the next boundary of an event; whatever is left after
it is cut off.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from gunicorn import sock
from gunicorn.arbiter import Arbiter
from gunicorn.asgi.lifespan import LifespanManager
from gunicorn.workers.gasgi import ASGIWorker

from flaskbus.forking import release_signals
from flaskbus_gateway.connection import LINGER, Connection
from flaskbus_gateway.deadlines import Deadlines

if TYPE_CHECKING:
    from flaskbus.settings import GatewaySettings

TICK = 1.0
"""Seconds between two looks at the deadlines, and two heartbeats to the arbiter."""

ENDING = 2.0
"""Seconds at the end of ``graceful_timeout`` in which event streams end; half of it, if that is less."""

SETTLE = 3.0
"""Seconds that the app has at the very end, after its connections were cut off."""


log = logging.getLogger("flaskbus.gateway")


class Worker(ASGIWorker):
    """A process that serves.

    Its application has ``settings``, a :class:`~flaskbus.settings.GatewaySettings`. The ASGI app must support
    lifespan: where its startup fails, the whole server ends with exit code 3.
    """

    loop: asyncio.AbstractEventLoop
    _quick_shutdown: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings: GatewaySettings = self.app.settings  # type: ignore[attr-defined]
        self.connections: set[Connection] = set()
        self.heading = Deadlines[Connection](self.settings.header_timeout)
        self.idle = Deadlines[Connection](self.settings.keepalive)
        self.stalled = Deadlines[Connection](self.settings.idle_timeout)
        self.lingering = Deadlines[Connection](LINGER)
        self.silent = Deadlines[Connection](self.settings.websocket_ping)
        self.deadlines = (self.heading, self.idle, self.stalled, self.lingering, self.silent)
        self.stopping = False
        """Whether clients are told to close. gunicorn's ``alive`` stays true meanwhile: without it a connection is
        closed under a client that was not told, and may have sent its next request."""
        self._news = asyncio.Event()
        self._beginning: set[asyncio.Task[Any]] = set()

    def init_signals(self) -> None:
        super().init_signals()
        release_signals()

    def handle_exit_signal(self) -> None:
        self.stopping = True
        self._news.set()

    def handle_quit_signal(self) -> None:
        super().handle_quit_signal()
        self.stopping = True
        self._news.set()

    def forget(self, connection: Connection) -> None:
        """The connection is lost and its app has ended."""
        self.connections.discard(connection)
        if self.stopping:
            self._news.set()

    async def _serve(self) -> None:
        tls = sock.ssl_context(self.cfg) if self.cfg.is_ssl else None
        self.lifespan = LifespanManager(self.asgi, self.log, self.state)
        try:
            await self.lifespan.startup()
        except RuntimeError as error:
            self._fail(str(error).removeprefix("Lifespan startup failed: "))
        # What is there now stays: the collector need not walk it again and again.
        gc.collect()
        gc.freeze()
        self._tls: dict[str, Any] = {
            "ssl": tls,
            "ssl_handshake_timeout": self.settings.header_timeout if tls else None,
            "ssl_shutdown_timeout": LINGER if tls else None,
        }
        for listener in self._listening():
            # A loop listens again, by itself with 100: in a rush the others would wait for their next try.
            server = await self.loop.create_server(
                lambda: Connection(self), sock=listener, backlog=self.cfg.backlog, **self._tls
            )
            self.servers.append(server)
        spans = (self.heading.span, self.idle.span, self.silent.span)
        tick = min(TICK, *(span / 2 for span in spans if span))
        while not self.stopping and self.ppid == os.getppid():
            await self._tick(tick)
        self.stopping = True
        await self._shutdown()

    def _listening(self) -> list[socket.socket]:
        return [listener.sock for listener in self.sockets]  # type: ignore[attr-defined]

    def _accept_last(self) -> None:
        """Take the connections that the kernel has accepted already: closing the socket would reset them."""
        for listener in self._listening():
            with suppress(OSError):  # until there is none left
                while True:
                    client, _ = listener.accept()
                    self._begin(client)

    def _begin(self, client: socket.socket) -> None:
        client.setblocking(False)
        task = self.loop.create_task(
            self.loop.connect_accepted_socket(lambda: Connection(self), client, **self._tls)
        )
        self._beginning.add(task)
        task.add_done_callback(self._begun)

    def _begun(self, task: asyncio.Task[Any]) -> None:
        self._beginning.discard(task)
        if not task.cancelled():
            task.exception()  # such as a client that left in the middle of its TLS handshake

    def _fail(self, reason: str) -> NoReturn:
        self.log.error("could not start: %s", reason)
        raise SystemExit(Arbiter.WORKER_BOOT_ERROR)

    async def _tick(self, seconds: float) -> None:
        """A heartbeat, a look at the deadlines, and a sleep until there is news or the time is over."""
        self.notify()
        now = self.loop.time()
        for connection in self.heading.take_due(now):
            connection.header_overdue()
        for connection in self.idle.take_due(now):
            connection.idle_overdue()
        for connection in self.stalled.take_due(now):
            connection.stalled_overdue()
        for connection in self.lingering.take_due(now):
            connection.transport.close()
        for connection in self.silent.take_due(now):
            connection.silence_overdue()
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
        except TimeoutError:
            return
        self._news.clear()

    async def _shutdown(self) -> None:
        self._accept_last()
        for server in self.servers:
            server.close()
        # What was accepted just now becomes a connection in the loop's next rounds.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if self._beginning:
            await asyncio.wait(self._beginning, timeout=LINGER)
        # A client that uses its connection all the time has its next request on the way already: it is
        # answered, with "Connection: close".
        for deadlines in (self.heading, self.idle, self.lingering):
            deadlines.span = min(deadlines.span, LINGER)
        grace = self.settings.graceful_timeout
        ending = min(ENDING, grace / 2)
        if self.connections and not self._quick_shutdown:
            log.info(
                "%d connections are open; waiting up to %g s for what runs", len(self.connections), grace
            )
        await self._drain(grace - ending)
        if self.connections and not self._quick_shutdown:
            self._end_streams()
            for connection in self.connections:
                connection.refuse_streams()
            await self._drain(ending)
        if self.connections:
            if not self._quick_shutdown:
                self.log.warning(
                    "cut off %d connections that did not end in %g s",
                    len(self.connections),
                    self.settings.graceful_timeout,
                )
            self.alive = False
            for connection in self.connections:
                connection.transport.abort()
            # The app hears of the disconnects, and has this time for what it must put in order.
            await self._drain(SETTLE, patient=True)
        assert self.lifespan is not None
        await self.lifespan.shutdown()

    def _end_streams(self) -> None:
        # The supervisor does not import the app, so that new workers run new code.
        from flaskbus_gateway.app import END_STREAMS

        self.state.get(END_STREAMS, lambda: None)()

    async def _drain(self, seconds: float, *, patient: bool = False) -> None:
        """Until every connection is gone; a quick shutdown ends it too, unless it is ``patient``."""
        end = self.loop.time() + seconds
        while (
            self.connections
            and (patient or not self._quick_shutdown)
            and (left := end - self.loop.time()) > 0
        ):
            for connection in tuple(self.connections):
                connection.wind_down()
            await self._tick(min(left, 0.1))
