"""Errors: what a client is told, and with which exit code an operator's mistake ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flaskbus import errors


def descendants(kind: type[errors.BusError]) -> Iterator[type[errors.BusError]]:
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


BUS_ERRORS = sorted(descendants(errors.BusError), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", BUS_ERRORS)
def test_every_bus_error_is_a_problem(kind: type[errors.BusError]) -> None:
    problem = kind("why").problem("r1")
    assert problem["type"] == f"urn:flaskbus:error:{kind.code}"
    assert 400 <= kind.status <= 599
    assert problem["executed"] in ("no", "unknown")
    assert (problem["detail"], problem["request_id"]) == ("why", "r1")


def test_codes_are_unique() -> None:
    assert len({kind.code for kind in BUS_ERRORS}) == len(BUS_ERRORS)


def test_whether_the_app_ran_can_be_overruled() -> None:
    assert errors.BrokerUnavailable("x").executed == "no"
    assert errors.BrokerUnavailable("x", executed="unknown").executed == "unknown"
    assert "request_id" not in errors.BrokerUnavailable("x").problem()


@pytest.mark.parametrize(
    ("kind", "code"),
    [(errors.UsageError, 2), (errors.StartError, 3), (errors.MountTaken, 3), (errors.AppImportError, 4)],
)
def test_exit_codes(kind: type[errors.OperatorError], code: int) -> None:
    assert kind.exit_code == code
