r"""Which mount a request belongs to: host pattern first, then the longest prefix on whole segments.

A path reaches its app unmodified, so nothing is normalized here. The plain reading decides: split at ``/``,
percent-decode each segment, compare with the segments of each mount. A proxy in front or the app behind may
read the same path differently (RFC 3986 section 6.2.2 and what servers do beyond it); a path for which that
would lead to another mount, or out of every mount, is refused:

=============================  ==========================
another reading                example
=============================  ==========================
dot segments removed           ``/a/../b``, ``/a/%2e%2e/b``
duplicate slashes merged       ``//b``
``%2F`` taken for ``/``        ``/a%2Fb``
backslash taken for ``/``      ``/a\b``, ``/a%5Cb``
``;parameters`` cut off        ``/a;x/b``, ``/a/..;/b``
percent-decoded twice          ``/%2561``
=============================  ==========================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import IPv6Address
from urllib.parse import quote, unquote, unquote_to_bytes

from flaskbus.errors import AmbiguousTarget, InvalidRequest, UsageError

# What RFC 3986 lets stand raw in a segment, without '*' (a glob) and ';' (which some servers cut off).
_SEGMENT_SAFE = "!$&'()+,=:@-._~"
_REFUSED_IN_PREFIX = "{}*?[]\\;"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")

_PARTITION = re.compile(r"(.*);([1-9][0-9]{0,8})", re.ASCII)

_LABEL = r"[A-Za-z0-9_-]+"  # with '_', which DNS does not know but names of containers have
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_HOST = re.compile(rf"(?:({_NAME.pattern})\.?|\[([0-9A-Fa-f:.]+)\])(?::([0-9]*))?")
_LONGEST_NAME = 253
_LONGEST_HOST = _LONGEST_NAME + len(".:65535")

# Visible ASCII but '#', '%', ';' and '\'; and what may stand in a path at all.
_PLAIN = re.compile(r"/[!\"$&-:<-\[\]-~]*")
_VALID = re.compile(r"/[!\"$-~]*")
_SUSPICIOUS = re.compile(r"//|/\.|[\\;%]")
_ENCODED_SLASH = re.compile(r"%2[Ff]")
_MOST_READINGS = 256


@dataclass(frozen=True, slots=True, order=True)
class Mount:
    """Where an app hangs; made by :meth:`parse`, :meth:`from_name` or :meth:`from_key`, which check it.

    ``host`` is ``""`` (any), ``"shop.example.com"`` or ``"*.example.com"``; lower case, IDNA-encoded.
    ``prefix`` is ``"/"``, or percent-encoded segments without a final slash, in canonical form: unreserved
    characters and what RFC 3986 allows in a segment are raw, all else is an escape in upper case.
    ``partition`` is 0, or the number of a queue of its own that the mount has beside its first one (see
    :mod:`flaskbus.partitions`).
    """

    host: str
    prefix: str
    partition: int = 0

    @classmethod
    def parse(cls, prefix: str, host: str = "") -> Mount:
        """A mount from what an operator wrote. Raises :class:`~flaskbus.errors.UsageError` with the mend."""
        return cls(_parse_host(host) if host else "", _parse_prefix(prefix))

    @classmethod
    def from_name(cls, name: str) -> Mount:
        """A mount from its :attr:`name`. Raises :class:`~flaskbus.errors.UsageError` with the mend."""
        whole, number = found.groups() if (found := _PARTITION.fullmatch(name)) else (name, 0)
        host, slash, path = whole.partition("/")
        if not slash:
            mend = f"did you mean /{name}, or {name}/ for a host?" if name else "say / for the root"
            raise UsageError(f"mount {name!r} has no slash; {mend}")
        return replace(cls.parse("/" + path, host), partition=int(number))

    @classmethod
    def from_key(cls, key: str) -> Mount:
        """A mount from its :attr:`key`. Raises :class:`~flaskbus.errors.UsageError` if it is none of ours."""
        mount = cls.from_name("*" + key if key.startswith(".") else key)
        if mount.key != key:
            raise UsageError(f"{key!r} is not the key of a mount; did you mean {mount.key!r}?")
        return mount

    @property
    def name(self) -> str:
        """For people: ``/myapp``, ``shop.example.com/api``, ``*.example.com/``, ``/myapp;2`` for a partition."""
        return self.host + self.prefix + (f";{self.partition}" if self.partition else "")

    @property
    def key(self) -> str:
        """For names of keys: the name without ``*``, which would be a glob in an ACL pattern."""
        return self.name.removeprefix("*")

    @property
    def whole(self) -> Mount:
        """The mount that a partition is of; any other mount itself."""
        return replace(self, partition=0) if self.partition else self

    @property
    def script_name(self) -> str:
        """``SCRIPT_NAME`` (PEP 3333) before decoding: the prefix, or ``""`` at the root."""
        return "" if self.prefix == "/" else self.prefix

    def __str__(self) -> str:
        return self.name


class Table:
    """The mounts, ready for :meth:`match`; a table does not change, a new one takes its place.

    It gives whole mounts, also where only partitions of them are there.
    """

    __slots__ = ("_any", "_hosts", "_longest")

    def __init__(self, mounts: Iterable[Mount] = ()):
        # Host pattern ("" any, ".example.com" wildcard) -> decoded prefix -> mount.
        self._hosts: dict[str, dict[str, Mount]] = {}
        self._any: dict[str, Mount] = {}
        self._longest = 1
        for mount in mounts:
            pattern = mount.host.removeprefix("*")
            prefixes = self._hosts.setdefault(pattern, {}) if pattern else self._any
            prefix = unquote(mount.prefix, "latin-1")
            prefixes[prefix] = mount.whole
            self._longest = max(self._longest, len(prefix))

    def match(self, host: str, path: str) -> Mount | None:
        """The mount of a request, ``None`` where there is none.

        ``host`` is the value of the Host header, ``""`` if there was none (HTTP/1.0). ``path`` is the
        percent-encoded path as the client sent it, without query. Raises
        :class:`~flaskbus.errors.InvalidRequest` and :class:`~flaskbus.errors.AmbiguousTarget`.
        """
        groups = self._groups(_host_name(host))
        if _PLAIN.fullmatch(path) and "//" not in path and "/." not in path:
            return self._find(groups, path)
        if not _VALID.fullmatch(path):
            raise InvalidRequest(
                "The path has to begin with a slash and be ASCII; all else is percent-encoded."
            )
        decoded = unquote(path, "latin-1")
        if "\0" in decoded:
            raise InvalidRequest("The path contains a NUL.")
        if not _SUSPICIOUS.search(decoded) and not _ENCODED_SLASH.search(path):
            return self._find(groups, decoded)
        mount = self._find(groups, _decode_segments(path))
        for reading in _readings(path):
            if self._find(groups, reading) is not mount:
                raise AmbiguousTarget("The path can be read in two ways that lead to different apps.")
        return mount

    def _groups(self, name: str) -> list[dict[str, Mount]]:
        """The prefixes to look in, the most specific host first."""
        groups = [self._any]
        if self._hosts:
            dot = name.rfind(".")
            while dot >= 0:
                if wildcard := self._hosts.get(name[dot:]):
                    groups.append(wildcard)
                dot = name.rfind(".", 0, dot)
            if exact := self._hosts.get(name):
                groups.append(exact)
            groups.reverse()
        return groups

    def _find(self, groups: list[dict[str, Mount]], path: str) -> Mount | None:
        """The longest prefix in the first group that has one, for a decoded path."""
        # No cut is longer than the longest prefix, so a path of a thousand slashes costs no more.
        longest = len(path) if len(path) <= self._longest else path.rfind("/", 0, self._longest + 1)
        for prefixes in groups:
            end = longest
            while end > 0:
                if mount := prefixes.get(path[:end]):
                    return mount
                end = path.rfind("/", 0, end)
            if mount := prefixes.get("/"):
                return mount
        return None


def check_host(host: str) -> None:
    """Raise :class:`~flaskbus.errors.InvalidRequest` for the value of a Host header that is none."""
    _host_name(host)


def split_target(target: str) -> tuple[str, str]:
    """Path and query of a target in origin-form (RFC 9112 section 3.2.1), both still percent-encoded."""
    path, _, query = target.partition("?")
    return path, query


def origin_form(target: str, host: str) -> tuple[str, str]:
    """Target and host of a request, its target brought to origin-form.

    A target in absolute-form brings its own host, which overrides the Host header (RFC 9112 section 3.2.2).
    Raises :class:`~flaskbus.errors.InvalidRequest` for any other form.
    """
    if target.startswith("/"):
        return target, host
    absolute = re.match(r"(?i:https?)://([^/?#]+)(.*)", target, re.DOTALL)
    if not absolute:
        raise InvalidRequest("The request target is neither a path nor an http or https URL.")
    authority, rest = absolute.groups()
    return (rest if rest.startswith("/") else "/" + rest), authority


def _parse_prefix(prefix: str) -> str:
    if not prefix:
        raise UsageError("the prefix is empty; say / to mount the app at the root")
    if not prefix.startswith("/"):
        raise UsageError(f"prefix {prefix!r} has to begin with a slash; did you mean /{prefix.rstrip('/')}?")
    if "%" in _ESCAPE.sub("", prefix):
        raise UsageError(f"prefix {prefix!r} has a % that begins no escape; say %25 for the character itself")
    try:
        segments = [unquote_to_bytes(segment) for segment in prefix.removesuffix("/").split("/")[1:]]
    except UnicodeEncodeError:
        raise UsageError(f"prefix {prefix!r} is not valid text; say it in UTF-8 or percent-encoded") from None
    for segment in segments:
        if mistake := _mistake(segment.decode("utf-8", "replace")):
            raise UsageError(f"prefix {prefix!r} {mistake}")
    return "/" + "/".join(quote(segment, safe=_SEGMENT_SAFE) for segment in segments)


def _mistake(segment: str) -> str | None:
    """What is wrong with a decoded segment of a prefix."""
    if not segment:
        return "has an empty segment; leave the double slash out"
    if segment in (".", ".."):
        return f"has the segment {segment!r}; write the path without it"
    if "/" in segment:
        return "has an encoded slash, which many servers and proxies decode; choose another name"
    if _CONTROL.search(segment):
        return "has a control character; leave it out"
    if _ESCAPE.search(segment):
        return "is percent-encoded twice; encode it once"
    refused = next((character for character in segment if character in _REFUSED_IN_PREFIX), None)
    return refused and f"has a {refused!r}, which is not possible in a mount; leave it out"


def _parse_host(host: str) -> str:
    if "/" in host:
        raise UsageError(f"host {host!r} has a slash; give the name alone, and the path as the prefix")
    if "[" in host or host.count(":") > 1:
        raise UsageError(f"host {host!r} is an IPv6 address, which a mount cannot be for; leave the host out")
    name, colon, _ = host.partition(":")
    if colon:
        raise UsageError(f"host {host!r} has a port, and a mount is for all ports; say {name!r}")
    star = "*." if host.startswith("*.") else ""
    try:
        name = host.removeprefix(star).removesuffix(".").encode("idna").decode("ascii").lower()
    except UnicodeError:
        name = ""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise UsageError(f"host {host!r} is no host pattern; say shop.example.com or *.example.com")
    return star + name


@lru_cache(maxsize=1024)
def _host_name(host: str) -> str:
    """The name in a Host header (RFC 9110 section 7.2): lower case, without port and final dot."""
    if not host:
        return ""
    found = _HOST.fullmatch(host) if len(host) <= _LONGEST_HOST else None
    if found:
        name, address, port = found.groups()
        if int(port or 0) <= 65535 and (name or _is_ipv6(address)):
            return (name or host).lower()
    raise InvalidRequest("The Host header is not a host name or address with an optional port.")


def _is_ipv6(address: str) -> bool:
    try:
        IPv6Address(address)
    except ValueError:
        return False
    return True


def _readings(path: str) -> Iterator[str]:
    """Every reading of a path: all steps in any order, percent-decoded once or twice.

    Raises :class:`~flaskbus.errors.AmbiguousTarget` where there are too many, which bounds the work.
    """
    start = (path, 0)
    seen = {start}
    todo = [start]
    while todo:
        text, decoded = todo.pop()
        if decoded:
            yield text
        found = {(step(text), decoded) for step in (_merge_slashes, _remove_dots, _cut_parameters, _slash)}
        if not decoded or (decoded == 1 and "%" in text):
            found |= {(_decode_segments(text), decoded + 1), (unquote(text, "latin-1"), decoded + 1)}
        todo += found - seen
        seen |= found
        if len(seen) > _MOST_READINGS:
            raise AmbiguousTarget("The path can be read in too many ways.")


def _decode_segments(path: str) -> str:
    """Decoded, with each encoded slash as NUL: it belongs to its segment, and no prefix has either."""
    return unquote(_ENCODED_SLASH.sub("%00", path), "latin-1")


def _merge_slashes(path: str) -> str:
    return re.sub("//+", "/", path)


def _cut_parameters(path: str) -> str:
    return re.sub(";[^/]*", "", path)


def _slash(path: str) -> str:
    return path.replace("\\", "/")


def _remove_dots(path: str) -> str:
    """RFC 3986 section 5.2.4."""
    if "/." not in path:
        return path
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)
