"""The options made from the settings, help, completion, and how a command ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from flaskbus.config import Resolved
from flaskbus.options import FlaskbusCommand, FlaskbusGroup, run, settings_options
from flaskbus.settings import SECTIONS, AgentSettings, CommonSettings, GatewaySettings, flag, variables

seen: dict[str, Any] = {}


@click.command(
    "flaskbus-gateway", cls=FlaskbusCommand, examples="  flaskbus-gateway  --port 8000\n\n  # two\n"
)
@click.argument("extra", required=False)
@click.option("--own", is_flag=True, help="An option of the command's own.")
@click.option("--private", is_flag=True, hidden=True, expose_value=False)
@settings_options(GatewaySettings)
@click.version_option("1.2.3")
@click.pass_obj
def gateway(resolved: Resolved[GatewaySettings], settings: GatewaySettings, extra: str, own: bool) -> None:
    """Serve."""
    seen.update(resolved=resolved, settings=settings, extra=extra, own=own)


@click.command("dev", cls=FlaskbusCommand)
@settings_options(GatewaySettings, AgentSettings, only=("port", "threads", "reload", "redis"))
@click.pass_obj
def dev(resolved: tuple[Any, ...], settings: tuple[GatewaySettings, AgentSettings]) -> None:
    seen.update(resolved=resolved, settings=settings)


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen.clear()
    monkeypatch.chdir(tmp_path)
    for kind in (GatewaySettings, AgentSettings):
        for item in fields(kind):
            for name in (*variables(item), "FLASKBUS_CONFIG"):
                monkeypatch.delenv(name, raising=False)


def invoke(command: click.Command, *args: str, **environ: str) -> Result:
    return CliRunner(env=environ).invoke(command, args, catch_exceptions=False)


def test_flag_environment_file_and_default_reach_the_callback(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("[gateway]\nport = 1\nhold = 2\nworkers = 3\n")
    args = ("word", "--own", "-c", "own.toml", "-p", "8000", "--body-limit", "1k")
    assert invoke(gateway, *args, FLASKBUS_HOLD="5s", FLASKBUS_HTTP2="on").exit_code == 0
    settings = seen["settings"]
    assert (settings.port, settings.hold, settings.workers, settings.body_limit) == (8000, 5.0, 3, 1024)
    assert (settings.http2, settings.lease) == (True, 10.0)
    assert (seen["extra"], seen["own"]) == ("word", True)
    assert seen["resolved"].settings is settings
    names = ("port", "hold", "workers", "lease")
    assert [seen["resolved"].sources[name] for name in names] == [
        "flag",
        "FLASKBUS_HOLD",
        "own.toml [gateway]",
        "default",
    ]


@pytest.mark.parametrize(("args", "value"), [((), True), (("--reload",), True), (("--no-reload",), False)])
def test_a_switch_can_be_turned_off(args: tuple[str, ...], value: bool) -> None:
    assert invoke(gateway, *args, FLASKBUS_RELOAD="1").exit_code == 0
    assert seen["settings"].reload is value


def test_the_config_file_may_come_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("[gateway]\nport = 1\n")
    assert invoke(gateway, FLASKBUS_CONFIG="own.toml").exit_code == 0
    assert seen["settings"].port == 1


def test_two_kinds_share_their_options() -> None:
    args = ("--port", "1", "--threads", "2", "--reload", "--redis", "redis://x")
    assert invoke(dev, *args, FLASKBUS_WORKERS="3").exit_code == 0
    first, second = seen["settings"]
    assert (first.port, first.reload, first.redis, first.workers) == (1, True, "redis://x", 3)
    assert (second.threads, second.reload, second.redis, second.workers) == (2, True, "redis://x", 3)
    assert [each.settings for each in seen["resolved"]] == [first, second]
    assert invoke(dev, "--workers", "1").exit_code == 2, "an option that was left out"


@pytest.mark.parametrize("kind", [CommonSettings, GatewaySettings, AgentSettings])
def test_every_setting_has_an_option_and_its_help(kind: type[CommonSettings]) -> None:
    @click.command("x", cls=FlaskbusCommand)
    @settings_options(kind)
    def command(settings: CommonSettings) -> None: ...

    words = invoke(command, "--help", COLUMNS="80").stdout.split()
    for item in fields(kind):
        assert flag(item) in {word.strip(",") for word in words}
        for name in variables(item):
            assert any(name in word for word in words)


def test_help_is_in_sections_with_the_examples_first() -> None:
    page = CliRunner(env={"COLUMNS": "80"}).invoke(gateway, ["--help"], prog_name="flaskbus-gateway").stdout
    lines = page.splitlines()
    assert max(map(len, lines)) <= 80
    headings = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[0] == "Examples"
    known = [heading for heading in headings if heading in SECTIONS]
    assert known == [section for section in SECTIONS if section in known]
    assert known[0] == "Listening"
    assert headings[-1] == "General"
    assert "Options:\n  --own  An option of the command's own.\n" in page
    assert "Examples:\n  flaskbus-gateway  --port 8000\n\n  # two\n" in page
    flat = " ".join(page.split())
    assert "-p, --port PORT Port to listen on. [default: 5000; env: FLASKBUS_PORT]" in flat
    assert "--body-limit SIZE Largest request body; a larger one is answered 413. [default: 4GiB" in flat
    assert "--lease DURATION" in flat
    assert "[default: plain HTTP; env: FLASKBUS_CERTFILE]" in flat
    assert "env: FLASKBUS_REDIS_URL, REDIS_URL]" in flat
    assert "a flag is stronger than a variable" in flat


def test_a_command_without_settings_has_plain_help() -> None:
    @click.command("x", cls=FlaskbusCommand)
    def command() -> None:
        """Do it."""

    assert invoke(command, "--help").stdout == (
        "Usage: x [OPTIONS]\n\n  Do it.\n\nGeneral:\n  --help  Show this message and exit.\n"
    )


def test_a_group_lists_its_commands_first() -> None:
    @click.group("flaskbus", cls=FlaskbusGroup, examples="flaskbus mounts")
    def group() -> None:
        """Tools."""

    @group.command("mounts")
    def mounts() -> None:
        """List mounts."""

    @group.group("dead")
    def dead() -> None:
        """Dead letters."""

    page = invoke(group, "--help").stdout
    assert page.index("Examples:") < page.index("Commands:") < page.index("General:")
    assert "mounts  List mounts." in page
    assert (type(mounts), type(dead)) == (FlaskbusCommand, FlaskbusGroup)


@pytest.mark.parametrize(
    ("args", "incomplete", "expected"),
    [
        ([], "--name", {("plain", "--namespace")}),
        ([], "--no-re", {("plain", "--no-reload")}),
        (["--log-level"], "w", {("plain", "warning")}),
        (["--certfile"], "ce", {("file", "ce")}),
        (["--config"], "f", {("file", "f")}),
    ],
)
def test_completion(args: list[str], incomplete: str, expected: set[tuple[str, str]]) -> None:
    complete = ShellComplete(gateway, {}, "flaskbus-gateway", "_FLASKBUS_GATEWAY_COMPLETE")
    found = {(item.type, item.value) for item in complete.get_completions(args, incomplete)}
    assert found == expected


def test_directories_are_completed() -> None:
    @click.command("x")
    @settings_options(AgentSettings, only=("chdir",))
    def command(settings: AgentSettings) -> None: ...

    found = ShellComplete(command, {}, "x", "_X_COMPLETE").get_completions(["--chdir"], "s")
    assert [(item.type, item.value) for item in found] == [("dir", "s")]


PROGRAM = """
import signal, sys
import click
from flaskbus.errors import AppImportError, StartError
from flaskbus.options import FlaskbusCommand, run, settings_options
from flaskbus.settings import GatewaySettings

