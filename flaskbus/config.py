"""Where each setting's value comes from: flag > environment > file > default.

The file is ``flaskbus.toml``, or ``pyproject.toml`` with a ``[tool.flaskbus]`` table. Its top level holds
what all components share, ``[gateway]`` and ``[agent]`` what only one of them has; what is shared may be
overridden there::

    redis = "redis://10.0.0.5:6379/0"
    apps = ["frontend:app=/", "backend:app=/backend"]

    [gateway]
    port = 8000

    [agent]
    threads = 8

Everything here is pure but :func:`load`, :func:`find_file` and :func:`read_secrets`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Generic

from flaskbus.errors import UsageError
from flaskbus.settings import COMPONENTS, CommonSettings, S, check, flag, variables

CONFIG_VARIABLE = "FLASKBUS_CONFIG"
FILE_NAMES = ("flaskbus.toml", "pyproject.toml")
FLAG, DEFAULT = "flag", "default"


@dataclass(frozen=True)
class ConfigFile:
    """A checked configuration file.

    ``tables``: table name (``""`` is the top level) -> setting -> value in its type. ``root`` is the table of
    the file that is ours, ``"tool.flaskbus"`` or ``""``.
    """

    name: str
    root: str = ""
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    apps: tuple[str, ...] = ()

    def lookup(self, kind: type[CommonSettings], key: str) -> tuple[Any, str] | None:
        """The value of a setting and where it stands; a component's own table is stronger."""
        for table in dict.fromkeys((kind.table, "")):
            values = self.tables.get(table, {})
            if key in values:
                return values[key], place(self.name, self.root, table)
        return None


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """Settings and, by name, where each came from: ``flag``, a variable, a file or ``default``."""

    settings: S
    sources: dict[str, str]
    file: ConfigFile | None = None

    @property
    def apps(self) -> tuple[str, ...]:
        """``MODULE:APP=PREFIX`` of the configuration file, for when the command line names none."""
        return self.file.apps if self.file else ()


def load(
    kind: type[S], *, flags: Mapping[str, object] | None = None, config_file: str | None = None
) -> Resolved[S]:
    """The settings of a component from this process's environment and directory.

    Raises :class:`~flaskbus.errors.UsageError`.
    """
    file = find_file(config_file, os.environ, Path())
    return read_secrets(resolve(kind, flags=flags or {}, environ=os.environ, file=file))


