"""How many files a process may have open: half a thousand WebSockets are more than most systems allow at first."""

from __future__ import annotations

import resource

OTHERS = 1024
"""Files for all else that a process, and an app in it, may open."""


def raise_file_limit(wanted: int) -> None:
    """Let this process, and those that it forks, have ``wanted`` files beside others, as far as that is allowed."""
    wanted += OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
