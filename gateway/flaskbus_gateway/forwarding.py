"""Where a request really came from, when trusted proxies stand in front.

Pure. ``X-Forwarded-*`` of a trusted peer is believed, of anybody else removed, and never invented. The app
sees at most one hop, and a right one, so that werkzeug's ``ProxyFix`` gives what the environ says already.
``Forwarded`` (RFC 7239) is removed: with two sources of one fact a client could choose which is believed.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

FORWARDING = frozenset(
    {
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-proto",
        b"x-forwarded-protocol",
        b"x-forwarded-ssl",
        b"x-forwarded-scheme",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-prefix",
        b"x-forwarded-server",
        b"x-forwarded-by",
        b"x-scheme",
        b"x-real-ip",
    }
)
"""Headers that say where a request came from; only a trusted proxy's reach the app."""

_PREFIX = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,=:@%-]+)*")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class TrustedProxies:
    """Which peers may say who their client is; ``text`` is a list of addresses, networks or ``*``."""

    __slots__ = ("_cache", "_everybody", "_networks")

    def __init__(self, text: str) -> None:
        words = [word.strip() for word in text.split(",") if word.strip()]
        self._everybody = "*" in words
        self._networks: list[Network] = [
            ipaddress.ip_network(word, strict=False) for word in words if word != "*"
        ]
        self._cache: dict[str, bool] = {}

    def __contains__(self, host: str) -> bool:
        if self._everybody:
            return True
        known = self._cache.get(host)
        if known is None:
            if len(self._cache) > 4096:
                self._cache.clear()
            known = self._cache[host] = self._lookup(host)
        return known

    def _lookup(self, host: str) -> bool:
        if not host:
            # A Unix socket has no peer address; who may open it is the file system's decision.
            return True
        try:
            address = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self._networks)


@dataclass(frozen=True, slots=True)
class Origin:
    """What the proxies say: the client, what it asked for, and the prefix that they took off."""

    client: str
    scheme: str
    host: str
    port: str
    prefix: str


def read_origin(
    headers: list[tuple[bytes, bytes]], peer: str, scheme: str, proxies: TrustedProxies
) -> Origin:
    """The origin by the headers of a trusted peer.

    The client is the rightmost address of ``X-Forwarded-For`` that is not itself a trusted proxy; the other
    headers' last value counts, which the nearest proxy wrote.
    """
    values: dict[bytes, str] = {}
    hops: list[str] = []
    for name, value in headers:
        if name == b"x-forwarded-for":
            hops.extend(hop.strip() for hop in value.decode("latin-1").split(","))
        elif name in FORWARDING:
            values[name] = value.decode("latin-1").rpartition(",")[2].strip()
    client = peer
    for hop in reversed(hops):
        address = _address(hop)
        if not address:
            break
        client = address
        if address not in proxies:
            break
    proto = values.get(b"x-forwarded-proto", "").lower()
    return Origin(
        client=client,
        scheme=proto if proto in ("http", "https") else scheme,
        host=values.get(b"x-forwarded-host", ""),
        port=values.get(b"x-forwarded-port", "") if values.get(b"x-forwarded-port", "").isdigit() else "",
        prefix=prefix
        if _PREFIX.fullmatch(prefix := values.get(b"x-forwarded-prefix", "").rstrip("/"))
        else "",
    )


def _address(hop: str) -> str:
    """``203.0.113.7``, ``203.0.113.7:4711``, ``[2001:db8::1]:4711`` -> the address, or empty."""
    if hop.startswith("["):
        hop = hop[1:].partition("]")[0]
    elif hop.count(":") == 1:
        hop = hop.partition(":")[0]
    try:
        return str(ipaddress.ip_address(hop))
    except ValueError:
        return ""
