"""Autobahn's cases of WebSocket conformance: through the bus they have the same verdicts as without it.

Against the gateway's own server with an ASGI app that echoes, and against flask-sock's echo behind gateway, broker
and agent. All of them take about a minute: ``pytest tests/integration/test_autobahn.py``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from flaskbus import embedded
from flaskbus.routing import Mount
from flaskbus.testing import running_bus
from tests.conftest import free_port
from tests.integration.fleet import eventually

ROOT = Path(__file__).parents[2]
CASES = 517

AGAIN = 10
"""How often cases with another verdict are tried again."""

ABORTS = 3
"""How often the client may be tried that bends its interpreter, which some do not survive each time."""

FINE: set[str | int | None] = {"OK", "NON-STRICT", "INFORMATIONAL"}
"""Verdicts of a server that keeps the rules; NON-STRICT is within them."""

COMPRESSION = ("12.", "13.")
"""Cases of permessage-deflate, which neither server offers."""

Verdicts = dict[str, list[str | int | None]]


def drive(url: str, cases: Sequence[str]) -> Verdicts:
    command = [sys.executable, "-m", "tests.integration.autobahn", url, *cases]
    for _ in range(ABORTS):
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE)
        if done.returncode != -signal.SIGABRT:
            break
    done.check_returncode()
    verdicts: Verdicts = json.loads(done.stdout)
    return verdicts


@contextmanager
def program(log: Path, *command: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT, env={**os.environ, **environ}, stdout=output, stderr=output,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)
            print(log.read_text()[-4000:])


@contextmanager
def without_the_bus(folder: Path) -> Iterator[str]:
    port = free_port()
    log = folder / "server.log"
    with program(log, "tests.integration.apps.asgi_echo", str(port)) as server:
        eventually(lambda: b"listening on" in log.read_bytes() or server.poll() is not None, "the server")
        yield f"ws://127.0.0.1:{port}/"


@contextmanager
def through_the_bus(folder: Path) -> Iterator[str]:
    with embedded.start() as broker, running_bus(broker.url) as bus:
        environ = {"FLASKBUS_REDIS_URL": broker.url, "LEDGER": str(folder / "ledger")}
        command = ["flaskbus_agent", "tests.integration.apps.sockets:app=/ws"]
        with program(folder / "agent.log", *command, **environ) as agent:
            bus.await_route(Mount.parse("/ws"))
            assert agent.poll() is None
            yield bus.url.replace("http", "ws") + "/ws/echo"


def compare(folder: Path, cases: Sequence[str]) -> Verdicts:
    """The verdicts without the bus, among which those through it have to be.

    Some depend on how the client's bytes come in: whether it is echoed what was sent right before a broken frame.
    """
    with without_the_bus(folder) as plain, through_the_bus(folder) as url:
        direct, bus = drive(plain, cases), drive(url, cases)
        seen = {case: [verdict] for case, verdict in direct.items()}
        # Most cases give a server one second, and a machine that runs tests may have better things to do.
        for _ in range(AGAIN):
            if late := [case for case in direct if bus.get(case) not in seen[case]]:
                for case, verdict in drive(plain, late).items():
                    seen[case].append(verdict)
                bus |= drive(url, late)
    different = {case: (seen[case], bus.get(case)) for case in direct if bus.get(case) not in seen[case]}
    assert not different, "case: without the bus, through it"
    broken = {case: verdict for case, verdict in bus.items() if not {*verdict[:2]} <= FINE}
    assert not {case: verdict for case, verdict in broken.items() if not case.startswith(COMPRESSION)}
    return direct


def test_some_of_each_kind(tmp_path: Path) -> None:
    cases = ["1.1.*", "2.*", "3.1", "4.1.1", "5.1*", "6.3.*", "7.1.*", "7.3.*", "7.7.*", "10.*"]
    assert len(compare(tmp_path, cases)) > 50


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_conformance(tmp_path: Path) -> None:
    verdicts = compare(tmp_path, [])
    assert len(verdicts) >= CASES
    unimplemented = {case for case, verdict in verdicts.items() if verdict[0] == "UNIMPLEMENTED"}
    assert all(case.startswith(COMPRESSION) for case in unimplemented)
