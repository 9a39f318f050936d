"""The soak for a few seconds: what `make soak` does for as long as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.injections import FAULTS, NEEDS_HOST
from tests.faults.oracle import Verdict
from tests.faults.partition import available
from tests.faults.report import Report, counted
from tests.faults.soak import Soak, main


def soaked(directory: Path, *faults: str) -> Report:
    with Soak(directory, seed=1, clients=8) as soak:
        for fault in faults:
            soak.round(fault)
        report = soak.finish()
    assert not report.total.tally.bad, report.table()
    assert not report.left
    return report


def test_some_faults(tmp_path: Path) -> None:
    report = soaked(tmp_path, "none", "kill-agent-worker", "kill-gateway-worker")
    assert report.killed == 2
    assert report.total.tally.counts[Verdict.OK] > 50


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault(fault: str, tmp_path: Path) -> None:
    if fault in NEEDS_HOST and not available():
        pytest.skip("network namespaces can only be made by root, with iproute2")
    report = soaked(tmp_path, fault, fault)
    counts = report.total.tally.counts
    assert counts[Verdict.OK] > 50
    if fault == "none":
        assert set(counts) <= {Verdict.OK, Verdict.LEFT}, "what is told without a fault is nobody's fault"


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [
        ("seconds", "-1", 0),
        ("seconds", "nan", 0),
        ("rounds", "-1", 0),
        ("requests", "-1", 0),
        ("clients", "0", 1),
    ],
)
def test_nonsense_is_refused(option: str, value: str, least: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([f"--{option}", value])
    assert end.value.code == 2
    assert f"--{option} must be at least {least}" in capsys.readouterr().err


def test_numbers_are_worded() -> None:
    assert [counted(number, "kill") for number in (0, 1, 1106)] == ["0 kills", "1 kill", "1,106 kills"]
