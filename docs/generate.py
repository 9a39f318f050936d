"""Write docs/reference/settings.md from flaskbus/settings.py: ``python docs/generate.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from flaskbus.settings import COMPONENTS, SECTIONS, CommonSettings, flag, show_default, variables

TARGET = Path(__file__).parent / "reference" / "settings.md"

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


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
