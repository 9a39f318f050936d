"""Signatures over what travels, so that a stranger on the broker can neither run code nor answer clients. Pure.

Each mount has a key of its own, made from the gateways' secret: ``HMAC-SHA256(secret, namespace and mount)``. An
agent is given the keys of its mounts and cannot make any other's. What is signed, with HMAC-SHA256 (RFC 2104)
under the key of the mount:

========  =============================================================================================
request   the mount, and every field of the entry with its value, in their order: correlation id,
          attempt, expiry, sender, method, target, head, body, and whatever a later version adds
frame     the mount, the correlation id, the record of an Idempotency-Key if there is one (so that no
          answer can be kept as another's), and every byte of the element: version, kind, attempt, seq, content
========  =============================================================================================

The signature of a request is its last field, ``signature``; that of a frame is the last member of its array.
``expires`` is in seconds of the gateway's wall clock. Nothing here looks at a clock: ``now`` is an argument.
"""

from __future__ import annotations

import hmac
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from flaskbus.errors import UsageError, WireError
from flaskbus.routing import Mount

Field = str | bytes | int

SIGNATURE_SIZE = 32
"""Bytes of a signature: the whole output of SHA-256."""

SHORTEST_SECRET = 32
"""Characters. Whoever reads one signed request can try secrets for as long as they like."""

CLOCK_DOUBT = 2 * 3600
"""Seconds past its expiry for which a request is still taken: the clocks of both hosts may be an hour off."""

REMEMBERED = 65536
"""Requests that a process remembers, to run none of them a second time."""

_KEY = re.compile(r"[0-9a-f]{64}")


class SignatureError(WireError):
    """An entry that is not signed right, or has expired, or was run before: the app must not see it."""


@dataclass(frozen=True, slots=True, repr=False)
class Seal:
    """Signs and checks what travels for one mount. ``mount`` is its key name, ``key`` its signing key."""

    mount: str
    key: bytes

    @property
    def fingerprint(self) -> str:
        """Tells one key from another, and gives nothing of it away."""
        return hmac.digest(self.key, b"fingerprint", "sha256").hex()[:12]

    def sign_request(self, fields: Sequence[Field], expires: int) -> list[Field]:
        """The fields of an entry, with its expiry and its signature."""
        complete = [*fields, "expires", expires]
        return [*complete, "signature", self._of_request([_stored(field) for field in complete])]

    def check_request(self, fields: Sequence[bytes], now: float) -> bytes:
        """The signature of an entry that may be run; ``now`` in seconds of this host's wall clock.

        Raises :class:`SignatureError`.
        """
        signature = signature_of(fields)
        if signature is None:
            raise SignatureError("the request is not signed, and this agent has a signing key")
        if not hmac.compare_digest(self._of_request(fields[:-2]), signature):
            raise SignatureError("the signature of the request is wrong: another key, or it was changed")
        if fields[-4:-3] != [b"expires"]:
            raise SignatureError("the signed request has no expiry")
        if now > int(fields[-3]) + CLOCK_DOUBT:
            raise SignatureError("the signed request has expired")
        return signature

    def frames(self, request_id: str, record: str = "") -> FrameSeal:
        """What signs and checks the frames of one request; ``record`` is that of its Idempotency-Key."""
        prefix = f"frame\0{self.mount}\0{request_id}\0{record}\0"
        return FrameSeal(self.key, prefix.encode())

    def _of_request(self, fields: Sequence[bytes]) -> bytes:
        # The lengths come first: no two sequences of fields read the same.
        lengths = ",".join([str(len(field)) for field in fields])
        message = b"".join((b"request\0%s\0%s\0" % (self.mount.encode(), lengths.encode()), *fields))
        return hmac.digest(self.key, message, "sha256")


@dataclass(frozen=True, slots=True, repr=False)
class FrameSeal:
    """Signs and checks the frames of one request."""

    key: bytes
    prefix: bytes

    def sign(self, content: bytes) -> bytes:
        """The signature of an element, from all that stands before it; see :func:`flaskbus.wire.encode_frame`."""
        return hmac.digest(self.key, self.prefix + content, "sha256")

    def is_signed(self, element: bytes) -> bool:
        """Whether an element was signed for this request."""
        return hmac.compare_digest(self.sign(element[:-SIGNATURE_SIZE]), element[-SIGNATURE_SIZE:])


def _stored(field: Field) -> bytes:
    """What the broker gives back of a field."""
    return field if isinstance(field, bytes) else str(field).encode()


def signature_of(fields: Sequence[bytes]) -> bytes | None:
    """The signature of an entry, ``None`` where it has none."""
    return fields[-1] if len(fields) > 1 and fields[-2] == b"signature" else None


