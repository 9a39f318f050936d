"""The app alone, called through its WSGI callable: the limit of one core, with no server at all."""

from __future__ import annotations

from benchmarks.model import Deployment
from benchmarks.processes import Children
from benchmarks.systems.base import Running


class InProcess:
    name = "in-process"
    title = "the app alone, in process"
    note = "one process on one core, no HTTP: the limit"

    def missing(self) -> list[str]:
        return []

    def versions(self) -> str:
        return ""

    def start(self, deployment: Deployment, children: Children) -> Running:
        return Running(self.name, 0, children, deployment)
