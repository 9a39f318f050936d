"""Troubles that last, said once and not each second."""

from __future__ import annotations

import logging


class Troubles:
    """What is wrong now, by what it is wrong with; logged when it begins or changes, and when it is over."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._now: dict[str, str] = {}

    def say(self, about: str, what: object) -> None:
        """``about`` is in trouble."""
        text = str(what)
        if self._now.get(about) != text:
            self._now[about] = text
            self._log.warning("%s: %s", about, text)

    def over(self, about: str) -> None:
        """``about`` is well."""
        if self._now.pop(about, None) is not None:
            self._log.info("%s: well again", about)
