"""README, tried: its commands are run as they stand there, and must print what it says they print.

How a block of README is marked:

- ``console``: commands after ``$``, then their output. Those of one ``##`` section share a shell.
- ``console serve``: one command that runs on until the section ends; its output is awaited.
- ``python`` with a first line such as ``# myapp.py``: that file, for all sections.
- anything else is not run.

In an output, ``…`` stands for anything, and so do dates and each word of four letters or more that has a digit
in it: ports, ids, times. Port 5000 and the default broker become ones of the test's own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Broker, free_port

README = Path(__file__).parents[2] / "README.md"
DEFAULT_PORT, DEFAULT_BROKER = "5000", "redis://127.0.0.1:6379/0"
PATIENCE = 20.0
"""Seconds after which an output that differs is a failure."""

_BLOCK = re.compile(r"^(?:## (?P<title>[^\n]+)|```(?P<kind>[a-z][a-z ]*)\n(?P<text>.*?)^```)$", re.M | re.S)
_VARIES = re.compile(r"[\w.:+-]*\d[\w.:+-]*")
_DATE = re.compile(r"\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT")
_AGAIN = ("for ", "curl ", "redis-cli ", "flaskbus ", "flask ", "tail ")
"""What asks and changes nothing can be asked again."""


@dataclass(frozen=True)
class Step:
    """A command, and what it prints; ``serve`` if it runs on."""

    command: str
    output: str
    serve: bool = False


def read(text: str) -> tuple[dict[str, list[Step]], dict[str, str]]:
    """The steps of each section, and the files."""
    sections: dict[str, list[Step]] = {}
    files: dict[str, str] = {}
    title = ""
    for found in _BLOCK.finditer(text):
        if found["title"]:
            title = found["title"]
        elif found["kind"].startswith("console"):
            steps = sections.setdefault(title, [])
            steps += read_steps(found["text"], serve=found["kind"] == "console serve")
        elif name := re.match(r"# (\S+\.\w+)\n", found["text"]):
            files[name[1]] = found["text"]
    return sections, files


def read_steps(text: str, *, serve: bool) -> Iterator[Step]:
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        lines = part.split("\n")
        length = 1
        while lines[length - 1].endswith("\\"):
            length += 1
        yield Step("\n".join(lines[:length]), "\n".join(lines[length:]).strip(), serve)


def pattern(output: str) -> re.Pattern[str]:
    """What an output as README shows it may look like."""
    words = []
    for word in _DATE.sub("… GMT", output).split():
        parts = re.split(f"(…|{_VARIES.pattern})", word)
        for index, part in enumerate(parts):
            if part == "…":
                parts[index] = ".*?"
            elif index % 2 and len(part) > 3:
                parts[index] = r"\S+?"
            else:
                parts[index] = re.escape(part)
        words.append("".join(parts))
    return re.compile(r"\s*" + r"\s+".join(words) + r"\s*", re.S)


class Shell:
    """A bash in a directory of its own; its jobs are process groups, as in a terminal."""

    def __init__(self, directory: Path, port: int, broker: str):
        self.directory = directory
        self.port, self.broker = str(port), broker
        self._log = directory.parent / "shell.log"
        programs = directory.parent / "bin"
        programs.mkdir()
        (programs / "redis-cli").write_text('#!/bin/sh\nexec flaskbus redis --no-raw "$@"\n')
        (programs / "redis-cli").chmod(0o755)
        here = str(Path(sys.executable).parent)
        self._env = os.environ | {
            "PATH": os.pathsep.join((here, str(programs), os.environ["PATH"])),
            "HOME": str(directory),
            "LC_ALL": "C.UTF-8",
            "FLASKBUS_REDIS_URL": broker,
            "FLASKBUS_PORT": str(port),
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "--norc"],
                cwd=directory,
                env=self._env,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._read = 0
        self._served = 0
        self.run("set -m")

    def own(self, text: str) -> str:
        """Port and broker of README -> of this test."""
        text = text.replace(DEFAULT_BROKER, self.broker)
        return re.sub(rf"\b{DEFAULT_PORT}\b", self.port, text)

    def run(self, command: str) -> str:
        """What a command prints."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\necho; echo '<end of output>'\n".encode())
        self._process.stdin.flush()
        deadline = time.monotonic() + PATIENCE
        while True:
            output, end, _ = self._log.read_bytes()[self._read :].partition(b"\n<end of output>\n")
            if end:
                self._read += len(output) + len(end)
                return output.decode()
            assert time.monotonic() < deadline, f"$ {command}\ndoes not end:\n{output.decode()}"
            time.sleep(0.02)

    def serve(self, command: str) -> Path:
        """Start a command that runs on; the file that it prints to."""
        self._served += 1
        log = self.directory.parent / f"served-{self._served}.log"
        log.touch()  # the job makes it too, but maybe later than somebody looks
        # It is meant to bring a broker of its own.
        without = "env -u FLASKBUS_REDIS_URL " if command.startswith("flaskbus dev ") else ""
        self.run(f"{without}{command} > {log} 2>&1 &")
        return log

    def try_step(self, step: Step) -> None:
        command, expected = self.own(step.command), self.own(step.output)
        wanted = pattern(expected)
        log = self.serve(command) if step.serve else None
        deadline = time.monotonic() + PATIENCE
        while True:
            output = log.read_text() if log else self.run(command)
            if wanted.search(output) if step.serve else wanted.fullmatch(output):
                return
            again = step.serve or command.startswith(_AGAIN)
            if not again or time.monotonic() > deadline:
                pytest.fail(f"$ {command}\nprints\n{output}\nand README says\n{expected}", pytrace=False)
            time.sleep(0.1)

    def close(self) -> None:
        """End the jobs, and what they started."""
        groups = [int(pid) for pid in self.run("jobs -p").split()]
        for number, patience in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
            for group in groups:
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGCONT)
                    os.killpg(group, number)
            deadline = time.monotonic() + patience
            while any(map(exists, groups)) and time.monotonic() < deadline:
                self.run("jobs > /dev/null")  # bash reaps them
                time.sleep(0.05)
        self._process.communicate(b"exit\n", timeout=5)


def exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def shell(directory: Path, broker: Broker) -> Iterator[Shell]:
    shell = Shell(directory, free_port(), broker.url)
    try:
        yield shell
    finally:
        shell.close()


SECTIONS, FILES = read(README.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_commands(title: str, tmp_path: Path, broker: Broker) -> None:
    for program in ("bash", "curl"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    with broker.client() as client:
        client.flushall()
    home = tmp_path / "home"
    home.mkdir()
    for name, text in FILES.items():
        (home / name).write_text(text, encoding="utf-8")
    with shell(home, broker) as own:
        for step in SECTIONS[title]:
            own.try_step(step)


def test_readme_is_read() -> None:
    """The commands that README must show are among those that are run."""
    commands = [step.command for steps in SECTIONS.values() for step in steps]
    for beginning in ("flaskbus-gateway", "flaskbus-agent", "flaskbus dev", "redis-cli XPENDING", "flask "):
        assert any(command.startswith(beginning) for command in commands), beginning


def test_links_lead_somewhere() -> None:
    """In README and the docs alike."""
    pages = [README, README.with_name("CONTRIBUTING.md"), *README.parent.joinpath("docs").rglob("*.md")]
    broken = [
        f"{page.relative_to(README.parent)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken


def test_tests_that_the_docs_name_exist() -> None:
    """``file::test`` in the guarantees is a promise too."""
    named = re.findall(
        r"`(tests/[\w/]+\.py)::([\w:]+)`",
        README.parent.joinpath("docs/guarantees.md").read_text(encoding="utf-8"),
    )
    assert named
    for file, test in named:
        source = (README.parent / file).read_text(encoding="utf-8")
        for part in test.split("::"):
            assert re.search(rf"\b(?:class|def) {part}\b", source), f"{file}::{test}"
