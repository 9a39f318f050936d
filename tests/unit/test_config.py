"""Where a value comes from, and what a wrong configuration file is told."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from docs.generate import INTRODUCTION
from flaskbus import config as module
from flaskbus.commands.config import config
from flaskbus.config import ConfigFile, find_file, load, parse, resolve
from flaskbus.errors import UsageError
from flaskbus.settings import AgentSettings, CommonSettings, GatewaySettings


def read(text: str, name: str = "flaskbus.toml") -> ConfigFile:
    file = parse(text, name)
    assert file is not None
    return file


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, and an environment without our variables."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("FLASKBUS_") or name == "REDIS_URL":
            monkeypatch.delenv(name)
    return tmp_path


class TestPrecedence:
    FILE = "[gateway]\nport = 3"

    @pytest.mark.parametrize(
        ("flags", "environ", "text", "value", "source"),
        [
            ({"port": "1"}, {"FLASKBUS_PORT": "2"}, FILE, 1, "flag"),
            ({"port": None}, {"FLASKBUS_PORT": "2"}, FILE, 2, "FLASKBUS_PORT"),
            ({}, {"FLASKBUS_PORT": ""}, FILE, 3, "flaskbus.toml [gateway]"),
            ({}, {}, FILE, 3, "flaskbus.toml [gateway]"),
            ({}, {}, "", 5000, "default"),
        ],
    )
    def test_flag_environment_file_default(
        self, flags: dict[str, object], environ: dict[str, str], text: str, value: int, source: str
    ) -> None:
        resolved = resolve(GatewaySettings, flags=flags, environ=environ, file=read(text))
        assert (resolved.settings.port, resolved.sources["port"]) == (value, source)

    @pytest.mark.parametrize(
        ("environ", "value"),
        [
            ({"FLASKBUS_REDIS_URL": "redis://ours", "REDIS_URL": "redis://theirs"}, "redis://ours"),
            ({"REDIS_URL": "redis://theirs"}, "redis://theirs"),
            ({"FLASKBUS_REDIS_URL": "", "REDIS_URL": "redis://theirs"}, "redis://theirs"),
            ({}, "redis://file"),
        ],
    )
    def test_the_url_has_two_variables(self, environ: dict[str, str], value: str) -> None:
        file = read('redis = "redis://file"')
        assert resolve(CommonSettings, flags={}, environ=environ, file=file).settings.redis == value

    def test_a_table_is_stronger_than_the_top_level_for_its_component_alone(self) -> None:
        file = read("lease = 20\n[agent]\nlease = 30")
        leases = [
            resolve(kind, flags={}, environ={}, file=file).settings.lease
            for kind in (CommonSettings, GatewaySettings, AgentSettings)
        ]
        assert leases == [20.0, 20.0, 30.0]

    def test_without_a_file_all_is_default(self) -> None:
        resolved = resolve(AgentSettings, flags={"port": "of the other component"}, environ={}, file=None)
        assert resolved.settings == AgentSettings()
        assert set(resolved.sources.values()) == {"default"}
        assert resolved.apps == ()

    @pytest.mark.parametrize(
        ("flags", "environ", "message"),
        [
            ({"port": "x"}, {}, "--port must be a whole number, not 'x'"),
            ({}, {"FLASKBUS_PORT": "x"}, "FLASKBUS_PORT must be a whole number, not 'x'"),
            (
                {},
                {"FLASKBUS_PORT": "tcp://10.0.0.1:80"},
                "FLASKBUS_PORT is 'tcp://10.0.0.1:80', which Kubernetes",
            ),
            (
                {"redis": "redis+sentinel://:hunter2@h"},
                {},
                "--redis: the broker's URL redis+sentinel://:***@h is not valid: it ends with the name",
            ),
            ({}, {"REDIS_URL": "http://h"}, "REDIS_URL: the broker's URL http://h is not valid: it begins"),
        ],
    )
    def test_an_error_names_the_source(
        self, flags: dict[str, object], environ: dict[str, str], message: str
    ) -> None:
        with pytest.raises(UsageError, match="^" + re.escape(message)):
            resolve(GatewaySettings, flags=flags, environ=environ, file=None)


class TestFile:
    def test_tables_of_pyproject(self) -> None:
        file = read(
            '[tool.flaskbus]\nlease = "1m"\napps = ["a:b=/"]\n[tool.flaskbus.gateway]\nport = 1',
            "pyproject.toml",
        )
        resolved = resolve(GatewaySettings, flags={}, environ={}, file=file)
        assert (resolved.settings.lease, resolved.settings.port) == (60.0, 1)
        assert resolved.sources["lease"] == "pyproject.toml [tool.flaskbus]"
        assert resolved.sources["port"] == "pyproject.toml [tool.flaskbus.gateway]"
        assert resolved.apps == ("a:b=/",)

    @pytest.mark.parametrize("text", ["", "tool = 1", "[tool.other]\nx = 1"])
    def test_pyproject_of_others(self, text: str) -> None:
        assert parse(text, "pyproject.toml") is None

    def test_apps_as_tables(self) -> None:
        file = read(
            '[[apps]]\napp = "shop:app"\nprefix = "/s"\nhost_pattern = "*.example.com"\n[[apps]]\napp = "front"'
        )
        assert file.apps == ("shop:app=*.example.com/s", "front=/")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("x = ]", "flaskbus.toml is not valid TOML: Invalid value (at line 1"),
            ("prot = 1", "flaskbus.toml: unknown setting 'prot'; did you mean 'port' under [gateway]?"),
            ("log-level = 1", "flaskbus.toml: unknown setting 'log-level'; did you mean 'log_level'?"),
            ("[agents]", "flaskbus.toml: unknown setting 'agents'; did you mean 'agent'?"),
            ("app = []", "flaskbus.toml: unknown setting 'app'; did you mean 'apps'?"),
            ("[gateway]\nprot = 1", "flaskbus.toml [gateway]: unknown setting 'prot'; did you mean 'port'?"),
            ("[agent]\nqqqqqq = 1", "flaskbus.toml [agent]: unknown setting 'qqqqqq'"),
            ("port = 1", "flaskbus.toml: 'port' does not belong here; put it under [gateway]"),
            (
                "workers = 1",
                "flaskbus.toml: 'workers' does not belong here; put it under [gateway] or [agent]",
            ),
            (
                "[gateway]\nthreads = 1",
                "flaskbus.toml [gateway]: 'threads' does not belong here; put it under [agent]",
            ),
            (
                "[agent]\napps = []",
                "flaskbus.toml [agent]: 'apps' does not belong here; put it at the top of the file",
            ),
            ("gateway = 1", "flaskbus.toml: gateway must be a table, as in [gateway]"),
            ("lease = 0.1", "flaskbus.toml: lease must be at least 0.5s, not 0.1"),
            ("[gateway]\nport = []", "flaskbus.toml [gateway]: port must be a whole number, not []"),
            ('apps = "a:b"', "flaskbus.toml: apps must be a list such as"),
            ("apps = [1]", "flaskbus.toml: apps must be a list such as"),
            ('apps = [""]', "flaskbus.toml: apps must be a list such as"),
            ("[[apps]]\napp = 1", "flaskbus.toml: apps must be a list such as"),
            ('[[apps]]\nprefix = "/"', 'flaskbus.toml [[apps]]: each needs an app = "MODULE:APP"'),
            ('[[apps]]\nprefx = "/"', "flaskbus.toml [[apps]]: unknown key 'prefx'; did you mean 'prefix'?"),
            ('[[apps]]\nqqqqqq = "/"', "flaskbus.toml [[apps]]: unknown key 'qqqqqq'"),
        ],
    )
    def test_a_mistake_is_named(self, text: str, message: str) -> None:
        with pytest.raises(UsageError, match="^" + re.escape(message)):
            parse(text, "flaskbus.toml")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("tool.flaskbus = 1", "pyproject.toml: tool.flaskbus must be a table"),
            (
                "[tool.flaskbus]\nagent = 1",
                "pyproject.toml: agent must be a table, as in [tool.flaskbus.agent]",
            ),
            (
                "[tool.flaskbus]\nport = 1",
                "pyproject.toml [tool.flaskbus]: 'port' does not belong here; put it under [tool.flaskbus.gateway]",
            ),
            (
                "[tool.flaskbus.agent]\napps = []",
                "pyproject.toml [tool.flaskbus.agent]: 'apps' does not belong here; put it under [tool.flaskbus]",
            ),
        ],
    )
    def test_a_mistake_in_pyproject_is_named(self, text: str, message: str) -> None:
        with pytest.raises(UsageError, match="^" + re.escape(message)):
            parse(text, "pyproject.toml")

    @given(st.text() | st.from_regex(r"\[?[a-z_]+\]?\n?[a-z_]+ = ([0-9]+|\"[a-z]*\"|\[\])", fullmatch=True))
    def test_any_text_is_a_configuration_or_a_usage_error(self, text: str) -> None:
        try:
            file = parse(text, "flaskbus.toml")
        except UsageError as raised:
            mistake = raised
            file = None
        assert file or str(mistake).startswith("flaskbus.toml")

    def test_the_example_in_the_docs_is_right(self) -> None:
        examples = re.findall(r"```toml\n(.*?)```", INTRODUCTION, re.DOTALL)
        assert [read(example).apps for example in examples] == [
            ("frontend:app=/", "backend:app=/backend"),
            ("shop:app=shop.example.com/",),
        ]
        assert module.__doc__ is not None
        documented = module.__doc__.split("::\n", 1)[1].split("\nEverything")[0]
        assert read("\n".join(line.strip() for line in documented.splitlines())).apps
        assert tomllib.loads(examples[0])["agent"] == {"threads": 8}


class TestFinding:
    def test_nothing(self, directory: Path) -> None:
        assert find_file(None, {}, directory) is None

    def test_order(self, directory: Path) -> None:
        names = ["pyproject.toml", "flaskbus.toml", "variable.toml", "flag.toml"]
        found = []
        for name in names:
            (directory / name).write_text("[tool.flaskbus]" if name == "pyproject.toml" else "")
            flag_given = "flag.toml" if (directory / "flag.toml").exists() else None
            environ = {"FLASKBUS_CONFIG": "variable.toml"} if (directory / "variable.toml").exists() else {}
            file = find_file(flag_given, environ, directory)
            assert file is not None
            found.append(file.name)
        assert found == names

    def test_a_pyproject_of_others_is_passed_over(self, directory: Path) -> None:
        (directory / "pyproject.toml").write_text("[project]\nname = 'x'")
        assert find_file(None, {"FLASKBUS_CONFIG": ""}, directory) is None
        with pytest.raises(UsageError, match=r"^--config: pyproject.toml has no \[tool.flaskbus\] table$"):
            find_file("pyproject.toml", {}, directory)

    @pytest.mark.parametrize(("explicit", "label"), [("no.toml", "--config"), (None, "FLASKBUS_CONFIG")])
    def test_a_file_that_is_not_there(self, directory: Path, explicit: str | None, label: str) -> None:
        with pytest.raises(UsageError, match=f"^{label}: there is no file no.toml$"):
            find_file(explicit, {"FLASKBUS_CONFIG": "no.toml"}, directory)

    def test_what_is_no_text_file(self, directory: Path) -> None:
        with pytest.raises(UsageError, match=r"Is a directory$"):
            find_file(".", {}, directory)
        (directory / "flaskbus.toml").write_bytes(b'namespace = "caf\xe9"')
        with pytest.raises(UsageError, match="is not UTF-8"):
            find_file(None, {}, directory)

    def test_a_byte_order_mark_is_no_mistake(self, directory: Path) -> None:
        (directory / "flaskbus.toml").write_bytes(b"\xef\xbb\xbflease = 20")
        assert load(CommonSettings).settings.lease == 20.0

    def test_load(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (directory / "own.toml").write_text("[gateway]\nport = 7")
        monkeypatch.setenv("FLASKBUS_HOLD", "1s")
        resolved = load(GatewaySettings, flags={"workers": "2"}, config_file="own.toml")
        assert (resolved.settings.port, resolved.settings.hold, resolved.settings.workers) == (7, 1.0, 2)

    def test_a_file_of_a_secret_that_is_not_there(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(
            UsageError, match=r"^--signing-secret: the secret in none cannot be read: No such"
        ):
            load(GatewaySettings, flags={"signing_secret": "@none"})
        monkeypatch.setenv("FLASKBUS_SIGNING_SECRET", "@none")
        with pytest.raises(UsageError, match=r"^FLASKBUS_SIGNING_SECRET: the secret in none cannot be read"):
            load(GatewaySettings)

    def test_a_broker_whose_url_stands_in_a_file(self, directory: Path) -> None:
        (directory / "url").write_text("redis://:hunter2@10.0.0.5\n")
        assert load(CommonSettings, flags={"redis": "@url"}).settings.redis == "redis://:hunter2@10.0.0.5"
        (directory / "url").write_text("redis+sentinel://:hunter2@10.0.0.5\n")
        with pytest.raises(UsageError, match=r"redis in url: the broker's URL redis\+sentinel://:\*\*\*@10"):
            load(CommonSettings, flags={"redis": "@url"})


def show(*args: str, **environ: str) -> Result:
    return CliRunner(env=environ).invoke(config, args, catch_exceptions=False)


class TestConfigCommand:
    TEXT = 'redis = "redis://user:hunter2@10.0.0.5/0"\napps = ["a:b=/"]\n[gateway]\nport = 8000\nlease = 20\n'

    def test_every_value_and_its_source(self, directory: Path) -> None:
        (directory / "flaskbus.toml").write_text(self.TEXT)
        result = show("--namespace", "staging", FLASKBUS_WINDOW="4MiB")
        lines = [line.split() for line in result.stdout.splitlines()]
        assert ["Configuration", "file:", "flaskbus.toml"] in lines
        assert ["Apps:", "a:b=/"] in lines
        assert ["redis", "redis://user:***@10.0.0.5/0", "flaskbus.toml"] in lines
        assert ["namespace", "staging", "flag"] in lines
        assert ["window", "4MiB", "FLASKBUS_WINDOW"] in lines
        assert ["port", "8000", "flaskbus.toml", "[gateway]"] in lines
        assert ["certfile", '""', "default"] in lines
        gateway = lines[lines.index(["Gateway"]) : lines.index(["Agent"])]
        assert ["lease", "20s", "flaskbus.toml", "[gateway]"] in gateway
        assert not [line for line in gateway if line[:1] == ["namespace"]], "what is shared is shown once"
        assert "hunter2" not in result.output

    def test_json(self, directory: Path) -> None:
        (directory / "flaskbus.toml").write_text(self.TEXT)
        document = json.loads(show("--json").stdout)
        assert (document["file"], document["apps"]) == ("flaskbus.toml", ["a:b=/"])
        assert document["common"]["lease"] == {"value": 10.0, "source": "default"}
        assert document["gateway"]["lease"] == {"value": 20.0, "source": "flaskbus.toml [gateway]"}
        for component in ("common", "gateway", "agent"):
            assert document[component]["redis"]["value"] == "redis://user:***@10.0.0.5/0"
        assert document["agent"]["threads"]["value"] == 4

    def test_without_a_file(self, directory: Path) -> None:
        assert show().stdout.startswith("Configuration file: none (flaskbus.toml or pyproject.toml in this")
        assert json.loads(show("--json").stdout)["file"] is None

    def test_a_misspelt_variable_is_noted(self, directory: Path) -> None:
        result = show(FLASKBUS_PROT="1", FLASKBUS_SERVICE_HOST="10.0.0.1", FLASKBUS_CONFIG="")
        assert (
            result.stderr == "note: FLASKBUS_PROT is set but names no setting; did you mean FLASKBUS_PORT?\n"
        )
        assert result.exit_code == 0
