"""Import strings, each in a directory of its own."""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaskbus.errors import AppImportError
from flaskbus_agent.importer import import_app, import_function

WSGI = "def {}(environ, start_response): return []\n"
FLASK = "from flask import Flask\n"


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty current directory, and nothing of it left in the interpreter."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(tmp_path)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(sys.modules[name].__spec__):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., None]:
    """Write files: ``write("name.py", "source")``."""

    def write(name: str, source: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)

    return write


Write = Callable[[str, str], None]


def name_of(app: Any) -> str:
    name: str = app.name if hasattr(app, "name") else app.__name__
    return name


def message_of(target: str, *, factory: bool = False) -> str:
    with pytest.raises(AppImportError) as caught:
        import_app(target, factory=factory)
    return str(caught.value)


# What is found


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("boutique:app", "app"),
        ("boutique: app ", "app"),
        ("boutique:other", "other"),
        ("boutique:holder.nested", "nested"),
        ("boutique:make()", "made"),
        ('boutique:make("dev")', "dev"),
        ('boutique:make("dev", suffix=["a", 1])', "dev['a', 1]"),
        ("boutique:make(suffix=-1)", "made-1"),
        ("boutique:holder.build('x')", "x"),
        # A function that takes no arguments can be nothing but a factory.
        ("boutique:make", "made"),
        ("boutique:Application", "Application"),
        # These take any arguments, and are more likely an app with a decorator around it.
        ("boutique:decorated", "decorated"),
        ("boutique:partial", "partial"),
        ("boutique:instance", "instance"),
    ],
)
def test_names_and_calls(write: Write, target: str, name: str) -> None:
    write(
        "boutique.py",
        WSGI.format("app")
        + WSGI.format("other")
        + """
from types import SimpleNamespace

class Application:
    name = "Application"
    def __call__(self, environ, start_response): return []

class Instance(Application):
    name = "instance"

class Partial(Application):
    name = "partial"
    def __call__(self, *args): return []

def build(name):
    made = Application()
    made.name = name
    return made

def make(name="made", suffix=""):
    return build(f"{name}{suffix}")

def decorated(*args, **kwargs): return []

instance = Instance()
partial = Partial()
holder = SimpleNamespace(nested=build("nested"), build=build)
""",
    )
    assert name_of(import_app(target)) == name


def test_factory(write: Write) -> None:
    write("boutique.py", "def decorated(*args):\n    assert not args\n    return app\n" + WSGI.format("app"))
    assert name_of(import_app("boutique:decorated")) == "decorated"
    assert name_of(import_app("boutique:decorated", factory=True)) == "app"
    # It has been called already.
    assert name_of(import_app("boutique:decorated()", factory=True)) == "app"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (WSGI.format("app"), "app"),
        (WSGI.format("application"), "application"),
        (WSGI.format("application") + WSGI.format("app"), "app"),
        ("app = 'a setting'\n" + WSGI.format("application"), "application"),
        (FLASK + "site = Flask('mine')", "mine"),
        (FLASK + "site = same = Flask('mine')", "mine"),
        (FLASK + "app = Flask('mine'); other = Flask('other')", "mine"),
        (FLASK + "def create_app(): return Flask('made')", "made"),
        (FLASK + "def make_app(debug=False): return Flask('made')", "made"),
        (FLASK + "def make_app(): return 1\ndef create_app(*args): return Flask('made')", "made"),
        (FLASK + "def app(): return Flask('made')", "made"),
    ],
)
@pytest.mark.parametrize("target", ["boutique", "boutique.py", "./boutique.py"])
def test_a_module_alone(write: Write, source: str, name: str, target: str) -> None:
    write("boutique.py", source)
    assert name_of(import_app(target)) == name


def test_a_module_alone_with_factory(write: Write) -> None:
    write("boutique.py", WSGI.format("app") + WSGI.format("made") + "def create_app(): return made\n")
    assert name_of(import_app("boutique", factory=True)) == "made"


