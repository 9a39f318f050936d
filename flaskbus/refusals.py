"""Which refusals of a broker pass: it carried nothing out, and takes the same command some time later. Pure.

An error answer begins with its code, also where it was raised inside of a script
(https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors). A script of ours is refused before it
has written anything, or not at all: once it has written, Redis lets it go on.
"""

from __future__ import annotations

PASSING = frozenset(
    {
        "BUSY",  # somebody's script has been running for long
        "CLUSTERDOWN",
        "LOADING",  # its data, after a start
        "MASTERDOWN",  # a replica that has lost its master
        "MISCONF",  # its disk is full
        "NOREPLICAS",  # fewer than min-replicas-to-write
        "READONLY",  # a master that has become a replica
        "TRYAGAIN",  # a slot is on its way to another node
    }
)
"""Codes of refusals that pass. Memory that is short (``OOM``) is not one of them: push waits for its client then."""


def passing(answer: str) -> bool:
    """Whether this error answer, or its code alone, is a refusal that passes."""
    return answer.partition(" ")[0] in PASSING
