"""A cut at any byte of any command or answer between us and the broker loses no reply, unless the answer says so."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import Broker
from tests.faults.cuts import Bench, cut_all
from tests.faults.oracle import Verdict


def cut_every(step: int, seed: int, broker: Broker, directory: Path, limit: int | None = None) -> None:
    port = urlsplit(broker.url).port
    assert port is not None
    bench = Bench(directory, port, seed=seed)
    count = asyncio.run(cut_all(bench, step, random.Random(seed), limit))
    assert bench.fired > 0.8 * count, "most of the cuts were made"
    assert not bench.complaints
    assert not bench.tally.bad
    assert bench.tally.counts[Verdict.OK] > count
    with broker.client() as client:
        client.delete("cuts:mounts", "cuts:gateways", *client.scan_iter("cuts:{*"))


def test_some_cuts(broker: Broker, tmp_path: Path) -> None:
    cut_every(100, 1, broker, tmp_path, limit=20)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_twentieth_byte(broker: Broker, tmp_path: Path) -> None:
    cut_every(20, 2, broker, tmp_path)
