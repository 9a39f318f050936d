"""What ``flaskbus dev`` runs and says, without running anything."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from flaskbus.apps import short_name, split_app
from flaskbus.commands.dev_banner import Served, Setup, app_url, banner, curl, redis_cli, shell
from flaskbus.commands.dev_plan import Plan, make_plan, parse_apps
from flaskbus.config import parse, resolve
from flaskbus.errors import UsageError
from flaskbus.routing import Mount
from flaskbus.settings import AgentSettings, GatewaySettings


@pytest.mark.parametrize(
    ("text", "target", "place"),
    [
        ("shop:app=/shop", "shop:app", "/shop"),
        ("shop", "shop", None),
        ("shop=", "shop", ""),
        ("shop:app=shop.example.com/a=b", "shop:app", "shop.example.com/a=b"),
        ('api:create_app(env="x=/y")=/api', 'api:create_app(env="x=/y")', "/api"),
        ('api:create_app("a")', 'api:create_app("a")', None),
    ],
)
def test_splitting_an_app(text: str, target: str, place: str | None) -> None:
    assert split_app(text) == (target, place)


@pytest.mark.parametrize("text", ["", "=/shop", "(x)=/shop"])
def test_what_is_no_app(text: str) -> None:
    with pytest.raises(UsageError, match="MODULE:APP=PREFIX"):
        split_app(text)


def test_a_short_name() -> None:
    assert short_name("pkg.shop:app") == "shop"


def test_apps_in_their_order() -> None:
    assert [(app.target, app.mount.name) for app in parse_apps(["b:app=/b", "a:app=/"])] == [
        ("b:app", "/b"),
        ("a:app", "/"),
    ]


def plan(
    *given: str,
    flags: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
    toml: str = "",
    reload: bool | None = None,
    debugger: bool | None = None,
) -> Plan:
    params = flags or {}
    file = parse(toml, "flaskbus.toml")
    gateway = resolve(GatewaySettings, flags=params, environ=environ or {}, file=file)
    agent = resolve(AgentSettings, flags=params, environ=environ or {}, file=file)
    return make_plan(gateway, agent, given, params, reload, debugger)


def after(command: Sequence[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_flags_reach_the_children_that_know_them() -> None:
    made = plan("shop:app=/s", flags={"port": "8000", "threads": "2", "namespace": "n", "factory": True})
    gateway, agent = made.gateway_command(), made.agent_command(made.apps[0])
    python = [sys.executable, "-P", "-m"]
    assert gateway[:4] == [*python, "flaskbus_gateway"]
    assert agent[:5] == [*python, "flaskbus_agent", "shop:app"]
    assert after(gateway, "--port") == "8000"
    assert after(gateway, "--namespace") == after(agent, "--namespace") == "n"
    assert after(agent, "--threads") == "2"
    assert "--factory" in agent
    assert "--threads" not in gateway
    assert "--port" not in agent
    assert (after(agent, "--prefix"), after(agent, "--host-pattern")) == ("/s", "")


def test_the_broker_is_on_no_command_line() -> None:
    made = plan("shop:app", flags={"redis": "redis://:secret@127.0.0.1:6379"})
    assert "secret" not in " ".join(made.gateway_command() + made.agent_command(made.apps[0]))


def test_a_configuration_for_production_is_made_fit_for_development() -> None:
    made = plan("a:app=/a", "b:app=/b", toml='[agent]\npreload = true\npid = "x"\nname = "n"\nprefix = "/z"')
    agent = made.agent_command(made.apps[0])
    assert "--no-preload" in agent
    assert after(agent, "--pid") == ""
    assert after(agent, "--name") == "a:app"
    assert after(agent, "--prefix") == "/a"
    assert "--name" not in plan("a:app", environ={"FLASKBUS_NAME": "n"}).agent_command(made.apps[0])


def test_the_log_of_requests_is_shown_unless_it_goes_elsewhere() -> None:
    assert after(plan("a:app").gateway_command(), "--access-log") == "-"
    assert "--access-log" not in plan("a:app", toml='[gateway]\naccess_log = "file"').gateway_command()


@pytest.mark.parametrize(
    ("options", "reload"),
    [
        ({}, True),
        ({"reload": False}, False),
        ({"environ": {"FLASKBUS_RELOAD": "no"}}, False),
        ({"environ": {"FLASKBUS_RELOAD": "no"}, "reload": True}, True),
        ({"toml": "[agent]\nreload = false"}, False),
    ],
)
def test_reload_is_on_unless_somebody_says_no(options: dict[str, Any], reload: bool) -> None:
    made = plan("a:app", **options)
    assert ("--reload" in made.agent_command(made.apps[0])) is reload


@pytest.mark.parametrize(
    ("options", "on"),
    [
        ({}, True),
        ({"debugger": False}, False),
        ({"flags": {"host": "::1"}}, True),
        ({"flags": {"host": "localhost"}}, True),
        ({"flags": {"host": "unix:/run/x"}}, True),
        ({"flags": {"host": "0.0.0.0"}}, False),
        ({"flags": {"host": "example.com"}}, False),
        ({"flags": {"redis": "redis://127.0.0.1"}}, True),
        ({"flags": {"redis": "unix:///run/redis.sock"}}, True),
        ({"flags": {"redis": "redis://10.0.0.5"}}, False),
        ({"flags": {"redis": "redis+sentinel://127.0.0.1/m"}}, False),
        ({"environ": {"FLASKBUS_DEBUGGER": "no"}}, False),
    ],
)
def test_the_debugger_is_on_where_nobody_else_reaches_it(options: dict[str, Any], on: bool) -> None:
    made = plan("a:app", **options)
    assert ("--debugger" in made.agent_command(made.apps[0])) is on


def test_the_debugger_is_refused_where_others_reach_it() -> None:
    with pytest.raises(UsageError, match="loopback"):
        plan("a:app", flags={"host": "0.0.0.0"}, debugger=True)


def test_port_0_is_a_free_one() -> None:
    assert plan("a:app", flags={"port": "0"}).gateway.port > 0


def test_names_in_the_log_are_short() -> None:
    made = plan("a:app=/a", "b:app=a.very.long.name.example.com/b")
    assert made.names == ["/a", "a.very.long.name.ex…"]


# The banner


@pytest.mark.parametrize(
    ("settings", "mount", "url", "command"),
    [
        ({}, "/shop", "http://127.0.0.1:5000/shop/", "curl -i http://127.0.0.1:5000/shop/"),
        ({"host": "0.0.0.0"}, "/", "http://127.0.0.1:5000/", "curl -i http://127.0.0.1:5000/"),
        ({"host": "::"}, "/", "http://[::1]:5000/", "curl -i 'http://[::1]:5000/'"),
        (
            {"certfile": "c.pem"},
            "/",
            "https://127.0.0.1:5000/",
            "curl -i --insecure https://127.0.0.1:5000/",
        ),
        (
            {},
            "*.example.com/api",
            "http://www.example.com:5000/api/",
            "curl -i -H 'Host: www.example.com' http://127.0.0.1:5000/api/",
        ),
        (
            {"host": "unix:/run/x.sock"},
            "/a",
            "http://localhost/a/",
            "curl -i --unix-socket /run/x.sock http://localhost/a/",
        ),
    ],
)
def test_where_an_app_is_reached(settings: dict[str, Any], mount: str, url: str, command: str) -> None:
    gateway = GatewaySettings(**settings)
    assert app_url(gateway, Mount.from_name(mount)) == url
    assert shell(curl(gateway, Mount.from_name(mount))) == command


@pytest.mark.parametrize(
    ("url", "option", "command"),
    [
        ("redis://127.0.0.1:4711/0", ["--redis", "redis://127.0.0.1:4711/0"], "redis-cli -p 4711"),
        ("redis://h:1/2", ["--redis", "redis://h:1/2"], "redis-cli -u redis://h:1/2"),
        ("redis://:pw@h", ["--redis", "$REDIS_URL"], 'redis-cli -u "$REDIS_URL"'),
    ],
)
def test_how_redis_cli_is_called(url: str, option: list[str], command: str) -> None:
    assert shell(redis_cli("redis-cli", url, option)) == command


def test_the_banner_is_aligned_and_can_be_pasted() -> None:
    setup = Setup(
        version="1.0",
        gateway=GatewaySettings(),
        broker="redis://:secret@10.0.0.5:6379/0",
        broker_source="from REDIS_URL",
        agent=["flaskbus-agent"],
        agent_options=["--chdir", "my apps", "--redis", "$REDIS_URL"],
        redis_cli=["flaskbus", "redis", "--redis", "$REDIS_URL"],
    )
    apps = [
        Served("shop:app", Mount.from_name("/shop"), "ready"),
        Served("b:app", Mount.from_name("*.b.com/"), "failed", "see the log"),
    ]
    assert "\n".join(banner(setup, apps, lambda text, style: text)) == (
        """
flaskbus 1.0, for development

  http://127.0.0.1:5000/shop/  shop:app  ready
  http://www.b.com:5000/       b:app     failed: see the log

  Broker: redis://:***@10.0.0.5:6379/0 (from REDIS_URL)

  Try, in another terminal:
    # a request
    curl -i http://127.0.0.1:5000/shop/
    # a second agent
    flaskbus-agent shop:app --prefix /shop --chdir 'my apps' --redis "$REDIS_URL"
    # its queue, and who reads it
    flaskbus redis --redis "$REDIS_URL" XINFO GROUPS 'flaskbus:{/shop}:requests'

  Ctrl-C ends everything.
"""
    )


def test_a_command_line_survives_the_shell() -> None:
    command = ["x", "a b", "{/shop}", "it's"]
    assert shlex.split(shell(command)) == command
