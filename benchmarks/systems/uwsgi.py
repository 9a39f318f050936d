"""uWSGI: its own HTTP router, to which the app's servers subscribe. The nearest relative: apps announce themselves."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.apps import GATE
from benchmarks.model import Deployment
from benchmarks.processes import Children
from benchmarks.systems.base import HOST, Running, script
from flaskbus.embedded import free_port


class Uwsgi:
    name = "uwsgi"
    title = "uWSGI router + subscription"
    note = (
        "its router needs some 40 ms for a response of 10 KiB on a kept connection, as where Nagle's algorithm meets "
        "delayed acknowledgements; --tcp-nodelay changes nothing"
    )

    def missing(self) -> list[str]:
        return [] if script("uwsgi") else ["uwsgi (pip install uwsgi, which needs a C compiler)"]

    def versions(self) -> str:
        said = subprocess.run([script("uwsgi"), "--version"], capture_output=True, text=True, check=True)
        return f"uWSGI {said.stdout.strip()}"

    def start(self, deployment: Deployment, children: Children) -> Running:
        port, subscriptions = free_port(), free_port()
        # Two router processes, as nginx has two on two cores; client connections are kept.
        words = [script("uwsgi"), "--master", "--die-on-term", "--disable-logging", "--listen", _backlog()]
        router = ["--http", f"{HOST}:{port}", "--http-processes", "2", "--http-keepalive"]
        router += ["--http-auto-chunked", "--http-timeout", "300", "--http-websockets"]
        router += ["--http-subscription-server", f"{HOST}:{subscriptions}"]
        children.start("router", [*words, *router])
        callable_name = "mounted" if deployment.mounts else "app"
        for host in range(deployment.hosts):
            socket = children.directory / f"app{host}.sock"
            app = ["--socket", str(socket), "--module", f"benchmarks.apps:{callable_name}", "--need-app"]
            # The key is the Host header that clients send.
            app += ["--subscribe-to", f"{HOST}:{subscriptions}:{HOST}:{port}"]
            app += ["--processes", str(deployment.processes), "--threads", str(deployment.at_once)]
            # Each process imports the app itself, as everybody else's do.
            app += ["--lazy-apps", "--enable-threads", "--socket-timeout", "300"]
            children.start("app", [*words, *app], {GATE: str(children.directory / "gate")})
        return Running(self.name, port, children, deployment)


def _backlog() -> str:
    """As long a queue as everybody else asks for; uWSGI does not start if the kernel has a shorter one."""
    return str(min(2048, int(Path("/proc/sys/net/core/somaxconn").read_text())))
