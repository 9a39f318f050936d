"""The soak for a few seconds: what `make soak` does for as long as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.injections import FAULTS, NEEDS_HOST
from tests.faults.oracle import Verdict
from tests.faults.partition import available
from tests.faults.report import Report
from tests.faults.soak import Soak


def soaked(directory: Path, *faults: str) -> Report:
    with Soak(directory, seed=1, clients=8) as soak:
        for fault in faults:
            soak.round(fault)
        report = soak.finish()
    assert not report.total.tally.bad, report.table()
    assert not report.left, report.table()
    return report


def test_without_a_fault_every_request_is_answered(tmp_path: Path) -> None:
    report = soaked(tmp_path, "none")
    counts = report.total.tally.counts
    assert counts[Verdict.OK] > 50
    assert set(counts) <= {Verdict.OK, Verdict.LEFT}


def test_processes_are_killed(tmp_path: Path) -> None:
    report = soaked(tmp_path, "kill-agent-worker", "kill-gateway-worker", "kill-agent")
    assert report.killed >= 3
    assert report.total.tally.counts[Verdict.OK] > 50


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault(fault: str, tmp_path: Path) -> None:
    if fault in NEEDS_HOST and not available():
        pytest.skip("network namespaces can only be made by root, with iproute2")
    report = soaked(tmp_path, fault, fault)
    assert report.total.tally.counts[Verdict.OK] > 50
