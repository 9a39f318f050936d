"""Every Redis key and channel, and how long each lives.

All keys of one mount carry the same hash tag, so that they lie in one slot of a cluster and one script
can change them. Keys are built from registered mounts and from ids of our own making, never from a
client's bytes.

====================================  ========  ==============================================
key (namespace ``flaskbus``)          type      life span
====================================  ========  ==============================================
``flaskbus:mounts``                   set       as long as a mount is known
``flaskbus:gateways``                 hash      a field per gateway process, removed with it
``flaskbus:{/myapp}:mount``           hash      ``mount_ttl`` past the last agent's heartbeat
``flaskbus:{/myapp}:agents``          hash      a field per agent process, removed with it
``flaskbus:{/myapp}:requests``        stream    as long as the mount is known; entries until answered
``flaskbus:{/myapp}:dead``            stream    ``DEAD_TTL_MS`` past its last entry, bounded
``flaskbus:{/myapp}:reply:<id>``      list      ``LIST_TTL_MS`` past its last frame
``flaskbus:{/myapp}:inbound:<id>``    list      ``LIST_TTL_MS`` past its last frame
``flaskbus:{/myapp}:idempotent:<h>``  hash      ``idempotency_ttl``, and while it runs at least ``LIST_TTL_MS``
====================================  ========  ==============================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from flaskbus.errors import UsageError

GROUP = "agents"
"""The consumer group of every request stream."""

LIST_TTL_MS = 2 * 3600 * 1000
"""Life of a reply or inbound list, renewed by each push. It only removes what a crash left behind, and is
longer than an hour so that a clock that jumps by an hour removes nothing early."""

DEAD_TTL_MS = 7 * 24 * 3600 * 1000
"""Life of a dead letter."""

DEAD_KEPT = 1000
"""How many dead letters of a mount are kept, about."""

DEAD_FIELD = 4096
"""How many bytes a dead letter keeps of each field of an entry that cannot be read."""

PERSISTENT = ("mounts", "gateways", ":mount", ":agents", ":requests")
"""How the names of the keys that may be without a TTL end; whatever else has none is a leak."""

_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class MountKeys:
    """The keys of one mount; ``mount`` is its canonical key name (see :mod:`flaskbus.routing`)."""

    mount: str
    prefix: str
    requests: str
    agents: str
    owner: str
    dead: str

    def reply(self, request_id: str) -> str:
        return f"{self.prefix}reply:{request_id}"

    def inbound(self, request_id: str) -> str:
        return f"{self.prefix}inbound:{request_id}"

    def idempotent(self, record: str) -> str:
        """The record of a request with an Idempotency-Key; ``record`` is a hash (see :mod:`flaskbus.idempotency`)."""
        return f"{self.prefix}idempotent:{record}"

    def doorbell(self, process: str) -> str:
        """The channel on which a gateway or agent process hears what is new for this mount."""
        return f"{self.prefix}doorbell:{process}"


class Keys:
    """The keys of one namespace.

    Raises :class:`~flaskbus.errors.UsageError` for a namespace that could be read as a pattern or hash tag.
    """

    __slots__ = ("_mounts", "gateways", "mounts", "namespace", "news")

    def __init__(self, namespace: str = "flaskbus"):
        if not _NAMESPACE.fullmatch(namespace):
            raise UsageError(
                f"namespace {namespace!r} is not usable: up to 64 letters, digits, '.', '_' and '-'"
            )
        self.namespace = namespace
        self.mounts = f"{namespace}:mounts"
        self.gateways = f"{namespace}:gateways"
        self.news = f"{namespace}:news"
        self._mounts: dict[str, MountKeys] = {}

    def of(self, mount: str) -> MountKeys:
        """The keys of a mount, by its canonical key name."""
        keys = self._mounts.get(mount)
        if keys is None:
            prefix = f"{self.namespace}:{{{mount}}}:"
            keys = self._mounts[mount] = MountKeys(
                mount=mount,
                prefix=prefix,
                requests=prefix + "requests",
                agents=prefix + "agents",
                owner=prefix + "mount",
                dead=prefix + "dead",
            )
        return keys

    def replies_of(self, stem: str) -> str:
        """The pattern of all reply lists, of any mount, whose ids begin with ``stem``, which is hexadecimal."""
        return f"{self.namespace}:{{*}}:reply:{stem}*"

    def inbound_of(self, stem: str) -> str:
        """The same of all inbound lists."""
        return f"{self.namespace}:{{*}}:inbound:{stem}*"

    def may_persist(self, key: str) -> bool:
        """Whether a key may be without a TTL."""
        return key.startswith(self.namespace + ":") and key.endswith(PERSISTENT)
