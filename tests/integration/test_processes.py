"""Several children in one terminal: their lines, their ends, and ours. The owner is a process of its own."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flaskbus.processes import GRACE, LONGEST_LINE, QUICK, Console, Processes

from .procs import alive, descendants, wait_until

OWNER = """
import os, sys
from flaskbus.processes import Console, Processes

children = [script for script in sys.argv[1:]]
console = Console(sys.stdout, ["own", "a", "b"], colour=False)
with Processes(console) as processes:
    for name, script in zip("ab", children):
        processes.start(name, [sys.executable, "-c", script], os.environ)
    while not processes.stopping and processes.running:
        for process in processes.step(10):
            console.say("own", f"{process.name} ended with {process.code}")
    console.say("own", "stopping")
console.say("own", "end")
"""
# A handler that prints may meet a print that is not over.
POLITE = """
import os, signal, sys, time
def end(*args): os.write(1, b"ending\\n"); sys.exit()
signal.signal(signal.SIGTERM, end)
print("started", flush=True)
while True: time.sleep(60)
"""
STUBBORN = """
import signal, subprocess, sys, time
for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
subprocess.Popen(["sleep", "600"])
print("started", flush=True)
while True: time.sleep(60)
"""


class Owner:
    """A process that runs :data:`OWNER`, and what it writes."""

    def __init__(self, output: Path, *scripts: str, **options: Any):
        self.output = output
        with output.open("wb") as file:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", OWNER, *scripts], stdout=file, stderr=file, **options
            )

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, text: str, times: int = 1) -> None:
        wait_until(lambda: self.text().count(text) >= times or self.popen.poll() is not None, text)
        assert self.text().count(text) >= times, self.text()

    def family(self) -> list[int]:
        return descendants(self.popen.pid)


@pytest.fixture
def owners() -> Iterator[list[Owner]]:
    started: list[Owner] = []
    yield started
    for owner in started:
        for pid in alive(owner.family()):
            os.kill(pid, signal.SIGKILL)
        owner.popen.kill()
        owner.popen.wait()


def test_lines_come_under_names_of_one_width(tmp_path: Path, owners: list[Owner]) -> None:
    script = "import sys; print('one\\ntwo', flush=True); sys.stderr.write('no end'); sys.exit(7)"
    owners.append(owner := Owner(tmp_path / "out", script))
    assert owner.popen.wait(30) == 0
    assert owner.text().splitlines() == [
        "a   | one",
        "a   | two",
        "a   | no end",
        "own | a ended with 7",
        "own | stopping",
        "own | end",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_owner_alone_ends_all_in_good_order(
    tmp_path: Path, owners: list[Owner], number: signal.Signals
) -> None:
    owners.append(owner := Owner(tmp_path / "out", POLITE, POLITE))
    owner.wait_for("started", 2)
    family = owner.family()
    assert len(family) == 3  # and the guard
    owner.popen.send_signal(number)
    assert owner.popen.wait(30) == 0
    assert not alive(family)
    assert owner.text().count("| ending") == 2


def test_ctrl_c_of_a_terminal_reaches_the_owner_only(tmp_path: Path, owners: list[Owner]) -> None:
    owners.append(owner := Owner(tmp_path / "out", POLITE, start_new_session=True))
    owner.wait_for("started")
    family = owner.family()
    os.killpg(owner.popen.pid, signal.SIGINT)  # what the terminal does
    assert owner.popen.wait(30) == 0
    assert not alive(family)
    assert "KeyboardInterrupt" not in owner.text()


def test_who_does_not_listen_is_killed_with_its_children(tmp_path: Path, owners: list[Owner]) -> None:
    owners.append(owner := Owner(tmp_path / "out", STUBBORN))
    owner.wait_for("started")
    family = owner.family()
    assert len(family) == 3
    owner.popen.send_signal(signal.SIGINT)
    assert owner.popen.wait(GRACE + QUICK + 20) == 0
    wait_until(lambda: not alive(family), "all gone")


def test_a_second_ctrl_c_does_not_wait(
    tmp_path: Path, owners: list[Owner], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = OWNER.replace(
        "import os, sys\n", "import os, sys, flaskbus.processes as p\np.GRACE = p.QUICK = 600\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "OWNER", script)
    owners.append(owner := Owner(tmp_path / "out", STUBBORN))
    owner.wait_for("started")
    family = owner.family()
    owner.popen.send_signal(signal.SIGINT)
    owner.wait_for("stopping")

    def gone() -> bool:
        # Signals in quick succession count once, so they are not sent more often than this waits.
        owner.popen.send_signal(signal.SIGINT)
        try:
            return owner.popen.wait(0.5) == 0
        except subprocess.TimeoutExpired:
            return False

    wait_until(gone, "the owner ended")
    wait_until(lambda: not alive(family), "all gone")


def test_children_go_when_the_owner_is_killed(tmp_path: Path, owners: list[Owner]) -> None:
    owners.append(owner := Owner(tmp_path / "out", POLITE, STUBBORN))
    owner.wait_for("started", 2)
    family = owner.family()
    assert len(family) == 4  # with what one of them started, and the guard
    owner.popen.kill()
    owner.popen.wait()
    wait_until(lambda: not alive(family), "all gone")


def test_an_output_that_nobody_reads_ends_all_in_good_order(tmp_path: Path, owners: list[Owner]) -> None:
    seen = tmp_path / "seen"
    polite = POLITE.replace(r'os.write(1, b"ending\n")', f"open({str(seen)!r}, 'w')")
    chatty = "import time\nwhile True: print('more', flush=True); time.sleep(0.01)"
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, polite, chatty], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        while b"started" not in owner.stdout.readline():
            pass
        family = descendants(owner.pid)
        owner.stdout.close()
        wait_until(lambda: owner.poll() is not None, "the owner ended")
    assert not alive(family)
    assert seen.exists()


# In this process


def console() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(stream, ["a"], colour=False), stream


def run(processes: Processes, script: str, *, hold: bool = False) -> None:
    processes.start("a", [sys.executable, "-c", script], os.environ, hold=hold)
    while not processes.step(10):
        pass


def test_long_lines_and_foreign_bytes_come_through() -> None:
    shown, stream = console()
    script = f"import os\nos.write(1, b'x' * {3 * LONGEST_LINE})\nos.write(1, b'\\n\\xff\\r\\nend')"
    with Processes(shown) as processes:
        run(processes, script)
    lines = stream.getvalue().split("\n")
    assert "".join(lines).count("x") == 3 * LONGEST_LINE
    assert lines[-3:] == ["a | \ufffd", "a | end", ""]


def test_held_lines_are_shown_when_they_are_released() -> None:
    shown, stream = console()
    with Processes(shown) as processes:
        process = processes.start("a", [sys.executable, "-c", "print('kept')"], os.environ, hold=True)
        while not processes.step(10):
            pass
        assert process.held == ["kept"]
        assert not stream.getvalue()
        processes.release(process)
    assert stream.getvalue() == "a | kept\n"


def test_an_exception_leaves_no_child_and_the_old_handlers() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    shown, _ = console()
    pids = []

    def fail() -> None:
        with Processes(shown) as processes:
            pids.append(processes.start("a", [sys.executable, "-c", POLITE], os.environ).pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not alive(pids)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == before


def test_a_child_that_closes_its_output_runs_on() -> None:
    shown, _ = console()
    script = "import os, sys\nos.close(1); os.close(2)\nsys.stdin.read()\nos._exit(5)"
    with Processes(shown) as processes:
        process = processes.start("a", [sys.executable, "-c", script], os.environ)
        while not processes.step(10):
            pass
    assert process.code == 5


def test_colours_are_for_terminals() -> None:
    stream = io.StringIO()
    Console(stream, ["a"], colour=True).say("a", "text")
    assert stream.getvalue() == "\x1b[36ma |\x1b[0m text\n"
