"""The benchmark of streams, as short as it goes: it measures everything, finds what is promised, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.model import Metric, Sample
from benchmarks.watch import AFTER, BEFORE, CONNECTIONS, MEMORY, PEAK, growth
from benchmarks.works import GROUPS
from tests.integration.procs import alive, descendants, wait_until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Of a quick run, which nothing outlives."""
    out = tmp_path_factory.mktemp("streams")
    systems = ["--systems", "flaskbus,nginx-gthread,gunicorn"]
    words = [sys.executable, "-m", "benchmarks", "--only", "streams", "--quick", *systems, "--out", str(out)]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "## sse-many" in (out / "results.md").read_text()
    found = []
    for each in json.loads((out / "results.json").read_text())["samples"]:
        name, _, when = each["metric"].rpartition(", ")
        known = when in (BEFORE, PEAK, AFTER)
        metric = Metric(name if known else each["metric"], each["unit"], when=when if known else "")
        place = (each["work"], each["variant"], each["system"], each["round"])
        found.append(Sample(*place, metric, each["value"]))
    return found


@pytest.mark.timeout(400)
def test_everything_is_measured(samples: list[Sample]) -> None:
    assert {each.work for each in samples if each.system == "flaskbus"} == set(GROUPS["streams"])
    assert all(each.value >= 0 for each in samples)


@pytest.mark.timeout(400)
def test_all_streams_are_open(samples: list[Sample]) -> None:
    opened = [each.value for each in samples if each.metric.name == "streams that are open"]
    assert opened
    assert set(opened) == {100}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("work", GROUPS["streams"][1:])
def test_connections_to_the_broker_stay_as_many(samples: list[Sample], work: str) -> None:
    grown = growth(samples, work, "flaskbus", of=CONNECTIONS)
    assert grown
    assert max(grown.values()) <= 0


@pytest.mark.timeout(400)
def test_an_upload_is_in_no_process_as_a_whole(samples: list[Sample]) -> None:
    grown = growth(samples, "upload-large", "flaskbus", of=MEMORY)
    assert grown
    assert max(grown.values()) < 32  # MiB, of 128


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_it(tmp_path: Path, end: signal.Signals) -> None:
    words = [sys.executable, "-m", "benchmarks", "--only", "sse-many", "--quick", "--systems", "flaskbus"]
    with (tmp_path / "log").open("wb") as log:
        ours = subprocess.Popen([*words, "--out", str(tmp_path)], cwd=ROOT, stdout=log, stderr=log)
    started: list[int] = []

    def is_up() -> bool:
        started[:] = descendants(ours.pid)
        return (
            len(started) >= 6
        )  # the broker, a gateway, an agent with two workers each, and what watches over them

    try:
        wait_until(is_up, "it has started what it measures")
    finally:
        os.kill(ours.pid, end)
    ours.wait(60)
    wait_until(lambda: not alive(started), "all have ended")
