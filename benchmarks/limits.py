"""Less than a core for a process, by the kernel's control groups (cgroups(7), version 1 or 2); needs root."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.model import Skip

PERIOD = 20_000
"""Microseconds within which the share is counted."""

_ONE = Path("/sys/fs/cgroup/cpu")
_TWO = Path("/sys/fs/cgroup")


@contextmanager
def limited(pids: Iterable[int], share: float) -> Iterator[None]:
    """While the block runs each of these processes gets ``share`` of a core at most.

    Raises :class:`~benchmarks.model.Skip` where that cannot be.
    """
    with ExitStack() as stack:
        try:
            for pid in pids:
                stack.enter_context(_group(pid, int(PERIOD * share)))
        except OSError as error:
            raise Skip(f"processes cannot be limited here: {error}") from None
        yield


@contextmanager
def _group(pid: int, quota: int) -> Iterator[None]:
    one = (_ONE / "cgroup.procs").exists()
    parent = _ONE if one else _TWO
    if not one:
        (parent / "cgroup.subtree_control").write_text("+cpu")
    group = parent / f"flaskbus-bench-{os.getpid()}-{pid}"
    group.mkdir()
    try:
        if one:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (group / "cpu.max").write_text(f"{quota} {PERIOD}")
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        if Path(f"/proc/{pid}").exists():
            (parent / "cgroup.procs").write_text(str(pid))
        group.rmdir()
