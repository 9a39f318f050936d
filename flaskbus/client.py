"""A request straight through the bus, without a gateway: for tools, one at a time, synchronous.

What comes back is an :class:`~flaskbus.answer.Answer`.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import redis

from flaskbus import errors
from flaskbus.answer import Answer
from flaskbus.keys import Keys
from flaskbus.messages import Headers, Request
from flaskbus.registry import Registry
from flaskbus.routing import Mount, Table, split_target
from flaskbus.settings import CommonSettings
from flaskbus.signing import Seal

IDLE_TIMEOUT = 60.0
"""Seconds that a streamed reply may stay silent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """What a caller says of a request; ``target`` is in origin-form, ``timeout`` in seconds to the head.

    ``headers`` have names in lower case, and a Host that agrees with ``host``, by which it is routed.
    """

    method: str
    target: str
    host: str
    headers: Headers = ()
    body: bytes = field(default=b"", repr=False)
    scheme: str = "http"
    timeout: float = 30.0
    idle_timeout: float = IDLE_TIMEOUT


class BusClient:
    """Sends requests of its own over a redis-py client (see :func:`flaskbus.broker.connect`).

    ``seal_of(mount_key)`` gives what they are signed with, where their agents take signed ones only.
    """

    def __init__(
        self,
        client: redis.Redis,
        settings: CommonSettings,
        seal_of: Callable[[str], Seal | None] = lambda _: None,
    ) -> None:
        self.client = client
        self.settings = settings
        self.seal_of = seal_of
        self.keys = Keys(settings.namespace)
        self.registry = Registry(client, self.keys)
        self.process = f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(2)}"

    def send(self, outgoing: Outgoing) -> Answer:
        """Send a request and wait for the head of its reply.

        Raises :class:`~flaskbus.errors.BusError` where the bus ends it (a mount that is not known, the deadline
        …), and redis-py's errors where the broker is away before anything was sent.
        """
        mount = self._route(outgoing)
        request = Request(
            id=secrets.token_hex(10),
            method=outgoing.method,
            target=outgoing.target,
            gateway=self.process,
            ttl=int(outgoing.timeout * 1000),
            script_name=mount.script_name,
            scheme=outgoing.scheme,
            client=("127.0.0.1", 0),
            server=(socket.gethostname(), 443 if outgoing.scheme == "https" else 80),
            headers=outgoing.headers,
            body=outgoing.body,
        )
        answer = Answer(self, mount, request, outgoing.idle_timeout)
        try:
            answer.open(outgoing.timeout)
        except BaseException:
            answer.close()
            raise
        return answer

    def _route(self, outgoing: Outgoing) -> Mount:
        limit = self.settings.body_limit
        if len(outgoing.body) > limit:
            raise errors.BodyTooLarge(f"{len(outgoing.body)} bytes; at most {limit} are taken")
        path, _ = split_target(outgoing.target)
        known = [mount for mount in self.registry.mounts() if self.registry.owner(mount) is not None]
        whole = Table(known).match(outgoing.host, path)
        if whole is None:
            raise errors.UnknownMount(f"no app is mounted at {outgoing.host}{path}")
        queues = sorted(mount for mount in known if mount.whole == whole)
        ready = (
            mount for mount in queues if any(one.state == "ready" for one in self.registry.agents(mount))
        )
        return queues[0] if len(queues) == 1 else next(ready, queues[0])
