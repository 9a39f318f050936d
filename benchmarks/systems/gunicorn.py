"""gunicorn: behind nginx with threads or with gevent, and alone for what is compared with it alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.apps import GATE
from benchmarks.model import Deployment
from benchmarks.processes import Child, Children
from benchmarks.systems.base import HOST, Running, installed, packages
from benchmarks.systems.nginx import missing_nginx, nginx_version, start_nginx
from flaskbus.embedded import free_port


def start_gunicorn(children: Children, deployment: Deployment, bind: str, *options: str) -> Child:
    """One host's server; ``options`` name the worker class and the app."""
    words = [sys.executable, "-m", "gunicorn", "--bind", bind, "--workers", str(deployment.processes)]
    # Connections are kept longer than nginx keeps them; heartbeats in memory, as gunicorn's documentation advises.
    words += ["--keep-alive", "75", "--worker-connections", "20000", "--worker-tmp-dir", "/dev/shm"]  # noqa: S108
    words += ["--timeout", "300", "--log-level", "warning", *options]
    return children.start("app", words, {GATE: str(children.directory / "gate")})


def _app(deployment: Deployment) -> str:
    return "benchmarks.apps:mounted" if deployment.mounts else "benchmarks.apps:app"


class NginxGunicorn:
    """nginx, and gunicorn with a worker class."""

    def __init__(self, worker: str) -> None:
        self.name = f"nginx-{worker}"
        self.title = f"nginx → gunicorn {worker}"
        self._worker = worker
        self.note = (
            "" if worker == "gthread" else "has no threads: a process runs any number of requests at a time"
        )

    def missing(self) -> list[str]:
        needs = ["gunicorn", "gevent"] if self._worker == "gevent" else ["gunicorn"]
        return missing_nginx() + packages(needs)

    def versions(self) -> str:
        gevent = f", gevent {installed('gevent')}" if self._worker == "gevent" else ""
        return f"nginx {nginx_version()}, gunicorn {installed('gunicorn')}{gevent}"

    def start(self, deployment: Deployment, children: Children) -> Running:
        sockets = [children.directory / f"app{host}.sock" for host in range(deployment.hosts)]
        for socket in sockets:
            start_gunicorn(children, deployment, f"unix:{socket}", *self._options(deployment))
        return start_nginx(self.name, deployment, children, sockets)

    def _options(self, deployment: Deployment) -> Sequence[str]:
        threads = ["--threads", str(deployment.at_once)] if self._worker == "gthread" else []
        return ["--worker-class", self._worker, *threads, _app(deployment)]


class Gunicorn:
    """Without nginx: for WebSockets, and for what a start costs."""

    name = "gunicorn"
    title = "gunicorn gthread alone"
    note = ""

    def missing(self) -> list[str]:
        return packages(["gunicorn"])

    def versions(self) -> str:
        return f"gunicorn {installed('gunicorn')}"

    def start(self, deployment: Deployment, children: Children) -> Running:
        port = free_port()
        options = ["--worker-class", "gthread", "--threads", str(deployment.at_once), _app(deployment)]
        start_gunicorn(children, deployment, f"{HOST}:{port}", *options)
        return Running(self.name, port, children, deployment)


class GunicornAsgi:
    """The server that the gateway is built on, with an app that only waits: what a held request costs without a bus."""

    name = "gunicorn-asgi"
    title = "gunicorn's ASGI worker alone"
    note = "no app behind it: it holds requests by itself"

    def missing(self) -> list[str]:
        return packages(["gunicorn", "uvloop"])

    def versions(self) -> str:
        return f"gunicorn {installed('gunicorn')}, uvloop {installed('uvloop')}"

    def start(self, deployment: Deployment, children: Children) -> Running:
        port = free_port()
        options = ["--worker-class", "asgi", "benchmarks.asgi_app:app"]
        start_gunicorn(children, Deployment(processes=1), f"{HOST}:{port}", *options)
        return Running(self.name, port, children, deployment)
