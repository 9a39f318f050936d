"""``MODULE:APP=PREFIX``: which app, and where it hangs; written the same way everywhere."""

from __future__ import annotations

import re

from flaskbus.errors import UsageError

_APP = re.compile(r"(?P<target>[^=(]+(?:\(.*\))?)(?:=(?P<mount>.*))?", re.DOTALL)
"""An ``=`` within the parentheses of a factory's call does not count."""


def split_app(text: str) -> tuple[str, str | None]:
    """The import string and the name of the mount, ``None`` where there is none.

    ``"shop:app=/shop"`` -> ``("shop:app", "/shop")``. Raises :class:`~flaskbus.errors.UsageError`.
    """
    match = _APP.fullmatch(text)
    if not match:
        raise UsageError(f"{text!r} is not an app; write MODULE:APP=PREFIX, such as myapp:app=/myapp")
    return match["target"], match["mount"]


def short_name(target: str) -> str:
    """What to call an app's prefix in examples: ``"pkg.shop:app"`` -> ``"shop"``."""
    return target.partition(":")[0].rpartition(".")[2]
