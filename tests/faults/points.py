"""``python -m tests.faults.points [options] PROGRAM ARGUMENT…``: a program that kills itself at a named point.

It runs ``python -m PROGRAM`` with one function of it wrapped, so that production code needs no hooks:

    --kill POINT   SIGKILL of the process that first reaches this point; see POINTS
    --nth N        reaches it for the N-th time (each process counts for itself)
    --flag FILE    made by the process that dies, so that only one does
    --set MODULE:NAME=NUMBER   a constant of the program, for faster tests
"""

from __future__ import annotations

import argparse
import functools
import os
import runpy
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from flaskbus.broker import script_sha


class Point(NamedTuple):
    """Before or after a call of a function ``module:qualified.name``; ``when`` looks at its arguments.

    ``or_before`` is another function, for requests that never come to the first.
    """

    function: str
    after: bool = False
    or_before: str = ""
    when: Callable[..., bool] = lambda *_, **__: True


def sends(script: str) -> Callable[..., bool]:
    """Whether an agent sends this script now."""
    sha = script_sha(script).encode()
    return lambda _connection, pieces: any(sha in piece for piece in pieces)


SEND = "flaskbus_agent.channel:_send"

POINTS = {
    # What the leader runs itself never comes to the first of each pair.
    "agent: read, not begun": Point(
        "flaskbus_agent.delivery:Runner.decode", or_before="flaskbus_agent.delivery:Runner.plain"
    ),
    "agent: in the handler": Point("tests.faults.app:record", after=True),
    "agent: reply made, not sent": Point("flaskbus_agent.lead:Lead.takes", after=True),
    "agent: finish not sent": Point(
        "flaskbus_agent.outbox:Outbox.finish", or_before="flaskbus_agent.prompt:Prompt.reply"
    ),
    "agent: finish sent, not answered": Point(SEND, after=True, when=sends("finish")),
    "agent: first push sent, not answered": Point(SEND, after=True, when=sends("push")),
    "agent: between two pushes": Point("flaskbus_agent.outbox:Outbox._push", after=True),
    "agent: leaving": Point("flaskbus.registry:Registry.leave"),
    "gateway: XADD not sent": Point("flaskbus_gateway.admission:Admission.admit", after=True),
    "gateway: XADD sent, not answered": Point(
        "flaskbus_gateway.link:NodeLink._flush",
        after=True,
        when=lambda link: any(b"\r\nXADD\r\n" in data for data in link._out),
    ),
    # A gateway that has not heard yet that the agent is ready has an exchange from the start.
    "gateway: waiting": Point(
        "flaskbus_gateway.prompt:Prompt.was_sent",
        after=True,
        or_before="flaskbus_gateway.exchange:Exchange._head",
    ),
    "gateway: reply taken from its list": Point("flaskbus.inbox:Inbox.take_listed", after=True),
    "gateway: reply taken from the bell": Point("flaskbus.wire:decode_frame", after=True),
    "gateway: list not deleted": Point("flaskbus_gateway.switchboard:Switchboard._collect"),
}


def find(name: str) -> tuple[Any, str]:
    """The owner and the last name of ``module:qualified.name``."""
    module, _, path = name.partition(":")
    *owners, last = path.split(".")
    return functools.reduce(getattr, owners, import_module(module)), last


def arm(point: Point, nth: int, flag: Path) -> None:
    """Wrap the functions of a point."""
    calls = 0

    def reached() -> None:
        nonlocal calls
        calls += 1
        if calls >= nth:
            try:
                with flag.open("x") as file:
                    file.write(str(os.getpid()))
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(function: str, after: bool) -> None:
        owner, name = find(function)
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            here = point.when(*args, **kwargs)
            if here and not after:
                reached()
            result = original(*args, **kwargs)
            if here and after:
                reached()
            return result

        setattr(owner, name, wrapper)

    wrap(point.function, point.after)
    if point.or_before:
        wrap(point.or_before, after=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.points", description=__doc__)
    parser.add_argument("--kill", choices=list(POINTS))
    parser.add_argument("--nth", type=int, default=1)
    parser.add_argument("--flag", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="MODULE:NAME=NUMBER")
    parser.add_argument("program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    for item in options.set:
        name, _, value = item.partition("=")
        setattr(*find(name), float(value))
    if options.kill:
        arm(POINTS[options.kill], options.nth, options.flag)
    sys.argv = [options.program, *options.arguments]
    runpy.run_module(options.program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
