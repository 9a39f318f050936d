"""The commands' options, made from the settings, and the way every command ends.

::

    @click.command("flaskbus-gateway", cls=FlaskbusCommand, examples="flaskbus-gateway --port 8000")
    @settings_options(GatewaySettings)
    @click.pass_obj
    def gateway(resolved: Resolved[GatewaySettings], settings: GatewaySettings) -> None: ...

    def main() -> None:
        run(gateway)

Exit codes: 0 done, 2 wrong usage, 3 could not start, 4 the app could not be imported, 130 Ctrl-C.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import Field, fields
from textwrap import dedent
from typing import Any, NoReturn

import click

from flaskbus.config import CONFIG_VARIABLE, load
from flaskbus.errors import OperatorError
from flaskbus.settings import SECTIONS, CommonSettings, flag, show_default, variables

Callback = Callable[..., Any]

GENERAL = "General"


class SettingOption(click.Option):
    """An option that click only parses.

    Its default and its environment variables are shown here, but applied (and the value checked) by
    :func:`flaskbus.config.resolve`, which alone knows the order of precedence.
    """

    def __init__(self, *names: str, section: str, variables: Sequence[str], default_text: str, **attrs: Any):
        super().__init__([*names], default=None, **attrs)
        self.section = section
        self.variables = variables
        self.default_text = default_text

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        notes = f"default: {self.default_text}; env: {', '.join(self.variables)}"
        return record and (record[0], f"{self.help}  [{notes}]")


def settings_options(
    *kinds: type[CommonSettings], only: Collection[str] | None = None
) -> Callable[[Callback], Callback]:
    """Give a command the options of one or more settings classes, and ``--config``.

    The callback is called with the keyword ``settings``: the settings, or a tuple of them where there are
    several kinds. ``ctx.obj`` is the :class:`~flaskbus.config.Resolved` (or the tuple), so
    :func:`click.pass_obj` goes *below* this decorator. ``only`` limits the options to some settings; the
    others still come from the environment and the file. A setting that several kinds have is one option.
    """
    items: dict[str, Field[Any]] = {}
    for kind in kinds:
        for item in fields(kind):
            if only is None or item.name in only:
                items.setdefault(item.name, item)

    def decorate(function: Callback) -> Callback:
        @functools.wraps(function)
        def command(*args: Any, config_file: str | None, **params: Any) -> Any:
            flags = {name: params.pop(name) for name in items}
            resolved = tuple(load(kind, flags=flags, config_file=config_file) for kind in kinds)
            settings = tuple(each.settings for each in resolved)
            click.get_current_context().obj = resolved if len(kinds) > 1 else resolved[0]
            return function(*args, settings=settings if len(kinds) > 1 else settings[0], **params)

        options = [*map(_option, items.values()), _config_option()]
        # What click.option() does; click reads the list backwards.
        command.__dict__.setdefault("__click_params__", []).extend(reversed(options))
        return command

    return decorate


def _option(item: Field[Any]) -> SettingOption:
    names, attrs = [item.name, flag(item)], dict[str, Any]()
    if isinstance(item.default, bool):
        names[-1] += f"/--no-{flag(item)[2:]}"
    else:
        attrs = {"type": _type(item), "metavar": _metavar(item)}
    if "short" in item.metadata:
        names.insert(1, item.metadata["short"])
    return SettingOption(
        *names,
        section=item.metadata["section"],
        variables=variables(item),
        default_text=show_default(item),
        help=item.metadata["help"],
        **attrs,
    )


def _config_option() -> SettingOption:
    return SettingOption(
        "config_file",
        "-c",
        "--config",
        section=GENERAL,
        variables=(CONFIG_VARIABLE,),
        default_text="flaskbus.toml, or [tool.flaskbus] of pyproject.toml",
        help="Configuration file.",
        type=click.Path(),
        metavar="FILE",
    )


def _type(item: Field[Any]) -> click.ParamType[Any]:
    """Text, but for what the shell can complete."""
    if "choices" in item.metadata:
        return click.Choice(item.metadata["choices"], case_sensitive=False)
    path = item.metadata.get("path")
    return click.Path(file_okay=path == "file") if path else click.STRING


def _metavar(item: Field[Any]) -> str | None:
    if "choices" in item.metadata:
        return None  # click shows the choices
    by_unit = {"seconds": "DURATION", "bytes": "SIZE", None: "NUMBER"}
    by_path = {"file": "FILE", "directory": "DIRECTORY", None: by_unit[item.metadata.get("unit")]}
    metavar: str = item.metadata.get("metavar") or by_path[item.metadata.get("path")]
    return metavar


_NOTE = (
    "Every setting can also come from its environment variable or from the configuration file: a flag is "
    "stronger than a variable, and a variable than the file. 'flaskbus config' shows what came from where. "
    "A DURATION is 30, 30s, 500ms, 5m or 1h30m; a SIZE is 65536, 64KiB or 16MiB."
)


class _Help(click.Command):
    """Help with examples at the top and options under headings."""

    def __init__(self, *args: Any, examples: str = "", **attrs: Any):
        super().__init__(*args, **attrs)
        self.examples = examples

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help_text(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for line in dedent(self.examples).strip().splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}".rstrip() + "\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {
            heading: [] for heading in ("Options", *SECTIONS, GENERAL)
        }
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None or isinstance(param, click.Argument):
                continue
            heading = GENERAL if record[0].startswith(("--help", "--version")) else "Options"
            groups.setdefault(getattr(param, "section", heading), []).append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)
        if any(isinstance(param, SettingOption) for param in self.params):
            formatter.write_paragraph()
            formatter.write_text(_NOTE)


class FlaskbusCommand(_Help):
    """A command; ``examples`` are lines to be shown as they are."""


class FlaskbusGroup(_Help, click.Group):
    """A group of commands; ``examples`` are lines to be shown as they are."""

    command_class = FlaskbusCommand
    group_class = type

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        _Help.format_options(self, ctx, formatter)


def run(command: click.Command, args: Iterable[str] | None = None) -> NoReturn:
    """Run a command as a process: its outcome is the exit code, and an operator's mistake one line.

    A callback that returns a number exits with it.
    """
    try:
        code = _outcome(command, None if args is None else [*args])
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes again at exit, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _outcome(command: click.Command, args: list[str] | None) -> int:
    try:
        result = command.main(args, prog_name=command.name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except OperatorError as error:
        click.echo(f"{command.name}: error: {error}", err=True)
        return error.exit_code
    return result if isinstance(result, int) else 0
