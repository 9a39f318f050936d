"""FlaskBus in apps, factories and contexts; no broker is needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from flask import Flask, Response, stream_with_context
from flask.cli import FlaskGroup, ScriptInfo
from flask.typing import ResponseReturnValue

from flaskbus.errors import UsageError
from flaskbus.extension import BusState, FlaskBus, flask_cli, from_config, import_string
from flaskbus.settings import AgentSettings


def make_app(name: str = "app", bus: FlaskBus | None = None, **config: Any) -> Flask:
    app = Flask(name)
    app.config.from_mapping(config)
    (bus or FlaskBus()).init_app(app)
    return app


def state(app: Flask) -> BusState:
    found = app.extensions["flaskbus"]
    assert isinstance(found, BusState)
    return found


# Configuration


def test_an_app_needs_no_configuration() -> None:
    app = Flask("app")
    FlaskBus(app)
    assert state(app) == BusState(AgentSettings(), {})


def test_settings_come_from_the_configuration_of_the_app() -> None:
    app = make_app(
        FLASKBUS_REDIS_URL="redis://b:1/2",
        FLASKBUS_THREADS=8,
        FLASKBUS_LEASE="30s",
        FLASKBUS_BODY_LIMIT="1MiB",
        FLASKBUS_PRELOAD=True,
        FLASKBUS_NAME=None,
        SECRET_KEY="x",
    )
    given: dict[str, Any] = {
        "redis": "redis://b:1/2",
        "threads": 8,
        "lease": 30.0,
        "body_limit": 1024**2,
        "preload": True,
    }
    assert state(app) == BusState(AgentSettings(**given), given)


def test_a_gateways_settings_are_checked_and_left_to_it() -> None:
    assert from_config({"FLASKBUS_PORT": 8000, "FLASKBUS_CONFIG": "x.toml"}) == {}
    with pytest.raises(UsageError, match="FLASKBUS_PORT must be at most 65535"):
        from_config({"FLASKBUS_PORT": 80000})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"FLASKBUS_REDIS_ULR": "x"},
            "unknown config key 'FLASKBUS_REDIS_ULR'; did you mean 'FLASKBUS_REDIS_URL'?",
        ),
        ({"FLASKBUS_QQQQQQQ": "x"}, "unknown config key 'FLASKBUS_QQQQQQQ'$"),
        ({"FLASKBUS_THREADS": "many"}, "FLASKBUS_THREADS must be a whole number, not 'many'"),
        ({"FLASKBUS_NAMESPACE": "a*"}, "FLASKBUS_NAMESPACE: namespace 'a\\*' is not usable"),
    ],
)
def test_a_mistake_is_told_by_the_name_of_its_key(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("?", "\\?")):
        make_app(**config)


# Apps and contexts


def test_one_extension_serves_many_apps_apart() -> None:
    bus = FlaskBus()
    one = make_app("one", bus, FLASKBUS_THREADS=1)
    two = make_app("two", bus, FLASKBUS_THREADS=2)
    with one.app_context():
        assert bus.settings.threads == 1
        with two.app_context():
            assert bus.settings.threads == 2
        assert bus.settings.threads == 1
    assert state(one) is not state(two)


def test_a_factory_makes_equal_apps_with_states_of_their_own() -> None:
    bus = FlaskBus()
    first, second = (make_app("app", bus, FLASKBUS_THREADS=3) for _ in range(2))
    assert state(first) == state(second)
    assert state(first) is not state(second)


def test_the_state_belongs_to_a_context() -> None:
    bus = FlaskBus()
    make_app("app", bus)
    with pytest.raises(RuntimeError, match="application context"):
        _ = bus.state
    with Flask("other").app_context(), pytest.raises(RuntimeError, match="not told of the app 'other'"):
        _ = bus.state


def on_bus(request_id: str, attempt: int = 1) -> dict[str, Any]:
    """What an agent adds to the environ."""
    return {"flaskbus.request_id": request_id, "flaskbus.attempt": attempt}


def test_the_request_is_known_within_it() -> None:
    bus = FlaskBus()
    app = make_app("app", bus)
    other = make_app("other", bus)

    @app.get("/")
    def index() -> ResponseReturnValue:
        seen = [bus.request_id, bus.attempt]
        with app.app_context():
            seen.append(bus.request_id)
        with other.app_context():
            seen.append(bus.request_id)
        with other.test_request_context(environ_overrides=on_bus("inner", 2)):
            seen += [bus.request_id, bus.attempt]
        return [*seen, bus.request_id]

    answer = app.test_client().get("/", environ_overrides=on_bus("outer"))
    assert answer.json == ["outer", 1, "outer", "outer", "inner", 2, "outer"]


def test_without_the_bus_there_is_no_request_of_it() -> None:
    bus = FlaskBus()
    app = make_app("app", bus)
    assert bus.request_id is None
    with app.app_context():
        assert bus.request_id is None
    with app.test_request_context():
        assert (bus.request_id, bus.attempt) == (None, None)


def test_a_stream_knows_its_request() -> None:
    bus = FlaskBus()
    app = make_app("app", bus)

    @app.get("/")
    def index() -> Response:
        def body() -> Iterator[str]:
            for _ in range(2):
                yield f"{bus.request_id} "

        return Response(stream_with_context(body()))

    answer = app.test_client().get("/", environ_overrides=on_bus("s1"))
    assert answer.text == "s1 s1 "


def test_requests_at_a_time_are_kept_apart() -> None:
    bus = FlaskBus()
    app = make_app("app", bus)
    together = threading.Barrier(4, timeout=10)

    @app.get("/")
    def index() -> ResponseReturnValue:
        before = bus.request_id
        together.wait()
        return [before, bus.request_id]

    seen: dict[str, object] = {}

    def ask(name: str) -> None:
        seen[name] = app.test_client().get("/", environ_overrides=on_bus(name)).json

    threads = [threading.Thread(target=ask, args=(f"r{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {f"r{number}": [f"r{number}", f"r{number}"] for number in range(4)}


# flask bus


def test_flask_finds_the_group_by_its_entry_point() -> None:
    [found] = [point for point in entry_points(group="flask.commands") if point.name == "bus"]
    assert found.load() is flask_cli


def test_help_needs_no_app() -> None:
    runner = CliRunner()
    group = FlaskGroup(create_app=lambda: pytest.fail("the app was made"))
    listing = runner.invoke(group, ["bus", "--help"])
    assert listing.exit_code == 0, listing.output
    for name in ("request", "mounts", "agents", "unmount", "doctor", "agent"):
        assert f"\n  {name} " in listing.output
    one = runner.invoke(group, ["bus", "mounts", "--help"])
    assert one.exit_code == 0, one.output
    assert "--json" in one.output


def test_a_mistake_in_the_app_ends_like_any_other() -> None:
    app = Flask("app")
    app.config["FLASKBUS_THREADZ"] = 1
    outcome = CliRunner().invoke(FlaskGroup(create_app=lambda: app), ["bus", "mounts"])
    assert outcome.exit_code == 2
    assert outcome.output == (
        "flask bus: error: unknown config key 'FLASKBUS_THREADZ'; did you mean 'FLASKBUS_THREADS'?\n"
    )


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ("shop", "shop"),
        ("shop.py", "shop"),
        ("shop:make('x')", "shop:make('x')"),
        ("pkg.web:app", "pkg.web:app"),
    ],
)
def test_the_app_of_flask_is_named_as_an_agent_wants_it(
    given: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["somewhere"])
    assert import_string(ScriptInfo(app_import_path=given)) == (target, str(tmp_path))


def test_the_directory_of_the_app_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "pkg"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["somewhere"])
    found = import_string(ScriptInfo(app_import_path="src/pkg/web.py:app"))
    assert found == ("pkg.web:app", str(tmp_path / "src"))


def test_flasks_own_guess_is_made_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "app.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["somewhere"])
    assert import_string(ScriptInfo()) == ("app", str(tmp_path))


def test_a_command_that_makes_the_app_itself_cannot_be_named() -> None:
    with pytest.raises(UsageError, match="flaskbus-agent MODULE:APP"):
        import_string(ScriptInfo(create_app=lambda: Flask("x")))


def test_an_app_that_is_not_found_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="which app"):
        import_string(ScriptInfo())
