"""Write the pages of docs/reference that are made from the code: ``python docs/generate.py``.

settings.md comes from flaskbus/settings.py, commands.md from the commands themselves, errors.md from
flaskbus/errors.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from pathlib import Path
from textwrap import dedent
from typing import Any

import click

from flaskbus import errors
from flaskbus.cli import cli
from flaskbus.extension import flask_cli
from flaskbus.options import SettingOption
from flaskbus.settings import COMPONENTS, SECTIONS, CommonSettings, flag, show_default, variables
from flaskbus_agent.cli import agent
from flaskbus_gateway.cli import gateway

REFERENCE = Path(__file__).parent / "reference"
TARGET = REFERENCE / "settings.md"

INTRODUCTION = """\
# Settings

<!-- Written by docs/generate.py from flaskbus/settings.py; edit those. -->

Nothing has to be set. What is set comes from, the strongest first:

1. a flag: `--port 8000`,
2. an environment variable: `FLASKBUS_PORT=8000` (an empty one counts as not set),
3. the configuration file: `port = 8000`,
4. the default.

`flaskbus config` prints every setting, its value, and which of the four it came from. Passwords are masked.

A duration is a number of seconds, or text such as `"500ms"`, `"30s"`, `"5m"` or `"1h30m"`. A size is a number of
bytes, or text such as `"64KiB"` or `"16MiB"`; a bare `k`, `m` or `g` is a power of 1024 too, and `kB`, `MB` and `GB`
are powers of 1000. A switch is `true` or `false`; in the environment also `1`, `yes`, `on`, `0`, `no`, `off`.

## The configuration file

It is the file that `--config` (`-c`) or else `FLASKBUS_CONFIG` names; else `flaskbus.toml` in the current
directory; else `pyproject.toml` there, if it has a `[tool.flaskbus]` table. The top level holds what all
components share, `[gateway]` and `[agent]` what only one of them has. A shared setting in `[gateway]` or `[agent]`
overrides the top level for that component. Paths are relative to the current directory.

```toml
redis = "redis://10.0.0.5:6379/0"
apps = ["frontend:app=/", "backend:app=/backend"]

[gateway]
port = 8000
trusted_proxies = ["10.0.0.0/8"]

[agent]
threads = 8
```

In `pyproject.toml` the tables are `[tool.flaskbus]`, `[tool.flaskbus.gateway]` and `[tool.flaskbus.agent]`.

`apps` is what `flaskbus-agent` and `flaskbus dev` run when the command line names no app: `MODULE:APP=PREFIX`, or
`MODULE:APP=HOST/PREFIX` for one host. It can be written as tables as well:

```toml
[[apps]]
app = "shop:app"
prefix = "/"
host_pattern = "shop.example.com"
```

A key that does not exist, or stands in the wrong table, is an error that names the nearest one or the right place.
"""

CLOSING = """\
## Shell completion

Commands, options, choices and files can be completed. Put the line of your shell into its start file, once for
each command: for `flaskbus-gateway` the variable is `_FLASKBUS_GATEWAY_COMPLETE`, for `flaskbus-agent`
`_FLASKBUS_AGENT_COMPLETE`.

| shell | file | line |
| --- | --- | --- |
| bash | `~/.bashrc` | `eval "$(_FLASKBUS_COMPLETE=bash_source flaskbus)"` |
| zsh | `~/.zshrc` | `eval "$(_FLASKBUS_COMPLETE=zsh_source flaskbus)"` |
| fish | `~/.config/fish/config.fish` | `_FLASKBUS_COMPLETE=fish_source flaskbus \\| source` |

Bash must be 4.4 or newer.

## Exit codes

