"""Many WSGI apps behind one port: HTTP requests wait in Redis, and agents pull them."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flaskbus.extension import FlaskBus as FlaskBus

__all__ = ["FlaskBus"]

__version__ = version("flaskbus")


def __getattr__(name: str) -> Any:
    # Only who uses the extension pays for importing Flask.
    if name == "FlaskBus":
        from flaskbus.extension import FlaskBus

        return FlaskBus
    raise AttributeError(f"module 'flaskbus' has no attribute {name!r}")
