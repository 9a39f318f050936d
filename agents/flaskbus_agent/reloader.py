"""Watches the source files, in a process of its own.

A thread would do, but the supervisor forks, and a process with threads must not.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from flaskbus_agent.log import AgentLogger

if TYPE_CHECKING:
    from watchfiles.main import FileChange

TEMPLATES = (".html", ".jinja", ".jinja2", ".j2", ".env")
"""What is loaded anew beside Python files: Flask keeps templates while it is not in debug mode."""
OURS = ("flaskbus", "flaskbus_agent", "flaskbus_gateway")
LOOK_MS = 250
"""How often the watcher looks whether its supervisor still lives."""


def source_directories() -> list[Path]:
    """The directory of work, and whatever else is imported from but was not installed.

    A checkout of flaskbus itself is not what is being developed, unless one works in it.
    """
    directories = {Path.cwd()}
    installed = {Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)}
    for entry in sys.path:
        directory = Path(entry).resolve()
        ours = any((directory / package).is_dir() for package in OURS)
        if directory.is_dir() and not ours and installed.isdisjoint((directory, *directory.parents)):
            directories.add(directory)
    # Watching is recursive, so whatever lies in another of them is there already.
    return sorted(each for each in directories if directories.isdisjoint(each.parents))


def start(log: AgentLogger) -> int:
    """Fork the watcher, which sends this process HUP at every change; its process id."""
    supervisor = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            _run(supervisor, log)
        finally:
            os._exit(0)
    return pid


def _run(supervisor: int, log: AgentLogger) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    # A Ctrl-C reaches the whole process group, and the supervisor then ends this process.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Here, so that no other process carries it.
    from watchfiles import PythonFilter, watch

    directories = source_directories()
    changes = watch(
        *directories,
        watch_filter=PythonFilter(ignore_paths=[sys.prefix], extra_extensions=TEMPLATES),
        debounce=200,
        rust_timeout=LOOK_MS,
        yield_on_timeout=True,
        ignore_permission_denied=True,
    )
    announced = False
    try:
        for changed in changes:
            if os.getppid() != supervisor:
                break
            if not announced:
                # Not before: the watch begins with the first look.
                log.info("Watching %s for changes", ", ".join(map(str, directories)))
                announced = True
            if changed:
                log.info("%s changed, loading anew", _names(changed))
                os.kill(supervisor, signal.SIGHUP)
    except Exception:
        log.exception("The source files cannot be watched")
    os._exit(0)


def _names(changed: set[FileChange]) -> str:
    names = sorted({os.path.relpath(path) for _, path in changed})
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