| code | meaning |
| --- | --- |
| 0 | done |
| 1 | the command's own "no", such as an unhealthy `flaskbus healthcheck` |
| 2 | wrong usage: a flag, a variable, the configuration file |
| 3 | could not start: the broker, the port, a mount that is taken |
| 4 | the app could not be imported |
| 130 | interrupted with Ctrl-C |
"""


def reference() -> str:
    """The page, in Markdown."""
    return "\n".join([INTRODUCTION, *_component(CommonSettings), *_components(), CLOSING])


def _components() -> Iterator[str]:
    for kind in COMPONENTS:
        yield from _component(kind)


def _component(kind: type[CommonSettings]) -> Iterator[str]:
    shared = {item.name for item in fields(CommonSettings)} if kind.table else set()
    own = [item for item in fields(kind) if item.name not in shared]
    yield f"## {kind.table.capitalize()}: `[{kind.table}]`\n" if kind.table else "## Common: top level\n"
    for section in SECTIONS:
        items = [item for item in own if item.metadata["section"] == section]
        if items:
            yield f"### {section}\n"
            yield "| setting | default | flag | variable | meaning |\n| --- | --- | --- | --- | --- |"
            yield "\n".join(map(_row, items)) + "\n"


def _row(item: Field[Any]) -> str:
    switch = f"`{flag(item)}`"
    if isinstance(item.default, bool):
        switch += f" `--no-{flag(item)[2:]}`"
    if "short" in item.metadata:
        switch += f" `{item.metadata['short']}`"
    default = show_default(item)
    if default != item.metadata.get("unset"):
        default = f"`{default}`"
    names = " ".join(f"`{name}`" for name in variables(item))
    meaning = item.metadata["help"]
    if "choices" in item.metadata:
        meaning += f" One of {', '.join(f'`{choice}`' for choice in item.metadata['choices'])}."
    return f"| `{item.name}` | {default} | {switch} | {names} | {meaning} |"


# commands.md

COMMANDS_INTRODUCTION = """\
# Commands

<!-- Written by docs/generate.py from the commands; edit those. -->

