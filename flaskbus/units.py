"""Durations and sizes as people write them: ``"30s"``, ``"1h30m"``, ``"16MiB"``; and back again.

Durations are seconds, sizes are bytes. As in nginx, a bare ``k``, ``m`` or ``g`` is a power of 1024, which
``KiB``, ``MiB`` and ``GiB`` say outright (IEC 80000-13); ``kB``, ``MB`` and ``GB`` are powers of 1000.
"""

from __future__ import annotations

import math
import re

_NUMBER = r"\d+(?:\.\d+)?"
_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_PART = re.compile(rf"({_NUMBER})(ms|[dhms])", re.ASCII)
_DURATION = re.compile(rf"(?:{_PART.pattern})+", re.ASCII)

_BYTES = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmg", 1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
_SIZE = re.compile(rf"({_NUMBER})\s?([a-z]*)", re.ASCII)


def seconds(value: object) -> float:
    """Seconds from a number, or from text such as ``"30"``, ``"500ms"``, ``"5m"`` or ``"1h30m"``.

    Raises :class:`ValueError`; infinity and NaN are no durations.
    """
    if isinstance(value, str):
        text = value.strip().lower()
        if _DURATION.fullmatch(text):
            value = math.fsum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(text))
        else:
            value = float(text)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"not a duration: {value!r}")
    return float(value)


def size(value: object) -> int:
    """Bytes from a whole number, or from text such as ``"65536"``, ``"64k"``, ``"16MiB"`` or ``"1.5g"``.

    Raises :class:`ValueError`, also where the result is no whole number of bytes.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip().lower())
        if not match or match[2] not in _BYTES:
            raise ValueError(f"not a size: {value!r}")
        value = float(match[1]) * _BYTES[match[2]] if "." in match[1] else int(match[1]) * _BYTES[match[2]]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"not a size: {value!r}")  # noqa: TRY004 - one error, whatever is wrong
    return value


def show_seconds(value: float) -> str:
    """The shortest spelling in one unit that :func:`seconds` reads back as the same value."""
    if value == 0:
        return "0"
    for unit in ("h", "m"):
        if value % _SECONDS[unit] == 0:
            return f"{value / _SECONDS[unit]:.0f}{unit}"
    return f"{value:.0f}s" if value == math.floor(value) else f"{value!r}s"


def show_size(value: int) -> str:
    """The shortest spelling in one unit that :func:`size` reads back as the same value."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value and value % 1024**power == 0:
            return f"{value // 1024**power}{unit}"
    return str(value)
