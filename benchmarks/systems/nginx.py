"""nginx in front of servers on Unix sockets, configured as one would in production."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.apps import GATE
from benchmarks.model import Deployment
from benchmarks.processes import Children
from benchmarks.systems.base import HOST, Running, installed, nginx, packages, script
from flaskbus.embedded import free_port

_CONFIGURATION = """\
# As many workers as there are cores, in the foreground so that they end with us.
worker_processes auto;
daemon off;
# Root's nginx would become somebody who may not look into our directory.
{user}
pid {directory}/nginx.pid;
error_log {directory}/nginx-error.log warn;
worker_rlimit_nofile 20000;
events {{ worker_connections 8192; multi_accept on; }}

http {{
    # Nobody else writes an access log either.
    access_log off;
    server_tokens off;
    tcp_nodelay on;
    # Clients may stay: the default ends a connection after 1,000 requests, and wrk would connect anew.
    keepalive_timeout 75s;
    keepalive_requests 1000000;

    # 100 KiB of a response in memory; larger ones flow at the client's pace and not through a file.
    proxy_buffers 16 16k;
    proxy_buffer_size 16k;
    proxy_max_temp_file_size 0;
    # A small body in memory, of any size at all: the works send up to 1 GiB.
    client_body_buffer_size 128k;
    client_max_body_size 0;
    client_body_temp_path {directory}/client_body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;

    upstream app {{
{servers}
        # Connections to the app stay open, as many as can be busy at once.
        keepalive 512;
        keepalive_requests 1000000;
        # Less than the app's own limit, so that the app never closes one that is about to be used.
        keepalive_timeout 60s;
    }}
    # A kept connection stays with the process that accepted it, which may be busy while another is not. For an app
    # that computes that is the cheaper way; one that waits does better with a new connection for each request.
    upstream waiting {{
{servers}
    }}
    # A WebSocket needs Connection: upgrade; all else needs it empty, so that upstream connections are kept.
    map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}

    server {{
        listen {host}:{port} backlog=4096;
        proxy_http_version 1.1;
        proxy_set_header Host $host;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $connection_upgrade;
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        proxy_set_header X-Forwarded-Proto $scheme;
        # An app that is slow under load is no reason to try another.
        proxy_read_timeout 300s;
        proxy_next_upstream off;
        location / {{ proxy_pass http://app; }}
        location /sleep/ {{ proxy_pass http://waiting; }}
        # Large uploads go to the app as they come, not through a file first.
        location /upload {{ proxy_pass http://app; proxy_request_buffering off; }}
    }}
}}
"""


def configuration(directory: Path, port: int, sockets: Sequence[Path]) -> str:
    """``nginx.conf`` for servers that listen on Unix sockets. Round robin, which is nginx's default."""
    # One that was slow is not taken for dead: with two app hosts that would be half of the capacity.
    servers = "\n".join(f"        server unix:{socket} max_fails=0;" for socket in sockets)
    user = "user root;" if os.geteuid() == 0 else ""
    return _CONFIGURATION.format(user=user, directory=directory, host=HOST, port=port, servers=servers)


def start_nginx(name: str, deployment: Deployment, children: Children, sockets: Sequence[Path]) -> Running:
    port = free_port()
    file = children.directory / "nginx.conf"
    file.write_text(configuration(children.directory, port, sockets))
    children.start("nginx", [nginx(), "-e", str(children.directory / "nginx-error.log"), "-c", str(file)])
    return Running(name, port, children, deployment)


def missing_nginx() -> list[str]:
    return [] if nginx() else ["nginx (apt-get install nginx)"]


def nginx_version() -> str:
    said = subprocess.run([nginx(), "-v"], capture_output=True, text=True, check=True)
    return said.stderr.strip().rpartition("/")[2]


class NginxGranian:
    name = "nginx-granian"
    title = "nginx → granian"
    note = "WSGI interface; HTTP is parsed in Rust"

    def missing(self) -> list[str]:
        return missing_nginx() + packages(["granian"])

    def versions(self) -> str:
        return f"nginx {nginx_version()}, granian {installed('granian')}"

    def start(self, deployment: Deployment, children: Children) -> Running:
        app = "benchmarks.apps:mounted" if deployment.mounts else "benchmarks.apps:app"
        sockets = [children.directory / f"app{host}.sock" for host in range(deployment.hosts)]
        for socket in sockets:
            words = [script("granian") or sys.executable, "--interface", "wsgi", "--uds", str(socket)]
            words += ["--workers", str(deployment.processes), "--blocking-threads", str(deployment.at_once)]
            # HTTP/1.1 is what nginx speaks; without WebSockets granian has less to look at in each request.
            words += ["--http", "1", "--no-ws", "--log-level", "warning", app]
            children.start("app", words, {GATE: str(children.directory / "gate")})
        return start_nginx(self.name, deployment, children, sockets)
