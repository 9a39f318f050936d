"""How dead letters are shown, to people and to programs; whatever could steer a terminal is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import click

from flaskbus.commands.tools import ago
from flaskbus.letters import Letter
from flaskbus.routing import Mount
from flaskbus.survey import entry_age

HEAD = ("MOUNT", "ID", "AGE", "METHOD", "TARGET", "BODY", "REASON")

WIDTH = 60
"""Characters of a target in a row."""


def row(mount: Mount, letter: Letter, now: float) -> tuple[object, ...]:
    return (
        mount.name,
        letter.key,
        ago(entry_age(letter.key.encode(), now)),
        short(letter.method) or "-",
        short(letter.target) or "-",
        letter.size,
        plain(letter.reason),
    )


def document(mount: Mount, letter: Letter, now: float) -> dict[str, object]:
    """A letter for programs; ``age`` in seconds, sizes in bytes."""
    headers, parameters = letter.redacted
    return {
        "mount": mount.name,
        "id": letter.key,
        "request_id": letter.id,
        "method": letter.method,
        "target": letter.target,
        "reason": letter.reason,
        "attempt": letter.attempt,
        "at": letter.at,
        "age": round(entry_age(letter.key.encode(), now), 3),
        "size": letter.size,
        "cut": list(letter.cut),
        "redacted": {"headers": list(headers), "parameters": list(parameters)},
        "ours": letter.request is not None,
    }


def contents(letter: Letter) -> dict[str, object]:
    """Headers of a request, or the fields of what is none; for programs."""
    headers = letter.request.headers if letter.request else ()
    return {
        "headers": [[text(name), text(value)] for name, value in headers],
        "fields": [[text(name), text(value)] for name, value in letter.fields],
    }


def lines(mount: Mount, letter: Letter) -> Iterator[str]:
    """A letter for a person."""
    request = letter.request
    kept = f", {len(request.body)} of them kept" if request and len(request.body) < letter.size else ""
    facts = {
        "mount": mount.name,
        "letter": letter.key,
        "request": letter.id or "-",
        "reason": letter.reason,
        "at": letter.at,
        "attempt": str(letter.attempt),
        "gateway": letter.sender or "-",
        "size": f"{letter.size} bytes{kept}",
        "cut": ", ".join(letter.cut),
    }
    for name, value in facts.items():
        if value:
            yield f"{name + ':':9} {plain(value)}"
    yield ""
    if request:
        yield plain(f"{request.method} {request.target} HTTP/{request.http_version}")
        yield from (plain(f"{text(name)}: {text(value)}") for name, value in request.headers)
    else:
        yield "not a request of ours; its fields:"
        yield from (f"  {plain(text(name))} = {plain(text(value))}" for name, value in letter.fields)


def text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")


def plain(value: str) -> str:
    """The text on one line, with escapes for what is not printable."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in value
    )


def short(value: str) -> str:
    return plain(value if len(value) <= WIDTH else value[: WIDTH - 1] + "…")


def count(letters: Sequence[Letter]) -> str:
    return f"{len(letters)} dead letter{'' if len(letters) == 1 else 's'}"


def echo(value: object) -> None:
    """Print JSON in ASCII: texts in it are anybody's, and may be read on a terminal."""
    click.echo(json.dumps(value, indent=2))
