"""Other people's apps twice: behind the bus, in processes of their own, and under gunicorn without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from flaskbus import embedded
from flaskbus.testing import Bus, running_bus
from tests.conftest import free_port
from tests.integration.apps.together import MOUNTS

ROOT = Path(__file__).parents[2]
START_TIMEOUT = 30.0
THREADS = 8


@dataclass(frozen=True)
class Site:
    """The same apps at two URLs."""

    bus: str
    direct: str


@pytest.fixture(scope="session")
def bus() -> Iterator[Bus]:
    """A gateway, and a broker that no other test empties."""
    with embedded.start() as broker, running_bus(broker.url) as started:
        yield started


@pytest.fixture(scope="session")
def site(bus: Bus, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The apps of :data:`MOUNTS` from an agent process, and from gunicorn with threads."""
    folder = tmp_path_factory.mktemp("site")
    package = "tests.integration.apps"
    apps = [f"{package}.{app}={prefix}" for prefix, app in MOUNTS.items()]
    make_database(folder / "django.sqlite")
    port = free_port()
    direct = f"http://127.0.0.1:{port}"
    with (
        process(
            folder / "direct",
            ["gunicorn", "--worker-class=gthread", f"--threads={THREADS}", f"--bind=127.0.0.1:{port}",
             f"{package}.together:create_app()"],
            {},
        ) as gunicorn,
        process(
            folder / "agent",
            ["flaskbus_agent", f"--threads={THREADS}", *apps],
            {"FLASKBUS_REDIS_URL": bus.broker_url},
        ) as agent,
    ):  # fmt: skip
        wait_for(direct, gunicorn)
        wait_for(bus.url, agent)
        yield Site(bus.url, direct)


def make_database(path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "tests.integration.apps.django_site"],
        cwd=ROOT,
        env={**os.environ, "DJANGO_SITE_DATABASE": str(path)},
        check=True,
    )


@dataclass
class Started:
    process: subprocess.Popen[bytes]
    output: Path


@contextmanager
def process(folder: Path, module: list[str], environ: Mapping[str, str]) -> Iterator[Started]:
    """``python -m MODULE``, with a Django database of its own."""
    folder.mkdir()
    output = folder / "output"
    shutil.copy(folder.parent / "django.sqlite", folder)
    environment = {
        **os.environ,
        "DJANGO_SITE_DATABASE": str(folder / "django.sqlite"),
        "PYTHONHASHSEED": "0",  # an Allow header is made from a set
        **environ,
    }
    with output.open("wb") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", *module], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        try:
            yield Started(started, output)
        finally:
            started.terminate()
            started.wait(START_TIMEOUT)


def wait_for(url: str, started: Started) -> None:
    """Until the apps answer."""
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            if httpx.get(url, timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert started.process.poll() is None, started.output.read_text()
        assert time.monotonic() < deadline, started.output.read_text()
        time.sleep(0.05)
