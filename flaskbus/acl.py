"""What the broker's users may do, as the rules of ACL SETUSER: a user for the gateways, one per mount, one for tools.

The fence is the keys: whatever a user may say, it says it of the keys and channels of its role. All keys of a mount
begin with ``NAMESPACE:{MOUNT}:``, and no character of a mount is a pattern, so the rule for ``/a`` matches nothing
of ``/ab`` or ``/a/b``. Commands that name no key and tell or change something (KEYS, FLUSHALL, CONFIG, CLIENT LIST)
are in no rule, but for INFO and the tools' SCAN.
Scripts run with the rights of whoever calls them. Pure; the syntax is that of Redis 7.0, which Valkey has too.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from flaskbus.address import Kind
from flaskbus.errors import UsageError
from flaskbus.keys import Keys
from flaskbus.routing import Mount

Role = Literal["gateway", "agent", "tools"]
ROLES: tuple[Role, ...] = ("gateway", "agent", "tools")

# What the user could do before is forgotten, but for its passwords.
_ANEW = ("on", "resetkeys", "resetchannels", "clearselectors", "-@all")

_SESSION = ("+ping", "+time", "+client|setname", "+client|id")
_FOLLOWING: Mapping[Kind, tuple[str, ...]] = {
    "single": (),
    "sentinel": ("+role",),
    "cluster": ("+asking", "+cluster|slots"),
}
_DATA = ("+@string", "+@hash", "+@list", "+@set", "+@stream", "-@dangerous")
_KEYSPACE = ("+exists", "+type", "+ttl", "+pttl", "+expire", "+pexpire", "+del", "+unlink")
# Of scripts only the text differs from version to version, so an agent brings its own: what a script may touch is
# what its user may touch.
_SCRIPTS = ("+evalsha", "+script|load", "+script|exists")
_TRANSACTIONS = ("+multi", "+exec")
_CHANNELS = ("+publish", "+subscribe", "+unsubscribe")
# SCAN names no key, and tells all of them: leaks and dead letters of forgotten mounts are found in no other way.
_READING = ("+@read", "-@keyspace", "-@dangerous", "+exists", "+type", "+ttl", "+pttl", "+scan")


def rules(
    role: Role,
    mounts: Sequence[Mount] = (),
    *,
    namespace: str = "flaskbus",
    db: int = 0,
    kind: Kind = "single",
) -> list[str]:
    """The rules of one user, each an argument of ACL SETUSER; ``mounts`` are an agent's.

    ``kind`` is that of the broker's URL: whoever follows masters that move has to ask who they are. Raises
    :class:`~flaskbus.errors.UsageError` for an agent without a mount, or another role with one.
    """
    if (role == "agent") != bool(mounts):
        raise UsageError(f"say which mounts: {role} MOUNT..." if role == "agent" else f"{role} has no mount")
    keys = Keys(namespace)
    # The rule names one database, because the keys of another bus in another one may be called the same.
    found = [*_ANEW, *_SESSION, *_FOLLOWING[kind], *([f"+select|{db}"] if db else [])]
    if role == "agent":
        found += _patterns(keys.of(mount.key).prefix for mount in mounts)
        found += [*_DATA, *_KEYSPACE, *_SCRIPTS, *_TRANSACTIONS, *_CHANNELS]
        # A name on that list claims nothing; nothing may be read from it, or taken off it. A script that names the
        # list may run, and do there what its user may do without a script.
        found += [f"(+sadd %W~{keys.mounts})", f"(+evalsha ~{keys.mounts})", f"(+publish &{keys.news})"]
    elif role == "gateway":
        found += _patterns([f"{namespace}:"])
        found += [*_DATA, *_KEYSPACE, *_SCRIPTS, *_CHANNELS, "+info"]
    else:
        found += [f"%R~{namespace}:*", *_READING, "+info"]
    return found


def _patterns(prefixes: Iterable[str]) -> list[str]:
    return [f"{kind}{prefix}*" for prefix in prefixes for kind in "~&"]


def user_name(role: Role, mount: Mount | None = None) -> str:
    """``flaskbus-gateway``, ``flaskbus-agent-myapp``: what a user is called if nothing else is said."""
    words = re.findall(r"[A-Za-z0-9._-]+", mount.key) if mount else []
    return "-".join(["flaskbus", role, *words])


def command_line(user: str, wanted: Iterable[str]) -> str:
    """``ACL SETUSER …`` as redis-cli and a shell read it.

    Raises :class:`~flaskbus.errors.UsageError` for a name that ACL would not take.
    """
    if not re.fullmatch(r"[!-~]+", user):
        raise UsageError(f"user {user!r} is not possible: visible ASCII characters, and no space")
    return " ".join(map(_quoted, ["ACL", "SETUSER", user, *wanted]))


def _quoted(word: str) -> str:
    """Quoted alike for redis-cli and for a POSIX shell."""
    if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII):
        return word
    if "'" not in word:
        return f"'{word}'"
    return '"' + re.sub(r'(["\\$`])', r"\\\1", word) + '"'


_REFUSAL = re.compile(r"no permissions? to|ACL failure in script|user executing the script", re.I)


def mend(refusal: str, mounts: Iterable[str]) -> str:
    """What to add to an error of the broker that says that an agent's user lacks a right; empty for any other.

    Redis 7.0, later ones and Valkey say it in three ways, and inside of scripts in two more.
    """
    if not _REFUSAL.search(refusal):
        return ""
    names = [*mounts]
    wholes = {name: Mount.from_name(name).whole.name for name in names}
    parts = Counter(whole if whole in wholes else name for name, whole in wholes.items())
    number = max(parts.values(), default=1)
    split = f" --partitions {number}" if number > 1 else ""
    user = " --user NAME" if len(parts) > 1 else ""
    command = f"flaskbus acl agent {' '.join(map(shlex.quote, parts))}{split}{user}"
    return f" (its user is not allowed that; the rule it needs is printed by: {command})"
