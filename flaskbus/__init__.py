"""Many WSGI apps behind one port: HTTP requests wait in Redis, and agents pull them."""

from importlib.metadata import version

__version__ = version("flaskbus")
