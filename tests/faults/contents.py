"""What requests and replies of the soak hold: bytes that only one token has, so that a swap, a cut or a
changed order shows. Pure; the app and its clients make them on their own.
"""

from __future__ import annotations

import random
from hashlib import sha256

LARGE = 100 * 1024
SMALL = 100
_BLOCK = random.Random(0).randbytes(1 << 20)


def content(token: str, kind: str, size: int) -> bytes:
    """``size`` bytes, at most 512 KiB, for one token and one kind (``request``, ``reply``)."""
    name = f"{token} {kind} {size}\n".encode()
    start = int.from_bytes(sha256(name).digest()[:4]) % (len(_BLOCK) // 2)
    return (name + _BLOCK[start : start + size])[:size]


def reply_size(shape: str) -> int:
    return LARGE if shape in ("large", "stream") else SMALL


SHAPES = ("small", "large", "stream", "trickle")
"""Kinds of replies: complete at once and small; complete and large; yielded piece by piece, large and small.
``quick`` is a small one at once, from a ledger that is not synced: for a million of them."""


def work(token: str) -> float:
    """Seconds that a token's handler takes: mostly a few milliseconds, rarely a tenth of a second."""
    dice = sha256(token.encode()).digest()[0]
    return 0.1 if dice == 0 else dice / 256 * 0.004
