"""What a system is: something that can be started, gives a URL, and has processes."""

from __future__ import annotations

import http.client
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

from benchmarks.model import Deployment
from benchmarks.processes import Children

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Running:
    """A started system. ``redis`` is its broker's URL, where it has one."""

    system: str
    port: int
    children: Children
    deployment: Deployment
    redis: str = ""

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def gate(self) -> Path:
        """The file that lets held requests go (see :mod:`benchmarks.apps`)."""
        return self.children.directory / "gate"

    def wait(self) -> None:
        """Until it answers. Raises :class:`~benchmarks.processes.StartFailed`."""
        for number in range((self.deployment.mounts or 1) if self.port else 0):
            path = f"/m{number}/hello" if self.deployment.mounts else "/hello"
            self.children.wait(lambda path=path: answers(self.port, path), f"{self.system} answers {path}")  # type: ignore[misc]


class System(Protocol):
    """One way to put an app behind a port."""

    name: str
    title: str
    note: str
    """What a reader of the figures has to know, or nothing."""

    def missing(self) -> list[str]:
        """What has to be installed, each with its command."""

    def versions(self) -> str:
        """What is installed: ``nginx 1.22.1, gunicorn 27.0.1``."""

    def start(self, deployment: Deployment, children: Children) -> Running:
        """Start its processes, without waiting until it answers."""


def answers(port: int, path: str) -> bool:
    """Whether a GET is answered with 200."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    with suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        good = connection.getresponse().status == 200
        connection.close()
        return good
    return False


def script(name: str) -> str:
    """A program that was installed beside this interpreter, or on PATH; empty where there is none."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name) or ""


def nginx() -> str:
    """nginx, which Debian puts where only root's PATH looks."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin") or ""


def packages(names: Iterable[str]) -> list[str]:
    """The distributions that are not installed, with the command that installs them."""
    return [f"{name} (pip install {name})" for name in names if not installed(name)]


def installed(name: str) -> str:
    """The version of a distribution, or nothing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
