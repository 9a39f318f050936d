"""Import strings -> WSGI callables.

``MODULE`` is a dotted name or the path of a file, and what may follow it is ``:NAME``, ``:NAME.NAME`` or a call
of that with literal arguments; nothing is ever evaluated. Whatever goes wrong is the operator's to mend, so
it becomes one error that says what was not found and what is near, or what the imported code raised and where.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, cast

from flaskbus.errors import AppImportError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

APPS = ("app", "application")
FACTORIES = ("create_app", "make_app")

_FRAMES = 5
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_MACHINERY = (__file__, importlib.__file__, "<frozen importlib")

Arguments = tuple[list[Any], dict[str, Any]]


def import_app(target: str, *, factory: bool = False) -> WSGIApplication:
    """The WSGI callable that an import string names; the current directory is looked in first.

    With ``MODULE`` alone it is what Flask would find: ``app`` or ``application``, the only Flask instance, or
    what ``create_app()`` or ``make_app()`` returns. A function that takes no arguments makes the app;
    ``factory`` says so of any other. Raises :class:`~flaskbus.errors.AppImportError`.
    """
    module, expression = _import(target)
    if expression:
        names, call = _parse(target, expression)
        found = _attribute(target, module, names)
    else:
        found, call = _find(target, module, factory=factory)
    if call is not None or factory or _is_factory(found):
        found = _make(target, found, call or ([], {}))
    _check(target, found)
    return cast("WSGIApplication", found)


def import_function(target: str) -> Callable[..., object]:
    """The function that ``MODULE:FUNCTION`` names. Raises :class:`~flaskbus.errors.AppImportError`."""
    module, expression = _import(target)
    names, call = _parse(target, expression) if expression else ([], None)
    found = _attribute(target, module, names)
    if call is not None or not callable(found):
        raise AppImportError(f"{target} is not a function; write MODULE:FUNCTION")
    return cast("Callable[..., object]", found)


# Modules


def _import(target: str) -> tuple[ModuleType, str]:
    """The module, and what stands behind the colon."""
    name, _, expression = target.partition(":")
    _put_first(Path.cwd())
    importlib.invalidate_caches()
    file = _file(target, name) if "/" in name or name.endswith(".py") else None
    if file:
        name = _module_name(file)
    if not all(name.split(".")):
        raise AppImportError(f"{target!r} names no module; write MODULE:APP, such as myapp:app")
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it is other people's code
        if isinstance(error, ModuleNotFoundError) and not _frames(error):
            raise AppImportError(_not_found(target, error.name or name)) from None
        _failed(f"{target} could not be imported", error)
    origin = getattr(module, "__file__", None) or "the interpreter"
    if file and file != Path(origin).resolve():
        raise AppImportError(
            f"{target}: a module {name!r} was imported before, from {origin}; rename one of the two, "
            "or serve them from two agents"
        )
    return module, expression.strip()


def _put_first(directory: Path) -> None:
    with suppress(ValueError):
        sys.path.remove(str(directory))
    sys.path.insert(0, str(directory))


def _file(target: str, name: str) -> Path:
    path = Path(name).resolve()
    file = path / "__init__.py" if path.is_dir() else path
    if not file.is_file():
        near = _near(path.name, (each.name for each in path.parent.glob("*.py")))
        raise AppImportError(f"{target}: there is no file {file}{near}")
    return file


def _module_name(file: Path) -> str:
    """Of a source file, whose directory (or that of its package) becomes importable."""
    path = file.parent if file.name == "__init__.py" else file.with_suffix("")
    names = [path.name]
    while (path.parent / "__init__.py").is_file():
        path = path.parent
        names.insert(0, path.name)
    _put_first(path.parent)
    return ".".join(names)


def _not_found(target: str, name: str) -> str:
    parent, _, leaf = name.rpartition(".")
    if not parent:
        here = str(Path.cwd())
        # Near names of one's own modules come before those of installed ones.
        near = _near(leaf, _modules([here])) or _near(leaf, _modules())
        return f"{target}: there is no module {name!r} in {here} or elsewhere on sys.path{near}"
    package = sys.modules[parent]
    if hasattr(package, leaf):
        return f"{target}: there is no module {name!r}; did you mean '{parent}:{leaf}'?"
    near = _near(leaf, _modules(getattr(package, "__path__", [])))
    return f"{target}: there is no module {leaf!r} in {parent!r}{near}"


def _modules(path: Iterable[str] | None = None) -> Iterable[str]:
    return (module.name for module in pkgutil.iter_modules(path))


# Attributes and factories


def _parse(target: str, expression: str) -> tuple[list[str], Arguments | None]:
    """The dotted name, and the arguments if it is a call."""
    try:
        node = ast.parse(expression, mode="eval").body
        call: Arguments | None = None
        if isinstance(node, ast.Call):
            call = (
                [ast.literal_eval(argument) for argument in node.args],
                # Of ** there is no name; its literal is not taken apart.
                {
                    str(keyword.arg): ast.literal_eval(keyword.value)
                    for keyword in node.keywords
                    if keyword.arg
                },
            )
            if len(call[1]) < len(node.keywords):
                raise ValueError
            node = node.func
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            raise ValueError  # noqa: TRY004 - told like the others
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        raise AppImportError(
            f"{target}: {expression!r} is neither a name nor a call with literal arguments, "
            'such as app or create_app("dev", debug=True)'
        ) from None
    return [node.id, *names], call


def _attribute(target: str, module: ModuleType, names: list[str]) -> object:
    found: object = module
    where = module.__name__
    for name in names:
        try:
            found = getattr(found, name)
        except AttributeError:
            near = _near(name, (each for each in dir(found) if not each.startswith("_")))
            raise AppImportError(f"{target}: there is no {name!r} in {where!r}{near}") from None
        where = f"{where}.{name}"
    return found


def _find(target: str, module: ModuleType, *, factory: bool) -> tuple[object, Arguments | None]:
    """What Flask would find in a module, and how to call it."""
    if not factory:
        for name in APPS:
            if callable(getattr(module, name, None)):
                return getattr(module, name), None
        # Without Flask loaded there is no instance of it.
        kind = getattr(sys.modules.get("flask"), "Flask", ())
        instances = {id(value): name for name, value in vars(module).items() if isinstance(value, kind)}
        if len(instances) > 1:
            names = ", ".join(f"{target}:{name}" for name in instances.values())
            raise AppImportError(f"{target} has several Flask apps; name one of {names}")
        for name in instances.values():
            return getattr(module, name), None
    for name in FACTORIES:
        found = getattr(module, name, None)
        if callable(found):
            if not _takes(found, 0):
                raise AppImportError(f"{target}: {name} wants arguments; write them: '{target}:{name}(...)'")
            return found, ([], {})
    wanted = FACTORIES if factory else APPS + FACTORIES
    raise AppImportError(
        f"{target} has none of {', '.join(wanted)}; name the app, as in {target}:NAME or {target}:NAME()"
    )


def _is_factory(found: object) -> bool:
    """Whether a function or class is called without arguments: a WSGI one always takes two."""
    if not (inspect.isroutine(found) or inspect.isclass(found)) or not _takes(found, 0):
        return False
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError:
        return False  # built in, without a signature
    # What takes any number is more likely a decorated app.
    return all(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters)


def _make(target: str, factory: object, arguments: Arguments) -> object:
    args, kwargs = arguments
    if not callable(factory):
        raise AppImportError(f"{target}: {type(factory).__name__} cannot be called; drop the () or --factory")
    try:
        inspect.signature(factory).bind(*args, **kwargs)
    except TypeError as error:
        raise AppImportError(f"{target} cannot be called like this: {error}") from None
    except ValueError:
        pass  # built in, without a signature
    try:
        return factory(*args, **kwargs)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it is other people's code
        _failed(f"{target} could not make the app", error)


def _check(target: str, app: object) -> None:
    if isinstance(app, ModuleType):
        raise AppImportError(f"{target} is a module; did you mean '{app.__name__}'?")
    if not callable(app):
        raise AppImportError(f"{target} is not a WSGI callable but {_described(app)}")
    if not _takes(app, 2):
        mend = (
            "it looks like an ASGI app, which needs a WSGI adapter" if _takes(app, 3) else "call its factory"
        )
        raise AppImportError(f"{target} does not take (environ, start_response) as a WSGI app does; {mend}")


def _described(value: object) -> str:
    if value is None:
        return "None; does its factory end with 'return app'?"
    return f"an instance of {type(value).__name__}"


def _takes(function: object, count: int) -> bool:
    """Whether so many positional arguments will do; True where that cannot be told."""
    try:
        inspect.signature(cast("Callable[..., object]", function)).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        return True
    return True


# Messages


def _near(name: str, candidates: Iterable[str]) -> str:
    near = get_close_matches(name, list(candidates), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _failed(what: str, error: BaseException) -> NoReturn:
    """What the imported code raised, in one line, and below it where."""
    frames = _frames(error)
    own = [frame for frame in frames if not frame.filename.startswith(_INSTALLED)]
    lines = traceback.format_list((own or frames)[-_FRAMES:])
    if isinstance(error, SyntaxError):
        lines += traceback.format_exception_only(error)[:-1]
    headline = f"{type(error).__name__}: {error}".partition("\n")[0]
    raise AppImportError("\n".join([f"{what}: {headline}", "".join(lines).rstrip()]).rstrip()) from error


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Where it was raised, without the machinery of imports."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if not frame.filename.startswith(_MACHINERY)]
