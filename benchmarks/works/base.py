"""What a work is: a load for a running system that gives figures."""

from __future__ import annotations

import http.client
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

from benchmarks.apps import app
from benchmarks.model import Deployment, Figure, Metric, Wrong
from benchmarks.systems.base import HOST, Running

SERVERS = ("flaskbus", "nginx-gthread", "nginx-gevent", "nginx-granian", "uwsgi")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done. ``quick`` is for a look: sizes and levels shrink too."""

    rounds: int = 5
    seconds: float = 4.0
    quick: bool = False
    deployment: Deployment = field(default_factory=Deployment)

    @property
    def short(self) -> float:
        """Seconds of a run of the works that need less."""
        return max(1.0, self.seconds * 0.6)

    @property
    def few(self) -> int:
        """Rounds of the works that need less, or take long."""
        return 1 if self.quick else min(3, self.rounds)


class Work(ABC):
    """A load, and what is counted."""

    name: str
    title: str
    systems: tuple[str, ...] = SERVERS
    """The names of those that can do it."""
    baseline: str = "nginx-gthread"
    """Whose figures the others' are divided by."""
    main: Metric
    """What is plotted."""
    note: str = ""
    """What is set otherwise than by default for it."""

    def rounds(self, scale: Scale) -> int:
        """How many."""
        return scale.few

    @abstractmethod
    def variants(self, scale: Scale) -> Sequence[str]:
        """What is varied: connections, sizes, numbers of agents."""

    def deployment(self, variant: str, scale: Scale) -> Deployment:
        """What has to run for it."""
        return scale.deployment

    def missing(self) -> list[str]:
        """What has to be installed, each with its command."""
        return []

    @abstractmethod
    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        """One run. Raises :class:`~benchmarks.model.Skip` and :class:`~benchmarks.model.Wrong`."""


@cache
def expected(method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body as the app itself gives them."""
    # The app is the same on each mount.
    answer = app.test_client().open(re.sub(r"^/m\d+(?=/)", "", path), method=method, data=body)
    return answer.status_code, answer.data


def check(port: int, path: str, method: str = "GET", body: bytes = b"") -> int:
    """Ask once, and compare with the app's own answer; the size of the body. Raises Wrong."""
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    try:
        connection.request(method, path, body or None)
        answer = connection.getresponse()
        status, data = answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise Wrong(f"{method} {path}: {error!r}") from None
    finally:
        connection.close()
    if (status, data) != expected(method, path, body):
        raise Wrong(f"{method} {path}: {status} {data[:200]!r}, which is not what the app answers")
    if answer.getheader("Content-Length") != str(len(data)):
        raise Wrong(
            f"{method} {path}: Content-Length is {answer.getheader('Content-Length')}, not {len(data)}"
        )
    return len(data)
