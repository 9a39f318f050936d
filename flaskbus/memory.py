"""How much of its memory a broker may use for requests. Shared by the gateways and ``flaskbus doctor``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FULL = 0.8
"""Share of ``maxmemory`` from which on gateways take no new requests. What is left is for the replies to those that
run, for what several gateways admit between two looks, and for the broker's own buffers."""


def used(info: Mapping[str, Any]) -> int:
    """Bytes that count against ``maxmemory``, from the answer of INFO memory."""
    # Buffers of replicas and of the append-only file are used, and do not count.
    return int(info.get("used_memory", 0)) - int(info.get("mem_not_counted_for_evict", 0))


def limit(info: Mapping[str, Any]) -> int:
    """``maxmemory`` in bytes; 0 where there is none, or it may not be asked."""
    return int(info.get("maxmemory", 0))


def room(info: Mapping[str, Any]) -> float:
    """Bytes that requests may still take; infinite where the broker has no limit or does not tell it."""
    return FULL * limit(info) - used(info) if limit(info) else math.inf
