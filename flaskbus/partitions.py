"""A mount in several queues, each in another part of a cluster's slots. Pure.

All keys of a mount are in one slot, so that one script can change them: one node carries all of it. A mount that is
too busy for one node has partitions beside its first queue, which are mounts of their own in all but that requests
are routed to the whole. Gateways take them in turn, and agents read all of them.
"""

from __future__ import annotations

from dataclasses import replace

from flaskbus.cluster import SLOTS, slot_of
from flaskbus.routing import Mount

MOST_PARTITIONS = 50
"""As many as one agent can serve."""


def partitions(mount: Mount, number: int) -> list[Mount]:
    """The mount and ``number - 1`` partitions of it: one in each of so many equal ranges of the slots.

    Who names a partition wants that alone. ``number`` is up to :data:`MOST_PARTITIONS`.
    A cluster that has shared out its slots evenly carries as much of it on each node. Twice the number keeps those
    that are there, and adds as many.
    """
    if mount.partition:
        return [mount]
    found = {_range(mount, number): mount}
    suffix = 0
    while len(found) < number:
        suffix += 1
        part = replace(mount, partition=suffix)
        found.setdefault(_range(part, number), part)
    return sorted(found.values())


def _range(mount: Mount, number: int) -> int:
    return slot_of(mount.key) * number // SLOTS
