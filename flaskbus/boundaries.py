"""Where a response that may go on for ever can end without losing half of what it says. Pure.

==========================================  ==================================================================
media type                                  boundary
==========================================  ==================================================================
``text/event-stream``                       after a blank line; a line ends with CR LF, LF or CR (HTML
                                            Standard, section 9.2.5)
``application/x-ndjson``, ``…/jsonl`` etc.  after LF
``application/json-seq``                    before RS, which begins a record (RFC 7464, section 2); an LF may
                                            also stand inside of one
==========================================  ==================================================================

The beginning of a response is a boundary too.
"""

from __future__ import annotations

import re

from flaskbus.messages import Headers

_SEPARATED_BY_BLANK_LINES = re.compile(rb"(?>\r\n|\n|\r){2,}"), b"\n\n"
_LINES = re.compile(rb"\n"), b"\n"
_BEGUN_BY_RS = re.compile(rb"(?=\x1e)"), b"\x1e"

_FORMATS: dict[bytes, tuple[re.Pattern[bytes], bytes]] = {
    b"text/event-stream": _SEPARATED_BY_BLANK_LINES,
    b"application/x-ndjson": _LINES,
    b"application/ndjson": _LINES,
    b"application/jsonl": _LINES,
    b"application/x-jsonlines": _LINES,
    b"application/jsonlines": _LINES,
    b"application/json-seq": _BEGUN_BY_RS,
}
"""Media type -> what ends with a boundary, and what the beginning of a response is like."""


class Boundaries:
    """The boundaries of one response, whose body comes in pieces."""

    __slots__ = ("_before", "_pattern")

    def __init__(self, pattern: re.Pattern[bytes], start: bytes) -> None:
        self._pattern = pattern
        self._before = start  # the line ends, three bytes at most, that the body ends with so far

    def advance(self, data: bytes) -> None:
        """The body goes on with this piece."""
        if data:
            end = (self._before + data[-3:])[-3:]
            self._before = end[len(end.rstrip(b"\r\n")) :]

    @property
    def complete(self) -> bool:
        """Whether the body so far ends at a boundary."""
        return self.cut(b"") is not None

    def cut(self, data: bytes) -> bytes | None:
        """The next piece up to its last boundary; empty where there is one right before it, ``None`` for none."""
        last = None
        for match in self._pattern.finditer(self._before + data):
            last = match.end()
        return None if last is None else data[: max(0, last - len(self._before))]


def boundaries(headers: Headers) -> Boundaries | None:
    """The boundaries of a response with these headers; ``None`` where it has none that we could see.

    What has a length has an end of its own, and in what is encoded (gzip) no lines can be seen.
    """
    found = None
    for name, value in headers:
        lower = name.lower()
        if lower in (b"content-length", b"content-encoding"):
            return None
        if lower == b"content-type":
            found = _FORMATS.get(value.partition(b";")[0].strip().lower())
    return Boundaries(*found) if found else None
