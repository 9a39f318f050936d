"""Short marks by which agents of one mount are compared: do they run the same code, with the same secret?"""

from __future__ import annotations

import hmac
import sys
import sysconfig
from hashlib import sha256
from pathlib import Path

_LENGTH = 12
_OURS = ("flaskbus", "flaskbus_agent")
_STDLIB = tuple(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib"))


def code_fingerprint(target: str) -> str:
    """Of the source of an imported app: its own package, and whatever else is loaded but was not installed.

    Module names and contents count, the directory does not. Empty where there is no source.
    """
    root = target.partition(":")[0].partition(".")[0]
    digest = sha256()
    found = False
    for name, module in sorted(sys.modules.items()):
        file, package = getattr(module, "__file__", None), name.partition(".")[0]
        if not file or not file.endswith(".py") or package in _OURS:
            continue
        if package == root or not _installed(Path(file).resolve()):
            try:
                digest.update(name.encode() + b"\0" + sha256(Path(file).read_bytes()).digest())
            except OSError:
                continue
            found = True
    return digest.hexdigest()[:_LENGTH] if found else ""


def _installed(file: Path) -> bool:
    return str(file).startswith(_STDLIB) or not {"site-packages", "dist-packages"}.isdisjoint(file.parts)


def key_fingerprint(app: object, mount_key: str) -> str:
    """Of a Flask app's secret key, keyed by its mount (HMAC-SHA-256, cut to 32 bits); empty without one.

    Equal marks mean equal keys; so short a mark tells nothing else about a key that is worth the name.
    """
    secret = getattr(app, "secret_key", None)
    if isinstance(secret, str):
        secret = secret.encode()
    if not isinstance(secret, bytes) or not secret:
        return ""
    return hmac.new(mount_key.encode(), secret, sha256).hexdigest()[:8]
