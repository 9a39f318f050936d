"""What is installed: the wheel's content, its metadata, and the environment that the tests run in."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import flaskbus

ROOT = Path(__file__).parents[2]
SOURCES = {
    "flaskbus": ROOT / "flaskbus",
    "flaskbus_gateway": ROOT / "gateway" / "flaskbus_gateway",
    "flaskbus_agent": ROOT / "agents" / "flaskbus_agent",
}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return settings


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def info(wheel: zipfile.ZipFile) -> dict[str, bytes]:
    """The files of the wheel's ``.dist-info``, by name."""
    return {
        name.partition("/")[2]: wheel.read(name)
        for name in wheel.namelist()
        if name.partition("/")[0].endswith(".dist-info")
    }


@pytest.fixture(scope="module")
def description(info: dict[str, bytes]) -> Message:
    return message_from_bytes(info["METADATA"])


def test_wheel_has_the_three_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if not name.partition("/")[0].endswith(".dist-info")}
    sources = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in SOURCES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == sources


@pytest.mark.parametrize("package", SOURCES)
def test_wheel_tells_type_checkers_that_it_is_typed(wheel: zipfile.ZipFile, package: str) -> None:
    assert f"{package}/py.typed" in wheel.namelist()


def test_wheel_carries_the_scripts(wheel: zipfile.ZipFile) -> None:
    names = {path.name for path in (ROOT / "flaskbus" / "scripts").glob("*.lua")}
    assert {"finish.lua", "withdraw.lua", "push.lua"} <= names
    assert {f"flaskbus/scripts/{name}" for name in names} <= set(wheel.namelist())


def test_wheel_states_name_version_and_license(
    info: dict[str, bytes], description: Message, project: dict[str, Any]
) -> None:
    assert description["Name"] == project["name"]
    assert description["Version"] == project["version"]
    assert description["Requires-Python"] == project["requires-python"]
    assert description["License-Expression"] == "MIT"
    assert info["licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert len(description.get_all("Requires-Dist", [])) == len(project["dependencies"])


def test_wheel_has_the_entry_points(info: dict[str, bytes], project: dict[str, Any]) -> None:
    declared = {"console_scripts": project["scripts"], **project["entry-points"]}
    built = ConfigParser()
    built.read_string(info["entry_points.txt"].decode())
    assert {group: dict(built[group]) for group in built.sections()} == declared


def test_every_entry_point_leads_somewhere() -> None:
    points = metadata.distribution("flaskbus").entry_points
    assert {point.name for point in points} >= {"flaskbus", "flaskbus-gateway", "flaskbus-agent", "bus"}
    for point in points:
        assert point.load() is not None, point


def test_version_is_told_in_one_place(project: dict[str, Any]) -> None:
    assert metadata.version("flaskbus") == flaskbus.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_classifiers_name_the_versions_that_are_allowed(project: dict[str, Any]) -> None:
    versions = [line.rsplit(" ", 1)[1] for line in project["classifiers"] if "Python :: 3." in line]
    assert versions == ["3.11", "3.12", "3.13", "3.14"]
    assert project["requires-python"] == f">={versions[0]}"
