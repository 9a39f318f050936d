"""The works, in the order in which they are done and shown."""

from __future__ import annotations

from benchmarks.works.base import Work
from benchmarks.works.cost import BrokerCost, Limit, Start
from benchmarks.works.held import Held
from benchmarks.works.mix import Mix
from benchmarks.works.streams import DOWNLOAD, UPLOAD, Events, ManyEvents, WebSocket
from benchmarks.works.throughput import BODIES, HELLO, IO, MANY_MOUNTS, Scaling

WORKS: tuple[Work, ...] = (
    HELLO, BODIES, IO, MANY_MOUNTS, Mix(), Scaling(), Held(), BrokerCost(), Start(), Limit(),
    Events(), ManyEvents(), DOWNLOAD, UPLOAD, WebSocket(),
)  # fmt: skip
