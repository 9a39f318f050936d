"""The apps of this agent: how they are imported in a worker, and what stands in when that fails."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from gunicorn.app.base import BaseApplication

from flaskbus.errors import AppImportError
from flaskbus.routing import Mount
from flaskbus.settings import AgentSettings
from flaskbus_agent.board import Facts
from flaskbus_agent.fingerprint import code_fingerprint, key_fingerprint
from flaskbus_agent.heartbeat import MountedApp
from flaskbus_agent.importer import import_app, import_function
from flaskbus_agent.log import LOGGER, AgentLogger, first_line

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class AgentApplication(BaseApplication):
    """gunicorn's view of an agent: its configuration, made of our settings."""

    def __init__(self, settings: AgentSettings, mounted: Sequence[MountedApp]):
        self.settings = settings
        self.mounted = tuple(mounted)
        self._withdrawn: set[Mount] = set()
        self._apps: dict[Mount, WSGIApplication] | None = None
        self._facts: Facts = {}
        self.pins: set[str] = set()
        super().__init__(prog="flaskbus-agent")

    def load_config(self) -> None:
        settings = self.settings
        values: dict[str, Any] = {
            "bind": [],
            "workers": settings.workers,
            "worker_class": "flaskbus_agent.worker.AgentWorker",
            "logger_class": AgentLogger,
            "loglevel": settings.log_level,
            "max_requests": settings.max_requests,
            "max_requests_jitter": settings.max_requests_jitter,
            "pidfile": settings.pid or None,
            "proc_name": " ".join(
                dict.fromkeys(f"{app.target}={app.mount.whole.name}" for app in self.mounted)
            ),
            # Slow is not dead: the supervisor watches for stuck handlers itself.
            "timeout": 0,
            "control_socket_disable": True,
        }
        for name, value in values.items():
            self.cfg.set(name, value)

    def apps(self) -> dict[Mount, WSGIApplication]:
        """Import every app, once in a process (or before the fork).

        Raises :class:`~flaskbus.errors.AppImportError`; but with ``reload`` a page with the traceback stands in
        for the app.
        """
        if self._apps is None:
            if self.settings.debugger:
                # Flask answers errors itself unless it is told so before the app is made.
                os.environ["FLASK_DEBUG"] = "1"
            wholes: dict[Mount, WSGIApplication] = {}
            for app in self.serving():
                if app.mount.whole not in wholes:
                    wholes[app.mount.whole] = self._import(app)
            self._apps = {app.mount: wholes[app.mount.whole] for app in self.serving()}
        return {mount: app for mount, app in self._apps.items() if mount not in self._withdrawn}

    def serving(self) -> list[MountedApp]:
        """The apps whose mount is still this agent's."""
        return [app for app in self.mounted if app.mount not in self._withdrawn]

    def withdraw(self, mount: Mount) -> int:
        """Another app owns the mount now; its index among the mounted."""
        self._withdrawn.add(mount)
        return next(index for index, app in enumerate(self.mounted) if app.mount == mount)

    def facts(self) -> Facts:
        """What the registry should know of the imported code."""
        return self._facts

    def call_worker_hook(self, worker: object) -> None:
        """Call ``on_worker_start`` with the worker. Errors are as of :meth:`apps`."""
        target = self.settings.on_worker_start
        if not target:
            return
        try:
            hook = import_function(target)
            try:
                hook(worker)
            except (Exception, SystemExit) as error:
                detail = "".join(traceback.format_exception(error))
                raise AppImportError(f"{target} raised {type(error).__name__}: {error}\n{detail}") from error
        except AppImportError as error:
            self._apps = dict.fromkeys((app.mount for app in self.mounted), self._stand_in(error))

    def _import(self, app: MountedApp) -> WSGIApplication:
        try:
            imported = import_app(app.target, factory=self.settings.factory)
        except AppImportError as error:
            return self._stand_in(error)
        key = app.mount.whole.key
        self._facts.setdefault("code", {})[key] = code_fingerprint(app.target)
        self._facts.setdefault("keys", {})[key] = key_fingerprint(imported, key)
        if not self.settings.debugger:
            return imported
        # Nobody else should pay a tenth of a second for it.
        from werkzeug.debug import DebuggedApplication

        debugged = DebuggedApplication(imported, evalex=True)
        self.pins.add(str(debugged.pin))
        return debugged

    def _stand_in(self, error: AppImportError) -> WSGIApplication:
        """What is served until the code is mended; without ``reload`` nothing is, and the error is raised."""
        if not self.settings.reload:
            raise error
        logging.getLogger(LOGGER).error("%s", error)
        self._facts["reason"] = first_line(error)
        return error_page(error)


_PAGE = """<!doctype html>
<html lang=en>
<meta charset=utf-8>
<title>{title}</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2em }} pre {{ overflow: auto }}</style>
<h1>{title}</h1>
<p>The agent loads it again as soon as a source file changes.</p>
<pre>{detail}</pre>
</html>
"""


def error_page(error: AppImportError) -> WSGIApplication:
    """An app that answers everything with 500 and what went wrong; for development only."""
    title, _, detail = str(error).partition("\n")
    if error.__cause__ is not None:
        detail = "".join(traceback.format_exception(error.__cause__))
    page = _PAGE.format(title=escape(title), detail=escape(detail)).encode()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        headers = [("Content-Type", "text/html; charset=utf-8"), ("Content-Length", str(len(page)))]
        start_response("500 Internal Server Error", [*headers, ("Cache-Control", "no-store")])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [page]

    return app
