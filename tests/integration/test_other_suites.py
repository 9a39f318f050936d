"""Other people's test suites give the same verdicts through the bus as without it.

The suites come from the source distributions of the installed versions, which pip fetches. What carries their
requests over is ``through_bus.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HERE = Path(__file__).parent

SUITES: dict[str, tuple[str, str, str, set[str]]] = {
    "httpbin": (
        "httpbin", ".", "tests",
        # It expects that the server knows no chunked uploads; this one does.
        {"test_post_chunked"},
    ),
    "flask's tutorial": ("flask", "examples/tutorial", "tests", set()),
    "bottle": (
        "bottle", ".", "test",
        # It answers with 1xx, which is no final status of HTTP.
        {"test_truncate_body"},
    ),
}  # fmt: skip
"""Distribution, folder, tests, and those whose verdict differs."""


@pytest.mark.parametrize("suite", SUITES)
def test_same_verdicts(suite: str, tmp_path: Path) -> None:
    distribution, folder, tests, different = SUITES[suite]
    place = source(distribution, tmp_path) / folder
    directly = verdicts(place, tests, tmp_path / "direct.xml", "no:flaskbus")
    behind = verdicts(place, tests, tmp_path / "bus.xml", "through_bus")
    assert len(directly) > 20
    assert set(directly.values()) == {"passed"}
    assert directly.keys() == behind.keys()
    assert {name.rpartition(".")[2] for name in directly if directly[name] != behind[name]} == different


def source(distribution: str, folder: Path) -> Path:
    """The source distribution of the installed version, unpacked."""
    wanted = f"{distribution}=={version(distribution)}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        distribution,
        wanted,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        pytest.skip(f"pip cannot fetch the source of {wanted}: {done.stderr.strip()[-300:]}")
    with tarfile.open(archives[0]) as archive:
        # CPython 3.11 has the filter only since its fourth release.
        safe: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder, **safe)
    return next(path for path in folder.iterdir() if path.is_dir())


def verdicts(folder: Path, tests: str, report: Path, plugin: str) -> dict[str, str]:
    """Test -> ``passed``, ``failure``, ``error`` or ``skipped``."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        plugin,
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", str(HERE)]), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [*command, tests], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert report.exists(), done.stdout + done.stderr
    if plugin == "through_bus":
        assert "requests through the bus: 0" not in done.stdout
        assert "requests through the bus: " in done.stdout
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next(
            (child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed"
        )
        found[f"{case.get('classname')}.{case.get('name')}"] = outcome
    return found
