"""A host of its own for an agent, with one cable to the broker's, which can be pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

NEAR, FAR = "10.91.{}.1", "10.91.{}.2"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@cache
def available() -> bool:
    """Whether this machine lets us make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        with Host():
            return True
    except subprocess.CalledProcessError:
        return False


def unused(first: int) -> int:
    """The number of a network that no cable has: a run that was killed leaves its own behind."""
    shown = subprocess.run(["ip", "-brief", "address"], check=True, capture_output=True, text=True).stdout
    numbers = [*range(first, 250), *range(first)]
    number: int = next(number for number in numbers if f" {NEAR.format(number)}/" not in shown)
    return number


class Host:
    """A network namespace; a context manager."""

    def __init__(self) -> None:
        number = unused(os.getpid() % 250)
        self.name = f"flaskbus-soak-{os.getpid()}"
        self.cable = f"soak{os.getpid()}"
        self.address, self._own = NEAR.format(number), FAR.format(number)
        self.inside = ("ip", "netns", "exec", self.name)

    def url_of(self, broker_url: str) -> str:
        """The broker, as it is reached from here."""
        return f"redis://{self.address}:{urlsplit(broker_url).port}/0"

    def __enter__(self) -> Self:
        ip("netns", "add", self.name)
        try:
            ip("link", "add", self.cable, "type", "veth", "peer", "name", "uplink", "netns", self.name)
            ip("address", "add", f"{self.address}/30", "dev", self.cable)
            ip("-n", self.name, "address", "add", f"{self._own}/30", "dev", "uplink")
            ip("-n", self.name, "link", "set", "lo", "up")
            ip("-n", self.name, "link", "set", "uplink", "up")
            self.mend()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The cable first: a namespace takes its end down later, when nobody waits any more.
        for thing in (("link", "delete", self.cable), ("netns", "delete", self.name)):
            subprocess.run(["ip", *thing], check=False, capture_output=True)

    def pull(self) -> None:
        """Nothing arrives any more, in either direction, and nobody is told."""
        ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        ip("link", "set", self.cable, "up")
