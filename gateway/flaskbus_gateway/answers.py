"""What the broker answers, and what it means when it does not."""

from __future__ import annotations

from typing import Any

Answer = Any
Command = tuple[Any, ...]
Packed = bytes
"""A command as it travels."""


class LinkError(ConnectionError):
    """The broker cannot be asked now."""


class LinkDown(LinkError):
    """Not connected, or not the one that could: the command was not carried out."""


class LinkLost(LinkError):
    """The connection broke before the answer came: the command may have been carried out."""


class AnswerError(Exception):
    """The broker answered with an error; the first word of the text is its code."""

    @property
    def code(self) -> str:
        return str(self).partition(" ")[0]