def resolve(
    kind: type[S], *, flags: Mapping[str, object], environ: Mapping[str, str], file: ConfigFile | None
) -> Resolved[S]:
    """The settings of one component.

    A flag that is None or of another component, and a variable that is empty, count as not given. Raises
    :class:`~flaskbus.errors.UsageError` that names the flag or variable.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for item in fields(kind):
        given = flags.get(item.name)
        variable = next((name for name in variables(item) if environ.get(name)), None)
        if given is not None:
            values[item.name], sources[item.name] = check(item, given, flag(item)), FLAG
        elif variable:
            values[item.name], sources[item.name] = _from_environ(item, variable, environ), variable
        elif file and (found := file.lookup(kind, item.name)):
            values[item.name], sources[item.name] = found
        else:
            sources[item.name] = DEFAULT
    return Resolved(kind(**values), sources, file)


def read_secrets(resolved: Resolved[S]) -> Resolved[S]:
    """The same, with what ``@FILE`` stands for in its place.

    Raises :class:`~flaskbus.errors.UsageError` for a file that cannot be read, or holds no such secret.
    """
    found: dict[str, Any] = {}
    for item in fields(resolved.settings):
        value = getattr(resolved.settings, item.name)
        if item.metadata.get("secret") and value.startswith("@"):
            source = resolved.sources[item.name]
            text = _read_secret(value[1:], flag(item) if source == FLAG else source)
            found[item.name] = check(item, text, f"{item.name} in {value[1:]}")
    return replace(resolved, settings=replace(resolved.settings, **found)) if found else resolved


def _read_secret(path: str, source: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"{source}: the secret in {path} cannot be read: {reason}") from None
    if not text or text.startswith("@"):
        raise UsageError(f"{source}: there is no secret in {path}")
    return text


def _from_environ(item: Field[Any], variable: str, environ: Mapping[str, str]) -> Any:
    value = environ[variable]
    if variable == "FLASKBUS_PORT" and "://" in value:
        raise UsageError(
            f"FLASKBUS_PORT is {value!r}, which Kubernetes sets for a Service that is named flaskbus: "
            "give the Service another name, or set enableServiceLinks: false in the pod"
        )
    return check(item, value, variable)


def find_file(explicit: str | None, environ: Mapping[str, str], directory: Path) -> ConfigFile | None:
    """``--config``, else ``FLASKBUS_CONFIG``, else ``flaskbus.toml`` or ``pyproject.toml`` of the directory.

    A ``pyproject.toml`` without ``[tool.flaskbus]`` is passed over, unless it was asked for by name. Raises
    :class:`~flaskbus.errors.UsageError` for a file that cannot be read or used.
    """
    asked = explicit or environ.get(CONFIG_VARIABLE)
    if asked:
        label = "--config" if explicit else CONFIG_VARIABLE
        try:
            file = parse(_read(directory / asked), asked)
        except FileNotFoundError:
            raise UsageError(f"{label}: there is no file {asked}") from None
        if file is None:
            raise UsageError(f"{label}: {asked} has no [tool.flaskbus] table")
        return file
    for name in FILE_NAMES:
        if (directory / name).is_file() and (file := parse(_read(directory / name), name)):
            return file
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8, and TOML must be") from None


def parse(text: str, name: str) -> ConfigFile | None:
    """The configuration in a file's text; None for a ``pyproject.toml`` that has none.

    ``name`` is how errors call the file; whether it ends in ``pyproject.toml`` decides where to look. Every
    table is checked, whoever reads it: a mistake shows at the first command and not at the last.
    """
    try:
        top: Any = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name} is not valid TOML: {error}") from None
    root = "tool.flaskbus" if Path(name).name == "pyproject.toml" else ""
    if root:
        tool = top.get("tool")
        top = tool.get("flaskbus") if isinstance(tool, dict) else None
        if top is None:
            return None
    if not isinstance(top, dict):
        raise UsageError(f"{name}: {root} must be a table")
    tables: dict[str, dict[str, Any]] = {"": {key: top[key] for key in top if key not in _TABLES}}
    for table in _TABLES:
        tables[table] = top.get(table, {})
        if not isinstance(tables[table], dict):
            raise UsageError(f"{name}: {table} must be a table, as in [{_join(root, table)}]")
    apps = _apps(tables[""].pop("apps", []), name)
    checked = {
        table: {key: _value(table, key, value, name, root) for key, value in values.items()}
        for table, values in tables.items()
    }
    return ConfigFile(name, root, checked, apps)


def place(name: str, root: str, table: str) -> str:
    """A table of a file, for people: ``flaskbus.toml``, ``pyproject.toml [tool.flaskbus.agent]``."""
    joined = _join(root, table)
    return f"{name} [{joined}]" if joined else name


def _join(root: str, table: str) -> str:
    return ".".join(part for part in (root, table) if part)


_TABLES = {kind.table: kind for kind in COMPONENTS}
_KNOWN: dict[str, dict[str, Field[Any]]] = {
    table: {item.name: item for item in fields(kind)}
    for table, kind in (("", CommonSettings), *_TABLES.items())
}


def _value(table: str, key: str, value: object, name: str, root: str) -> Any:
    here = place(name, root, table)
    if key in _KNOWN[table]:
        return check(_KNOWN[table][key], value, f"{here}: {key}")
    elsewhere = [f"[{_join(root, other)}]" for other in _TABLES if other != table and key in _KNOWN[other]]
    if elsewhere:
        raise UsageError(f"{here}: {key!r} does not belong here; put it under {' or '.join(elsewhere)}")
    if key == "apps":
        raise UsageError(f"{here}: 'apps' does not belong here; put it {_top(root)}")
    raise UsageError(f"{here}: unknown setting {key!r}{_nearest(table, key, root)}")


def _nearest(table: str, key: str, root: str) -> str:
    """``; did you mean …?``, with the place where it is another one than here."""
    candidates = dict.fromkeys(_KNOWN[table], "")
    if not table:
        candidates |= {"apps": ""} | dict.fromkeys(_TABLES, "")
    for other in _TABLES:
        for near in _KNOWN[other]:
            candidates.setdefault(near, f" under [{_join(root, other)}]")
    matches = get_close_matches(key.replace("-", "_").lower(), candidates, 1)
    return f"; did you mean {matches[0]!r}{candidates[matches[0]]}?" if matches else ""


def _top(root: str) -> str:
    return f"under [{root}]" if root else "at the top of the file, before any [table]"


_APP_KEYS = {"app", "prefix", "host_pattern"}


def _apps(value: object, name: str) -> tuple[str, ...]:
    """``apps = ["MODULE:APP=PREFIX"]`` or ``[[apps]]`` tables with app, prefix and host_pattern."""
    usage = f'{name}: apps must be a list such as ["frontend:app=/", "backend:app=/backend"]'
    if not isinstance(value, list):
        raise UsageError(usage)
    return tuple(_app(entry, usage, name) for entry in value)


def _app(entry: object, usage: str, name: str) -> str:
    if isinstance(entry, str) and entry:
        return entry
    if not isinstance(entry, dict) or not all(isinstance(part, str) for part in entry.values()):
        raise UsageError(usage)
    for key in entry:
        if key not in _APP_KEYS:
            near = get_close_matches(key, _APP_KEYS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{name} [[apps]]: unknown key {key!r}{hint}")
    if not entry.get("app"):
        raise UsageError(f'{name} [[apps]]: each needs an app = "MODULE:APP"')
    return f"{entry['app']}={entry.get('host_pattern', '')}{entry.get('prefix', '/')}"
