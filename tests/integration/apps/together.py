"""All the apps together: where each is mounted, and the site as one WSGI server without the bus has it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from werkzeug.middleware.dispatcher import DispatcherMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

MOUNTS = {
    "/": "bare:app",
    "/deep/er": "bare:app",
    "/größe": "bare:app",
    "/httpbin": "bins:plain",
    "/checked/httpbin": "bins:checked",
    "/django": "django_site:app",
    "/journal": "journal:plain",
    "/checked/journal": "journal:checked",
    "/diary": "journal:written",
    "/bottle": "bottled:app",
}
"""Prefix -> app, as a module of this folder and its attribute."""


def load(app: str) -> WSGIApplication:
    module, _, name = app.partition(":")
    loaded: WSGIApplication = getattr(import_module(f"{__package__}.{module}"), name)
    return loaded


def create_app() -> WSGIApplication:
    # PEP 3333 has the bytes of a path as latin-1.
    below = {prefix.encode().decode("latin-1"): load(app) for prefix, app in MOUNTS.items() if prefix != "/"}
    return DispatcherMiddleware(load(MOUNTS["/"]), below)
