"""``flaskbus dead``: the requests that were given up on, to be looked at, sent again, or dropped."""

from __future__ import annotations

import shlex
import string
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import click
import redis

from flaskbus.client import Outgoing
from flaskbus.commands.dead_views import HEAD, contents, count, document, echo, lines, row, short
from flaskbus.commands.request import BAD_STATUS, BUS_FAILED, duration, header, read_body, show
from flaskbus.commands.tools import Bus, bus_client, columns, json_option, known_mount, with_bus
from flaskbus.commands.unmount import confirmed
from flaskbus.errors import BusError, StartError, UsageError
from flaskbus.letters import Letter, Mend, mended
from flaskbus.options import FlaskbusGroup
from flaskbus.registry import mount_from_key
from flaskbus.routing import Mount

PAGE = 100
"""Letters that one look takes; each may have some 100 KiB."""


@click.group(
    "dead",
    cls=FlaskbusGroup,
    short_help="Show, replay and drop the requests that were given up on.",
    examples="""
    flaskbus dead list
    flaskbus dead show /myapp 1763712345678-0
    flaskbus dead replay /myapp 1763712345678-0 -H 'Authorization: Bearer …'
    flaskbus dead drop /myapp --all
    """,
)
def dead() -> None:
    """Look after dead letters: requests that killed their agents, and entries that no agent could read.

    A letter lives for seven days, and a mount keeps about 1,000. Credentials are not kept: they read (redacted). A
    letter is named by the ID in its row, or by the request_id that its client was told.
    """


@dead.command(
    "list",
    short_help="Show the letters, the latest first.",
    examples="""
    flaskbus dead list
    flaskbus dead list shop.example.com/api
    flaskbus dead list --json | jq -r '.[] | select(.age < 3600) | .reason'
    """,
)
@with_bus
@click.argument("mount", required=False)
@json_option
def list_letters(bus: Bus, mount: str | None, as_json: bool) -> None:
    """Show the letters of MOUNT, or of all mounts, the latest first.

    BODY is how large the body was, or the whole entry where that is not a request of ours.
    """
    mounts = mounts_with_letters(bus) if mount is None else _queues(bus, Mount.from_name(mount))
    found = [(where, letter) for where in mounts for letter in read_letters(bus, where)]
    if mount is not None and not found:
        check_mount(bus, mounts[0])
    now = broker_time(bus)
    if as_json:
        echo([document(where, letter, now) for where, letter in found])
    elif found:
        click.echo(columns(HEAD, (row(where, letter, now) for where, letter in found)))
    else:
        click.echo("there are no dead letters" + (f" of {mount}" if mount else ""), err=True)


@dead.command(
    "show",
    short_help="Show one letter, or its body.",
    examples="""
    flaskbus dead show /myapp 1763712345678-0
    flaskbus dead show /myapp 1763712345678-0 --body > body
    """,
)
@with_bus
@click.argument("mount")
@click.argument("letter_id", metavar="ID")
@click.option("--body", is_flag=True, help="Write the body alone, as it is.")
@json_option
def show_letter(bus: Bus, mount: str, letter_id: str, body: bool, as_json: bool) -> None:
    """Show what is known of a letter: why it was given up, its headers, and how much of its body was kept."""
    where = Mount.from_name(mount)
    [letter] = find(bus, where, [letter_id])
    if body:
        if letter.request is None:
            raise UsageError(
                f"letter {letter.key} is not a request of ours, so it has no body; leave --body out"
            )
        sys.stdout.buffer.write(letter.request.body)
        sys.stdout.flush()
    elif as_json:
        echo(document(where, letter, broker_time(bus)) | contents(letter))
    else:
        click.echo("\n".join(lines(where, letter)))


