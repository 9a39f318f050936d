"""Ends child processes when the process that started them is gone, even if that was by SIGKILL.

A shell of a few lines reads from a pipe whose other end only we hold: the kernel closes it when we are gone.
Unlike Linux's PR_SET_PDEATHSIG this works on every POSIX system, reaches grandchildren, and does not take the
end of the thread that started a child for the end of the process.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_SCRIPT = """
while read -r groups && [ "$groups" != end ]; do watched=$groups; done
for second in 1 2 3 4 5; do
    alive=
    for group in $watched; do kill -s TERM -- "-$group" && alive=yes; done
    [ "$alive" ] || break
    sleep 1
done
for group in $watched; do kill -s KILL -- "-$group"; done
rm -rf -- "$@"
"""
"""Each line that it reads replaces the list of process groups, and ``end`` is the end of it without us being gone.
Its arguments are directories to remove."""


class Guard:
    """Watches over the process groups of children, and over directories that are to go with them.

    A child of this process that forks without exec shares the pipe, and nothing is ended before it is gone too.
    """

    def __init__(self, *directories: Path):
        self._shell = subprocess.Popen(  # noqa: S603
            ["/bin/sh", "-c", _SCRIPT, "flaskbus-guard", *map(str, directories)],
            stdin=subprocess.PIPE,
            # Whoever reads our output must not wait for the guard.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # The Ctrl-C of a terminal is for us alone.
            start_new_session=True,
        )

    def watch(self, groups: Iterable[int]) -> None:
        """End these process groups, and no others, when this process is gone."""
        self._tell(" ".join(map(str, groups)))

    def close(self) -> None:
        """The watched processes have ended: only the directories are removed."""
        assert self._shell.stdin is not None
        if not self._shell.stdin.closed:
            self.watch(())
            self._tell("end")
            self._shell.wait()
            self._shell.stdin.close()

    def _tell(self, line: str) -> None:
        assert self._shell.stdin is not None
        with suppress(BrokenPipeError):  # somebody killed the guard
            os.write(self._shell.stdin.fileno(), line.encode() + b"\n")
