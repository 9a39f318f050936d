"""The works, in the order in which they are done and shown."""

from __future__ import annotations

from benchmarks.works.base import Work
from benchmarks.works.cost import BrokerCost, ClusterCost, Limit, Start
from benchmarks.works.events import Events, ManyEvents
from benchmarks.works.held import Held
from benchmarks.works.mix import Mix
from benchmarks.works.throughput import BODIES, HELLO, IO, MANY_MOUNTS, Scaling
from benchmarks.works.transfers import DOWNLOAD, LARGE_UPLOAD, UPLOAD
from benchmarks.works.websocket import WebSocket

WORKS: tuple[Work, ...] = (
    HELLO, BODIES, IO, MANY_MOUNTS, Mix(), Scaling(), Held(), BrokerCost(), ClusterCost(), Start(), Limit(),
    Events(), ManyEvents(), DOWNLOAD, UPLOAD, LARGE_UPLOAD, WebSocket(),
)  # fmt: skip

GROUPS: dict[str, tuple[str, ...]] = {
    "streams": ("sse", "sse-many", "download", "upload", "upload-large", "websocket"),
}
"""Names for several works."""
