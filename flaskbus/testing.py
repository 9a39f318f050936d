"""Test an app as its users will meet it: through a real gateway, a real broker and an agent.

A pytest plugin, loaded by pytest wherever flaskbus is installed (and so it imports nothing until it is used)::

    def test_cart(flaskbus_mount):
        url = flaskbus_mount(app, prefix="/shop")
        assert httpx.get(f"{url}/cart").status_code == 200

The broker is an embedded one of the session's own, and nothing has to be installed or running.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from flaskbus.routing import Mount

__all__ = ["Bus", "flaskbus_bus", "flaskbus_mount", "running_bus"]

START_TIMEOUT = 15.0
"""Seconds that the gateway may take to answer its first request."""


class Bus:
    """A running gateway and the broker behind it.

    ``url`` is where the gateway listens, without a final slash; ``broker_url`` is for redis-cli and the like.
    """

    def __init__(self, url: str, broker_url: str) -> None:
        self.url = url
        self.broker_url = broker_url

    @contextmanager
    def mount(
        self, app: WSGIApplication, prefix: str = "/", *, host: str = "", name: str = "", **settings: Any
    ) -> Iterator[str]:
        """Serve an app from threads of this process; gives its URL, and unmounts it at the end.

        ``settings`` are fields of :class:`~flaskbus.settings.AgentSettings`, such as ``threads``.
        """
        from flaskbus.broker import connect
        from flaskbus.keys import Keys
        from flaskbus.partitions import partitions
        from flaskbus.registry import Registry
        from flaskbus.routing import Mount
        from flaskbus.settings import AgentSettings
        from flaskbus_agent.inprocess import InProcessAgent

        mount = Mount.parse(prefix, host)
        agent_settings = AgentSettings(redis=self.broker_url, **settings)
        parts = partitions(mount, agent_settings.partitions)
        agent = InProcessAgent(
            agent_settings,
            dict.fromkeys(parts, app),
            dict.fromkeys(parts, name or f"test-{id(app):x}"),
        )
        agent.start()
        try:
            for part in parts:
                self.await_route(part)
            yield self.url + mount.script_name
        finally:
            agent.stop(10.0)
            with connect(self.broker_url) as client:
                for part in parts:
                    Registry(client, Keys()).unmount(part)

    def await_route(self, mount: Mount) -> None:
        """Wait until every gateway routes to a mount that an agent has claimed.

        Until then its requests go to the app on ``/``, if there is one. Raises
        :class:`~flaskbus.errors.StartError` after some seconds.
        """
        from flaskbus.broker import connect
        from flaskbus.errors import StartError
        from flaskbus.keys import Keys
        from flaskbus.registry import Registry

        deadline = time.monotonic() + START_TIMEOUT
        with connect(self.broker_url) as client:
            registry = Registry(client, Keys())
            while not (
                (gateways := registry.gateways().values())
                and all(mount.key in gateway.get("mounts", ()) for gateway in gateways)
            ):
                if time.monotonic() > deadline:
                    raise StartError(f"the gateway at {self.url} does not route to {mount.name}")
                time.sleep(0.01)


@contextmanager
def running_bus(broker_url: str, **settings: Any) -> Iterator[Bus]:
    """A gateway process in front of a broker that runs already.

    ``settings`` are fields of :class:`~flaskbus.settings.GatewaySettings`; the others have their defaults,
    whatever the environment and the configuration file of the tested project say. Raises
    :class:`~flaskbus.errors.StartError` with the gateway's own words where it does not start.
    """
    from flaskbus.config import CONFIG_VARIABLE
    from flaskbus.embedded import free_port
    from flaskbus.errors import StartError

    port = settings.pop("port", None) or free_port()
    variables = {name: value for name, value in os.environ.items() if not name.startswith("FLASKBUS_")}
    variables |= {f"FLASKBUS_{name.upper()}": str(value) for name, value in settings.items()}
    # With an empty file none is looked for in the current directory.
    variables |= {CONFIG_VARIABLE: os.devnull, "FLASKBUS_REDIS_URL": broker_url}
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "flaskbus_gateway", f"--port={port}"],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[str] = []
    listener = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
    listener.start()
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                listener.join(5.0)
                raise StartError(f"the gateway did not start: {''.join(said).strip()}")
            time.sleep(0.02)
        yield Bus(f"http://127.0.0.1:{port}", broker_url)
    finally:
        process.terminate()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        listener.join(5.0)
        if process.stdout is not None:
            process.stdout.close()


def _answers(port: int) -> bool:
    """Whether there is an answer to HTTP, whatever it is."""
    try:
        with socket.create_connection(("127.0.0.1", port), 1.0) as sock:
            sock.sendall(b"GET http://[ HTTP/1.0\r\n\r\n")
            return sock.recv(1) != b""
    except OSError:
        return False


@pytest.fixture(scope="session")
def flaskbus_bus() -> Iterator[Bus]:
    """A gateway and an embedded broker for the session."""
    from flaskbus import embedded

    with embedded.start() as broker, running_bus(broker.url) as bus:
        yield bus


@pytest.fixture
def flaskbus_mount(flaskbus_bus: Bus) -> Iterator[Callable[..., str]]:
    """``flaskbus_mount(app, prefix="/", host="", **settings) -> url``; everything is unmounted after the test."""
    with ExitStack() as stack:

        def mount(app: WSGIApplication, prefix: str = "/", **settings: Any) -> str:
            return stack.enter_context(flaskbus_bus.mount(app, prefix, **settings))

        yield mount