def opener(seals: Iterable[Seal], fields: Sequence[bytes], now: float) -> tuple[Seal, bytes]:
    """Which of a mount's seals the entry was signed with, and its signature.

    There are two while a secret is replaced. Raises :class:`SignatureError`.
    """
    refused = SignatureError("there is no key for this mount")
    for seal in seals:
        try:
            return seal, seal.check_request(fields, now)
        except SignatureError as error:
            refused = error
    raise refused


class Replays:
    """Which requests were run before, by their signatures; safe to use from several threads."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most = most
        self._seen: dict[bytes, object] = {}
        self._order: deque[bytes] = deque()

    def admit(self, signature: bytes) -> None:
        """Raises :class:`SignatureError` for one that was admitted before, unless ``most`` came since."""
        mine = object()
        if self._seen.setdefault(signature, mine) is not mine:
            raise SignatureError("the request was run before: somebody sent a copy of it")
        self._order.append(signature)
        while len(self._order) > self._most:
            self._seen.pop(self._order.popleft(), None)

    def forgive(self, signature: bytes) -> None:
        """One that was admitted has not been run, and may come again."""
        self._seen.pop(signature, None)
        with suppress(ValueError):  # so many came since that it is forgotten
            self._order.remove(signature)


def worth_saying(count: int) -> bool:
    """Whether the so-manieth refusal is worth a line in the log: the 1st, 2nd, 4th, 8th, …"""
    return count & (count - 1) == 0


# Secrets and keys, as people write them


def check_secret(secret: str) -> None:
    """Raises :class:`~flaskbus.errors.UsageError` for one that could be guessed; ``@FILE`` is read elsewhere."""
    if secret and not secret.startswith("@") and len(secret) < SHORTEST_SECRET:
        raise UsageError(
            f"a secret of {len(secret)} characters can be guessed; take at least {SHORTEST_SECRET}, "
            "as in: openssl rand -hex 32"
        )


def make_key(secret: str, namespace: str, mount: str) -> str:
    """The signing key of a mount (its key name): 64 hexadecimal digits."""
    if len(secret) < SHORTEST_SECRET or secret.startswith("@"):
        raise UsageError("that is not a secret")
    message = b"mount\0%s\0%s" % (namespace.encode(), mount.encode())
    return hmac.digest(secret.encode(), message, "sha256").hex()


def make_seal(secret: str, namespace: str, mount: str) -> Seal | None:
    """The gateway's seal of a mount; ``None`` where there is no secret."""
    return Seal(mount, bytes.fromhex(make_key(secret, namespace, mount))) if secret else None


def secret_fingerprint(secret: str) -> str:
    """Tells one secret from another, and gives nothing of it away; empty where there is none."""
    return hmac.digest(secret.encode(), b"fingerprint", "sha256").hex()[:12] if secret else ""


def parse_keys(text: str) -> Mapping[str, tuple[str, ...]]:
    """``KEY``, or ``MOUNT=KEY`` once or more, separated by white space -> mount's key name -> its keys.

    A key alone is for whatever mount the agent has, and stands under ``""``. A line that begins with ``#`` is a
    comment. Raises :class:`~flaskbus.errors.UsageError`.
    """
    found: dict[str, tuple[str, ...]] = {}
    for word in re.sub(r"(?m)^\s*#.*", "", text).split():
        name, _, key = word.rpartition("=")
        if not _KEY.fullmatch(key):
            raise UsageError("a signing key is 64 hexadecimal digits, as printed by: flaskbus key /PREFIX")
        name = Mount.from_name(name).whole.key if name else ""
        found[name] = (*found.get(name, ()), key)
    return found


def check_keys(text: str) -> None:
    """Raises :class:`~flaskbus.errors.UsageError` for what :func:`parse_keys` would not take."""
    if not text.startswith("@"):
        parse_keys(text)


def seals_of(keys: Mapping[str, tuple[str, ...]], mounts: Sequence[str]) -> dict[str, tuple[Seal, ...]]:
    """The seals of an agent's whole mounts (key names), from what :func:`parse_keys` gave; empty without keys.

    Raises :class:`~flaskbus.errors.UsageError` where a mount has no key, or one key is to be for several.
    """
    if not keys:
        return {}
    if "" in keys and len(set(mounts)) > 1:
        raise UsageError(
            "each mount has a signing key of its own; say which: --signing-key 'MOUNT=KEY MOUNT=KEY'"
        )
    found = {}
    for mount in mounts:
        mine = keys.get(mount, keys.get("", ()))
        if not mine:
            raise UsageError(f"there is no signing key for {mount} among those of {', '.join(sorted(keys))}")
        found[mount] = tuple(Seal(mount, bytes.fromhex(key)) for key in mine)
    return found