Each command explains itself with `--help`. What a command prints for people goes to standard output, and why it failed
to standard error, in one line. Exit codes are in [settings](settings.md#exit-codes). A setting as an option is listed
here by its name alone; [settings](settings.md) has its default and its meaning.
"""


def commands() -> str:
    """The page, in Markdown."""
    parts = [COMMANDS_INTRODUCTION]
    for name, command in (("flaskbus-gateway", gateway), ("flaskbus-agent", agent), ("flaskbus", cli)):
        parts += _command(command, name)
    parts += _command(flask_cli, "flask bus", only=("agent",))
    return "\n".join(parts)


def _command(command: click.Command, name: str, only: tuple[str, ...] = ()) -> Iterator[str]:
    context = click.Context(command, info_name=name)
    yield f"## {name}\n"
    yield f"```text\n{name} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    yield inspect.cleandoc(command.help or "") + "\n"
    if examples := dedent(getattr(command, "examples", "")).strip():
        yield f"```sh\n{examples}\n```\n"
    options = [param for param in command.params if isinstance(param, click.Option)]
    own = [option for option in options if not isinstance(option, SettingOption) and option.name != "version"]
    if own:
        yield "| option | meaning |\n| --- | --- |"
        yield "\n".join(map(_option, own)) + "\n"
    settings = [f"`{option.opts[-1]}`" for option in options if isinstance(option, SettingOption)]
    if settings:
        yield f"Settings: {', '.join(settings)}.\n"
    if isinstance(command, click.Group):
        for child in only or command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from _command(found, f"{name} {child}")


def _option(option: click.Option) -> str:
    spelt = " ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    value = f" {option.metavar}" if option.metavar else ""
    return f"| {spelt}{value} | {_cell(option.help or '')} |"


# errors.md

ERRORS_INTRODUCTION = """\
# Errors

<!-- Written by docs/generate.py from flaskbus/errors.py; edit that. -->

Whatever the bus itself answers is `application/problem+json` (RFC 9457):

```json
{
  "type": "urn:flaskbus:error:no-agent",
  "title": "No agent is serving this mount",
  "status": 503,
  "detail": "no agent of /shop came within 30.0 s",
  "executed": "no",
  "fault": "app",
  "request_id": "612dc20821366"
}
```

- `executed` is `"no"` where the app surely did not run, so the request may be sent again whatever its method. It is
  `"unknown"` where nobody can tell.
- `fault` says where to look: `client`, `app`, `bus` or `broker`.
- `request_id` is the correlation id, as in the log of the agent; it is there once the request was accepted.
- A 503 of the bus has `Retry-After`, in seconds.

What an app answers, its own 500 pages included, is passed on as it is. A response that breaks off after its head
ends with a broken connection, never with what looks like a whole one. What is no HTTP, or comes too slowly or too large
in its header, is refused before the bus sees it: with `invalid-request`, and the status 400, 408, 431 or 501.

| status | type | executed | fault | when |
| --- | --- | --- | --- | --- |"""

WHEN = {
    "internal": "A fault of flaskbus itself; the gateway's log has the traceback. Please report it.",
    "ambiguous-target": "The path has another reading (`..`, `//`, `%2F`, `;`) that leads to another mount.",
    "invalid-request": "No Host or two, a Host that is none, a control character in the path, two lengths, "
    "an Idempotency-Key that is none.",
    "foreign-origin": "A page of another site opens a WebSocket here; see `websocket_origins`.",
    "unknown-mount": "No app is mounted on this host and path, or its last agent left more than `mount_ttl` ago.",
    "body-timeout": "The client sent nothing of the body for `body_timeout`, or too little; `unknown` where an app "
    "had begun.",
    "body-too-large": "The body is larger than `body_limit`; a stated length is refused before the body is read.",
    "key-in-use": "The first request with this key still waits or runs. Ask again after `Retry-After`.",
    "answer-not-kept": "The request with this key ran; its answer was a stream, larger than "
    "`idempotency_limit`, broke off, or began a session.",
    "key-reused": "This key came before, with another body. See [the guide](../howto/idempotency.md).",
    "unsupported-upgrade": "A WebSocket for a mount whose agents do not know them yet (wire version 1).",
    "queue-full": "`queue_limit` requests wait for this mount, or would wait longer than `queue_age`, or `open_limit` "
    "is reached.",
    "no-agent": "No agent came within `hold`, or those that there are fail to start; `detail` says why.",
    "streams-full": "A WebSocket, and its agent process has as many streams and WebSockets as `streams` allows.",
    "not-started": "Agents are there, but none had a free thread within `head_timeout`. Start another one.",
    "broker-unavailable": "The broker has been away for 5 s, or refused to take the request.",
    "broker-full": "The broker uses four fifths of its `maxmemory`, or is out of memory.",
    "shutting-down": "Reserved: a stopping gateway closes its listening socket instead.",
    "agent-lost": "The agent died, or the broker lost the entry, and the request may not run again.",
    "deadline": "An agent took the request and sent no head within `head_timeout`. The app may still be running.",
}
"""Code of a :class:`~flaskbus.errors.BusError` -> what a person should know of it."""

ERRORS_CLOSING = """
The commands end with one line on standard error and an [exit code](settings.md#exit-codes); what to do about it is in
the line, and some of it in [troubleshooting](../troubleshooting.md).
"""


def error_page() -> str:
    """The page, in Markdown."""
    kinds = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.BusError) and kind is not errors.NotExecuted
    ]
    rows = [
        f"| {kind.status} | `{kind.code}` | {kind.executed} | {kind.fault} | {_cell(WHEN[kind.code])} |"
        for kind in sorted(kinds, key=lambda kind: (kind.status, kind.code))
    ]
    return "\n".join([ERRORS_INTRODUCTION, *rows, ERRORS_CLOSING])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


PAGES: dict[str, Callable[[], str]] = {
    "settings.md": reference,
    "commands.md": commands,
    "errors.md": error_page,
}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (REFERENCE / name).write_text(write(), encoding="utf-8")
