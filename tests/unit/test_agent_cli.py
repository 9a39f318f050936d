"""What ``flaskbus-agent`` makes of its arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from flaskbus.errors import UsageError
from flaskbus.settings import AgentSettings
from flaskbus_agent import supervisor
from flaskbus_agent.cli import agent, checked, mounted_apps


def apps(*given: str, **settings: object) -> list[tuple[str, str, str]]:
    mounted = mounted_apps(given, AgentSettings(**settings))  # type: ignore[arg-type]
    return [(app.mount.name, app.target, app.name) for app in mounted]


def test_one_app_and_a_prefix() -> None:
    assert apps("myapp:app", prefix="/my") == [("/my", "myapp:app", "myapp:app")]
    assert apps("myapp:app=/my") == [("/my", "myapp:app", "myapp:app")]
    assert apps("myapp", prefix="/") == [("/", "myapp", "myapp")]


def test_several_apps_are_named_by_their_import_strings() -> None:
    assert apps("frontend:app=/", "backend:app=/backend") == [
        ("/", "frontend:app", "frontend:app"),
        ("/backend", "backend:app", "backend:app"),
    ]


def test_hosts() -> None:
    assert apps("shop.wsgi=shop.example.com/") == [("shop.example.com/", "shop.wsgi", "shop.wsgi")]
    assert apps("shop", host_pattern="*.example.com") == [("*.example.com/", "shop", "shop")]
    assert apps("shop=/a", host_pattern="example.com") == [("example.com/a", "shop", "shop")]


def test_an_equals_sign_in_a_call_is_part_of_the_call() -> None:
    call = 'api:create_app(env="staging", path="/x=y")'
    assert apps(f"{call}=/api") == [("/api", call, call)]
    assert apps(call, prefix="/api") == [("/api", call, call)]


def test_partitions() -> None:
    assert [place for place, _, _ in apps("a=/myapp", partitions=3)] == ["/myapp", "/myapp;2", "/myapp;4"]
    assert [place for place, _, _ in apps("a=/myapp;7", partitions=3)] == ["/myapp;7"]
    assert [place for place, _, _ in apps("a=/myapp", "a=/myapp;7")] == ["/myapp", "/myapp;7"]
    assert apps("a=/a", host_pattern="example.com", partitions=2)[0] == ("example.com/a", "a", "a")


def test_a_name() -> None:
    assert apps("myapp:app=/my", name="shop") == [("/my", "myapp:app", "shop")]


@pytest.mark.parametrize(
    ("given", "settings", "says"),
    [
        ([], {}, "which app"),
        (["myapp:app"], {}, "Add --prefix /myapp"),
        (["a.b:app", "c=/c"], {}, "a.b:app=/b"),
        (["=/a"], {}, "MODULE:APP=PREFIX"),
        (["a=a"], {}, "did you mean /a"),
        (["a=/../x"], {}, ".."),
        (["a"], {"prefix": "a"}, "/a"),
        (["a=/a", "b=/a"], {}, "a and b are both mounted on /a"),
        (["a=/a", "b=/b"], {"name": "shop"}, "--name"),
        (["a=/a"], {"prefix": "/b"}, "--prefix /b"),
        (["a=/a", "b=/b"], {"prefix": "/c"}, "--prefix /c"),
        (["a=example.com/"], {"host_pattern": "example.org"}, "--host-pattern"),
        ([f"a{number}=/{number}" for number in range(51)], {}, "up to 50 apps"),
        (["a=/a"], {"partitions": 51}, "up to 50 partitions"),
        (["a=/a", "b=/b"], {"partitions": 26}, "up to 50 partitions of apps"),
        (["a=/a", "b=/a;7"], {}, "a and b are both mounted on /a"),
        (["a=/a", "b=/a;2"], {"partitions": 3}, "a and b are both mounted on /a"),
        (["a=/a;2", "a=/a;2"], {}, "a and a are both mounted on /a"),
    ],
)
def test_mistakes(given: list[str], settings: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        apps(*given, **settings)
    assert says in str(caught.value)


def test_preload_and_reload_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        checked(AgentSettings(preload=True, reload=True))


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1/0", "redis://localhost:7000", "redis://[::1]/0", "unix:///run/redis.sock"]
)
def test_the_debugger_is_for_this_machine(url: str) -> None:
    assert checked(AgentSettings(debugger=True, workers=4, redis=url)).workers == 1


@pytest.mark.parametrize(
    "url",
    [
        "redis://10.0.0.5/0",
        "redis://:secret@redis.example.com/0",
        "redis+sentinel://127.0.0.1/m",
        "redis+cluster://127.0.0.1",
    ],
)
def test_the_debugger_refuses_other_brokers(url: str) -> None:
    with pytest.raises(UsageError, match="--debugger") as caught:
        checked(AgentSettings(debugger=True, redis=url))
    assert "secret" not in str(caught.value)


def test_the_debugger_wants_its_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WERKZEUG_DEBUG_PIN", "off")
    with pytest.raises(UsageError, match="WERKZEUG_DEBUG_PIN"):
        checked(AgentSettings(debugger=True))


def test_chdir_comes_before_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(supervisor, "run", lambda settings, mounted: seen.append((Path.cwd(), mounted)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site").mkdir()
    result = CliRunner().invoke(agent, ["myapp:app", "--prefix", "/my", "--chdir", "site"])
    assert result.exception is None, result.output
    ((directory, (app,)),) = seen
    assert directory == tmp_path / "site"
    assert app.target == "myapp:app"


def test_chdir_to_nowhere_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(agent, ["myapp:app=/my", "--chdir", "nowhere"])
    assert isinstance(result.exception, UsageError)
    assert "--chdir nowhere: No such file or directory" in str(result.exception)


def test_apps_come_from_the_configuration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(supervisor, "run", lambda settings, mounted: seen.extend(mounted))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flaskbus.toml").write_text('apps = ["frontend:app=/", "backend:app=/backend"]')
    assert CliRunner().invoke(agent, []).exception is None
    assert [app.mount.name for app in seen] == ["/", "/backend"]
    assert CliRunner().invoke(agent, ["other:app=/other"]).exception is None
    assert seen[-1].mount.name == "/other"