def test_nothing_of_flask_is_needed(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flask", raising=False)
    write("boutique.py", WSGI.format("create_app") + "\nvalue = 1\n")
    assert "wants arguments" in message_of("boutique")
    assert "flask" not in sys.modules


@pytest.mark.parametrize(
    "target",
    ["boutique.web:app", "boutique/web.py:app", "./boutique/web.py", "boutique/../boutique/web.py:app"],
)
def test_a_module_in_a_package(write: Write, target: str) -> None:
    write("boutique/__init__.py", "")
    write("boutique/web.py", "from boutique.parts import app\n")
    write("boutique/parts.py", WSGI.format("app"))
    assert name_of(import_app(target)) == "app"
    assert sys.modules["boutique.web"]


@pytest.mark.parametrize("target", ["src/boutique", "src/boutique/", "src/boutique/__init__.py:app"])
def test_a_package_by_its_path(write: Write, target: str) -> None:
    write("src/boutique/__init__.py", "from .web import app\n")
    write("src/boutique/web.py", WSGI.format("app"))
    assert name_of(import_app(target)) == "app"
    assert sys.modules["boutique.web"]


def test_the_current_directory_comes_first(write: Write, tmp_path: Path) -> None:
    write("elsewhere/boutique.py", WSGI.format("app") + "app.name = 'elsewhere'\n")
    write("boutique.py", WSGI.format("app") + "app.name = 'here'\n")
    sys.path[:0] = [str(tmp_path / "elsewhere"), str(tmp_path)]
    assert name_of(import_app("boutique:app")) == "here"
    assert sys.path[0] == str(tmp_path)
    assert sys.path.count(str(tmp_path)) == 1


def test_a_module_that_was_written_a_moment_ago(write: Write) -> None:
    assert "there is no module 'boutique'" in message_of("boutique:app")
    write("boutique.py", WSGI.format("app"))
    assert name_of(import_app("boutique:app")) == "app"


# What is not found


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("botique:app", "{target}: there is no module 'botique' in {here} or elsewhere on sys.path; "
            "did you mean 'boutique'?"),
        ("zzqqzz:app", "{target}: there is no module 'zzqqzz' in {here} or elsewhere on sys.path"),
        ("flsak", "{target}: there is no module 'flsak' in {here} or elsewhere on sys.path; did you mean 'flask'?"),
        ("boutique.wbe:app", "{target}: there is no module 'wbe' in 'boutique'; did you mean 'web'?"),
        ("boutique.zzqqzz:app", "{target}: there is no module 'zzqqzz' in 'boutique'"),
        ("boutique.web.app", "{target}: there is no module 'boutique.web.app'; did you mean 'boutique.web:app'?"),
        ("boutique.web.zz", "{target}: there is no module 'zz' in 'boutique.web'"),
        ("boutique.wbe.deep:app", "{target}: there is no module 'wbe' in 'boutique'; did you mean 'web'?"),
        ("boutique/wbe.py", "{target}: there is no file {here}/boutique/wbe.py; did you mean 'web.py'?"),
        ("nothing/app.py", "{target}: there is no file {here}/nothing/app.py"),
        ("empty/", "{target}: there is no file {here}/empty/__init__.py"),
        ("boutique.web:ap", "{target}: there is no 'ap' in 'boutique.web'; did you mean 'app'?"),
        ("boutique.web:zzqqzz", "{target}: there is no 'zzqqzz' in 'boutique.web'"),
        ("boutique.web:_hiden", "{target}: there is no '_hiden' in 'boutique.web'"),
        ("boutique.web:app.nme", "{target}: there is no 'nme' in 'boutique.web.app'; did you mean 'name'?"),
        ("boutique.web:maek()", "{target}: there is no 'maek' in 'boutique.web'; did you mean 'make'?"),
        ("", "'' names no module; write MODULE:APP, such as myapp:app"),
        (":app", "':app' names no module; write MODULE:APP, such as myapp:app"),
        (".web:app", "'.web:app' names no module; write MODULE:APP, such as myapp:app"),
        ("boutique..web:app", "'boutique..web:app' names no module; write MODULE:APP, such as myapp:app"),
        ("boutique.web:text", "{target} is not a WSGI callable but an instance of str"),
        ("boutique.web:make_none()", "{target} is not a WSGI callable but None; "
            "does its factory end with 'return app'?"),
        ("boutique:web", "{target} is a module; did you mean 'boutique.web'?"),
        ("boutique.web:text()", "{target}: str cannot be called; drop the () or --factory"),
        ("boutique.web:asgi", "{target} does not take (environ, start_response) as a WSGI app does; "
            "it looks like an ASGI app, which needs a WSGI adapter"),
        ("boutique.web:one", "{target} does not take (environ, start_response) as a WSGI app does; call its factory"),
        ("boutique.web:one()", "{target} cannot be called like this: missing a required argument: 'env'"),
        ("boutique.web:one(1, 2)", "{target} cannot be called like this: too many positional arguments"),
        ("boutique.web:one(nev=1)", "{target} cannot be called like this: missing a required argument: 'env'"),
        ("needy", "{target}: create_app wants arguments; write them: 'needy:create_app(...)'"),
        ("two", "{target} has several Flask apps; name one of two:first, two:second"),
        ("bare", "{target} has none of app, application, create_app, make_app; "
            "name the app, as in bare:NAME or bare:NAME()"),
    ],
)  # fmt: skip
def test_what_is_said(write: Write, tmp_path: Path, target: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    write("boutique/__init__.py", "from . import web\n")
    write(
        "boutique/web.py",
        WSGI.format("app")
        + "app.name = text = 'text'\n_hidden = 1\n"
        + "def make(): return app\ndef make_none(): pass\ndef one(env): pass\n"
        + "async def asgi(scope, receive, send): pass\n",
    )
    write("needy.py", "def create_app(config): pass\n")
    write("two.py", FLASK + "first = Flask('a'); second = Flask('b')\n")
    write("bare.py", "")
    assert message_of(target) == says.format(here=tmp_path, target=target)


def test_factory_that_is_none(write: Write) -> None:
    write("boutique.py", WSGI.format("app") + "text = ''\n")
    assert message_of("boutique", factory=True) == (
        "boutique has none of create_app, make_app; name the app, as in boutique:NAME or boutique:NAME()"
    )
    assert "str cannot be called" in message_of("boutique:text", factory=True)
    assert "missing a required argument: 'environ'" in message_of("boutique:app", factory=True)


def test_the_nearest_of_ones_own_modules_comes_before_others(write: Write) -> None:
    write("flasky.py", "")
    assert message_of("flaskk:app").endswith("did you mean 'flasky'?")


@pytest.mark.parametrize(
    "expression",
    [
        "make(", "make)", "1", "make()()", "make().app", "make(environ)", "make(1 + 1)", "make(*[1])",
        "make(**{'a': 1})", "make(a=b)", "apps[0]", "a b", "a-b", "lambda: 1", "(a, b)", "import os",
        "make(open('x'))", "make({[]: 1})", "make(a=1, a=2)", "\0", "(" * 10_000, "'a'.join", "make(f'{1}')",
    ],
)  # fmt: skip
def test_an_expression_that_is_neither_name_nor_call(write: Write, expression: str) -> None:
    write("boutique.py", "def make(*args, **kwargs): raise AssertionError\napps = [make]\n")
    assert "is neither a name nor a call with literal arguments" in message_of(f"boutique:{expression}")


@given(st.text(alphabet="ab.():=[]{}*'\",1 \0", min_size=1))
def test_any_expression_is_an_app_or_told(expression: str) -> None:
    with suppress(AppImportError):
        assert callable(import_app(f"flask:{expression}"))


# What the imported code raises


@pytest.mark.parametrize(
    ("source", "headline"),
    [
        ("import nothing_like_this\n", "ModuleNotFoundError: No module named 'nothing_like_this'"),
        ("import boutique.web.deeper\n", "ModuleNotFoundError: No module named 'boutique.web.deeper'"),
        ("from json import nothing\n", "ImportError: cannot import name 'nothing' from 'json'"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("raise SystemExit('no config')\n", "SystemExit: no config"),
        ("raise ValueError('first\\nsecond')\n", "ValueError: first"),
    ],
)
def test_a_module_that_raises(write: Write, tmp_path: Path, source: str, headline: str) -> None:
    write("boutique/__init__.py", "")
    write("boutique/web.py", source)
    first, *rest = message_of("boutique.web:app").splitlines()
    assert first.startswith(f"boutique.web:app could not be imported: {headline}")
    assert rest[0] == f'  File "{tmp_path}/boutique/web.py", line 1, in <module>'
    assert rest[1] == f"    {source.strip()}"
    assert "importlib" not in "\n".join(rest)


def test_a_module_that_is_no_python(write: Write, tmp_path: Path) -> None:
    write("boutique.py", "def app(:\n    pass\n")
    assert re.fullmatch(
        rf"boutique:app could not be imported: SyntaxError: .*\(boutique\.py, line 1\)\n"
        rf'  File "{re.escape(str(tmp_path))}/boutique\.py", line 1\n    def app\(:\n +\^',
        message_of("boutique:app"),
    )


def test_only_ones_own_frames_are_shown(write: Write, tmp_path: Path) -> None:
    write("boutique.py", "import json\n\ndef load():\n    return json.loads('{')\n\nload()\n")
    message = message_of("boutique:app")
    assert message.startswith("boutique:app could not be imported: JSONDecodeError: ")
    assert re.findall(r'File "(.*)", line (\d+)', message) == [
        (f"{tmp_path}/boutique.py", n) for n in ("6", "4")
    ]


def test_the_last_frames_are_shown(write: Write) -> None:
    write("boutique.py", "def down(n):\n    if n == 0: raise ValueError\n    down(n - 1)\n\ndown(50)\n")
    message = message_of("boutique:app")
    assert message.count("  File ") <= 5
    assert "if n == 0" in message


def test_installed_code_that_raises_shows_its_frames(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("boutique.py", "1 / 0\n")
    monkeypatch.setattr("flaskbus_agent.importer._INSTALLED", (str(tmp_path),))
    assert f'File "{tmp_path}/boutique.py", line 1' in message_of("boutique:app")


def test_the_error_is_the_cause(write: Write) -> None:
    write("boutique.py", "1 / 0\n")
    with pytest.raises(AppImportError) as caught:
        import_app("boutique:app")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_ctrl_c_while_importing_is_no_import_error(write: Write) -> None:
    write("boutique.py", "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        import_app("boutique:app")


@pytest.mark.parametrize("target", ["boutique:create_app()", "boutique:create_app", "boutique"])
def test_a_factory_that_raises(write: Write, tmp_path: Path, target: str) -> None:
    write("boutique.py", "def create_app():\n    return int('x')\n")
    first, *rest = message_of(target).splitlines()
    assert (
        first == f"{target} could not make the app: ValueError: invalid literal for int() with base 10: 'x'"
    )
    assert rest[0] == f'  File "{tmp_path}/boutique.py", line 2, in create_app'


def test_a_type_error_inside_a_factory_is_its_own(write: Write) -> None:
    write("boutique.py", "def create_app():\n    return len(1)\n")
    assert "could not make the app: TypeError: object of type 'int' has no len()" in message_of("boutique")


@pytest.mark.parametrize("first", ["a/app.py", "b/app.py"])
def test_two_files_of_one_name_are_not_taken_for_each_other(write: Write, tmp_path: Path, first: str) -> None:
    write("a/app.py", WSGI.format("app"))
    write("b/app.py", WSGI.format("app"))
    second = {"a/app.py": "b/app.py", "b/app.py": "a/app.py"}[first]
    import_app(first)
    import_app(first)
    assert message_of(second) == (
        f"{second}: a module 'app' was imported before, from {tmp_path / first}; rename one of the two, "
        "or serve them from two agents"
    )


def test_a_file_named_like_a_builtin_module(write: Write) -> None:
    write("sys.py", WSGI.format("app"))
    assert "a module 'sys' was imported before, from the interpreter;" in message_of("./sys.py")


# Without signatures


def test_what_has_no_signature_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("unsigned")
    module.__dict__.update(app=min, create=max)
    monkeypatch.setitem(sys.modules, "unsigned", module)
    with pytest.raises(ValueError, match="no signature"):
        inspect.signature(min)
    assert name_of(import_app("unsigned:app")) == "min"
    # It is called, and what it makes is no app.
    assert "is not a WSGI callable but an instance of int" in message_of("unsigned:create(1, 2)")


# Functions


def test_a_function(write: Write) -> None:
    write(
        "boutique.py", "def hook(worker): return worker\nclass K:\n    @staticmethod\n    def m(): return 1\n"
    )
    assert import_function("boutique:hook")(7) == 7
    assert import_function("boutique:K.m")() == 1


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("boutique:hok", "there is no 'hok' in 'boutique'; did you mean 'hook'?"),
        ("boutique:number", "boutique:number is not a function; write MODULE:FUNCTION"),
        ("boutique:hook()", "boutique:hook() is not a function; write MODULE:FUNCTION"),
        ("boutique", "boutique is not a function; write MODULE:FUNCTION"),
        ("botique:hook", "did you mean 'boutique'?"),
    ],
)
def test_what_is_no_function(write: Write, target: str, says: str) -> None:
    write("boutique.py", "number = 1\ndef hook(worker): pass\n")
    with pytest.raises(AppImportError, match=re.escape(says)):
        import_function(target)
