"""The pages of docs/reference that are made from the code."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from docs.generate import PAGES, REFERENCE, WHEN
from flaskbus import errors
from flaskbus.cli import COMMANDS, cli
from tests.unit.test_errors import BUS_ERRORS


@pytest.mark.parametrize("name", PAGES)
def test_up_to_date(name: str) -> None:
    page = (REFERENCE / name).read_text(encoding="utf-8")
    assert page == PAGES[name](), "run: python docs/generate.py"


def test_every_command_is_there() -> None:
    page = (REFERENCE / "commands.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", page, re.M)
    ours = list(names(cli, "flaskbus"))
    assert {f"flaskbus {name}" for name in COMMANDS} <= set(ours)
    assert headings == ["flaskbus-gateway", "flaskbus-agent", *ours, "flask bus", "flask bus agent"]


def names(command: click.Command, name: str) -> Iterator[str]:
    """A command and those below it."""
    yield name
    if isinstance(command, click.Group):
        context = click.Context(command)
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from names(found, f"{name} {child}")


def test_nothing_is_said_of_errors_that_are_not() -> None:
    assert set(WHEN) == {kind.code for kind in BUS_ERRORS if kind is not errors.NotExecuted} | {
        errors.BusError.code
    }