@dead.command(
    "replay",
    short_help="Send letters again, as new requests.",
    examples="""
    flaskbus dead replay /myapp 1763712345678-0
    flaskbus dead replay /myapp 1763712345678-0 -H 'Authorization: Bearer …' --data @whole-body
    flaskbus dead replay /myapp --all --without-credentials
    """,
)
@with_bus
@click.argument("mount")
@click.argument("letter_ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "all_of_them", is_flag=True, help="Every letter of the mount, the oldest first.")
@click.option(
    "--header", "-H", "headers", multiple=True, metavar="'NAME: VALUE'", help="A header in its place."
)
@click.option("--data", "-d", metavar="DATA", help="Another body: text, @FILE, or - for standard input.")
@click.option("--target", metavar="TARGET", help="Another target: path and query.")
@click.option("--without-credentials", is_flag=True, help="Leave out what was redacted and is not given.")
@click.option("--keep", is_flag=True, help="Keep the letter, also when it was answered.")
@click.option(
    "--timeout",
    default="30s",
    show_default=True,
    metavar="DURATION",
    help="How long to wait for the reply's head.",
)
@click.option("--include", "-i", is_flag=True, help="Show status and headers too.")
def replay(
    bus: Bus,
    mount: str,
    letter_ids: tuple[str, ...],
    all_of_them: bool,
    headers: tuple[str, ...],
    data: str | None,
    target: str | None,
    without_credentials: bool,
    keep: bool,
    timeout: str,
    include: bool,
) -> int:
    """Send letters of MOUNT again through the bus, each as a new request with an id of its own.

    Mend the app first: what killed its agents may do so again. One letter shows its answer as flaskbus request does,
    several a line each. A letter is removed once the app has answered it, with whatever status. At the first that the
    bus cannot bring an answer for, it stays, and so do those after it.

    Exit code: 0 for a status below 400, 1 for any other or for a letter that --all could not send, 3 where the bus
    could not bring an answer.
    """
    where = Mount.from_name(mount)
    mend = Mend(
        headers=tuple(map(header, headers)),
        body=read_body(data),
        target=None if target is None else as_target(target),
        without_credentials=without_credentials,
    )
    seconds = duration(timeout)
    chosen = choose(bus, where, letter_ids, all_of_them)
    # Another app that takes the path by now is not whom they were for.
    if chosen and target is None and bus.registry.owner(where) is None:
        raise StartError(
            f"no app is mounted on {where.name} now, so {count(chosen)} stayed where they are; "
            "start its agents first, or say with --target where else to send"
        )
    worst = 0
    for number, letter in enumerate(chosen):
        try:
            outgoing = build(letter, mend, seconds)
        except UsageError as error:
            if not all_of_them:
                raise
            click.echo(f"flaskbus dead replay: {error}", err=True)
            worst = BAD_STATUS
            continue
        try:
            status = send(bus, outgoing, letter, alone=len(chosen) == 1, include=include)
        except BusError as error:
            left = len(chosen) - number - 1
            click.echo(
                f"flaskbus dead replay: letter {letter.key} stays: {error.title}: {error.detail} "
                f"(executed: {error.executed})" + (f"; {left} more not sent" if left else ""),
                err=True,
            )
            return BUS_FAILED
        if not keep:
            remove(bus, where, [letter])
        worst = max(worst, BAD_STATUS if status >= 400 else 0)
    return worst


@dead.command(
    "drop",
    short_help="Remove letters.",
    examples="""
    flaskbus dead drop /myapp 1763712345678-0
    flaskbus dead drop /myapp --all --yes
    """,
)
@with_bus
@click.argument("mount")
@click.argument("letter_ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "all_of_them", is_flag=True, help="Every letter of the mount.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def drop(bus: Bus, mount: str, letter_ids: tuple[str, ...], all_of_them: bool, yes: bool) -> int:
    """Remove letters of MOUNT for good; asks before it removes all."""
    where = Mount.from_name(mount)
    chosen = choose(bus, where, letter_ids, all_of_them)
    if all_of_them and chosen and not yes and not confirmed(f"Drop {count(chosen)} of {where.name}?"):
        click.echo("nothing was changed", err=True)
        return 1
    # Those that were seen: a letter that came meanwhile stays.
    removed = remove(bus, where, chosen)
    click.echo(
        f"{removed} of {count(chosen)} dropped" if removed < len(chosen) else f"{count(chosen)} dropped"
    )
    return 0


# Reading


def mounts_with_letters(bus: Bus) -> list[Mount]:
    """The mounts that have letters, also those that are forgotten by now."""
    prefix, suffix = f"{bus.keys.namespace}:{{".encode(), b"}:dead"
    found = (
        mount_from_key(key.removeprefix(prefix).removesuffix(suffix))
        for key in bus.client.scan_iter(prefix + b"*" + suffix, count=1000)
    )
    return sorted((mount for mount in found if mount), key=lambda mount: mount.name)


def _queues(bus: Bus, mount: Mount) -> list[Mount]:
    """The mount, and its partitions that have letters."""
    found = []
    # An app's own user may read its letters, and not look for others.
    with suppress(redis.exceptions.NoPermissionError):
        found = [one for one in mounts_with_letters(bus) if one != mount and one.whole == mount]
    return [mount, *found]


def read_letters(bus: Bus, mount: Mount) -> Iterator[Letter]:
    """The letters of a mount, the latest first."""
    end = "+"
    while True:
        entries: Any = bus.client.xrevrange(bus.keys.of(mount.key).dead, max=end, count=PAGE)
        for key, fields in entries:
            yield Letter.load(key, fields)
        if len(entries) < PAGE:
            return
        end = "(" + entries[-1][0].decode()


def find(bus: Bus, mount: Mount, names: Sequence[str]) -> list[Letter]:
    """The letters of these ids; raises :class:`~flaskbus.errors.UsageError` where one is not there."""
    wanted = dict.fromkeys(names)
    found: dict[str, Letter] = {}
    letter = None
    for letter in read_letters(bus, mount):
        for name in (letter.key, letter.id):
            if name in wanted:
                found.setdefault(name, letter)
    for name in wanted:
        if name not in found:
            if letter is None:
                check_mount(bus, mount)
            shown = f"flaskbus dead list {shlex.quote(mount.name)}"
            raise UsageError(f"{mount.name} has no dead letter {name}; {shown} shows what is there")
    return list({found[name].key: found[name] for name in wanted}.values())


def choose(bus: Bus, mount: Mount, names: Sequence[str], all_of_them: bool) -> list[Letter]:
    if bool(names) == all_of_them:
        raise UsageError("say which letters: one or more IDs, or --all")
    if names:
        return find(bus, mount, names)
    letters = list(read_letters(bus, mount))[::-1]
    if not letters:
        check_mount(bus, mount)
        click.echo(f"there are no dead letters of {mount.name}", err=True)
    return letters


def check_mount(bus: Bus, mount: Mount) -> None:
    """Raise :class:`~flaskbus.errors.UsageError`, with the nearest, where a mount without letters is not known."""
    # An app's own user may read its letters, and not the names of other mounts.
    with suppress(redis.exceptions.NoPermissionError):
        known_mount(bus, mount.name)


def remove(bus: Bus, mount: Mount, letters: Sequence[Letter]) -> int:
    """Remove letters; how many of them were still there."""
    if not letters:
        return 0
    removed: int = bus.client.xdel(bus.keys.of(mount.key).dead, *(letter.key for letter in letters))
    return removed


def broker_time(bus: Bus) -> float:
    seconds, micros = bus.client.time()
    return float(seconds) + float(micros) / 1e6


# Sending


def as_target(words: str) -> str:
    """What a person typed as a target, percent-encoded where it has to be."""
    if not words.startswith("/"):
        raise UsageError(f"--target {words} has to begin with a slash; did you mean /{words}?")
    return quote(words, safe=string.punctuation)


def build(letter: Letter, mend: Mend, timeout: float) -> Outgoing:
    """The request to be sent; raises :class:`~flaskbus.errors.UsageError` where the letter is not whole."""
    request = mended(letter, mend)
    return Outgoing(
        method=request.method,
        target=request.target,
        host=dict(request.headers).get(b"host", b"").decode("latin-1"),
        headers=request.headers,
        body=request.body,
        scheme=request.scheme,
        timeout=timeout,
    )


def send(bus: Bus, outgoing: Outgoing, letter: Letter, *, alone: bool, include: bool) -> int:
    """Send it and show the answer, whole or as a line; its status."""
    with bus_client(bus).send(outgoing) as answer:
        if alone:
            show(answer, sys.stdout.buffer, include or outgoing.method == "HEAD")
        else:
            size = sum(map(len, answer))
            click.echo(
                f"{letter.key}  {outgoing.method} {short(outgoing.target)}  {answer.status}  {size} bytes"
            )
    return answer.status