def start(): raise StartError("the port is taken")
def app(): raise AppImportError("no such module")
def interrupt(): signal.raise_signal(signal.SIGINT)
def code(): return 1
def leave(): click.get_current_context().exit(7)
def lines(): print("x\\n" * 100_000)
def line(): print("x")

@click.command("flaskbus-gateway", cls=FlaskbusCommand)
@click.argument("name", default="line")
@settings_options(GatewaySettings)
def gateway(name, settings):
    return globals()[name]()

run(gateway)
"""


@pytest.mark.parametrize(
    ("args", "code", "stderr"),
    [
        ([], 0, ""),
        (["code"], 1, ""),
        (["leave"], 7, ""),
        (["start"], 3, "flaskbus-gateway: error: the port is taken\n"),
        (["app"], 4, "flaskbus-gateway: error: no such module\n"),
        (["--port", "x"], 2, "flaskbus-gateway: error: --port must be a whole number, not 'x'\n"),
        (["-c", "x"], 2, "flaskbus-gateway: error: --config: there is no file x\n"),
    ],
)
def test_how_a_process_ends(args: list[str], code: int, stderr: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *args], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (code, stderr)


def test_wrong_options_are_told_by_click() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--prot", "1"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("Usage: flaskbus-gateway [OPTIONS] [NAME]\n")
    assert "--prot" in ended.stderr.splitlines()[-1]


def test_ctrl_c_leaves_no_traceback() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, "interrupt"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 128 + signal.SIGINT
    assert ended.stderr.strip() == ""


@pytest.mark.parametrize("output", ["line", "lines"])
def test_a_reader_that_goes_away_is_no_error(output: str) -> None:
    """Both ways to notice: while printing more than the buffer holds, and at the last flush."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, output], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        stderr = process.stderr.read()
    assert (process.returncode, stderr) == (1, b"")


def test_run_takes_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(gateway, ["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "flaskbus-gateway, version 1.2.3\n"


def test_completion_scripts_are_printed() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"_FLASKBUS_GATEWAY_COMPLETE": "zsh_source"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0
    assert "#compdef flaskbus-gateway" in ended.stdout
