"""Units, and how one value is checked."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from docs.generate import TARGET, reference
from flaskbus import units
from flaskbus.errors import UsageError
from flaskbus.settings import (
    COMPONENTS,
    SECTIONS,
    AgentSettings,
    CommonSettings,
    GatewaySettings,
    build,
    check,
    flag,
    show,
    show_default,
    variables,
)

KINDS: tuple[type[CommonSettings], ...] = (CommonSettings, *COMPONENTS)
ITEMS = [
    pytest.param(kind, item, id=f"{kind.__name__}.{item.name}") for kind in KINDS for item in fields(kind)
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30.0),
        ("0.5", 0.5),
        ("500ms", 0.5),
        ("1.5s", 1.5),
        (" 5M ", 300.0),
        ("1h30m", 5400.0),
        ("2d", 172800.0),
        (7, 7.0),
        (2.5, 2.5),
    ],
)
def test_durations(text: object, expected: float) -> None:
    assert units.seconds(text) == expected


@pytest.mark.parametrize(
    "text", ["", "s", "5 m", "-5s", "1h-30m", "5w", "nan", "inf", "9" * 400 + "s", "٣s", True, None, []]
)
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whoever calls it says what was wrong where
        units.seconds(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("65536", 65536),
        ("64k", 65536),
        ("64 KiB", 65536),
        ("64KB", 64000),
        ("16MiB", 16 * 1024**2),
        ("1.5g", 3 * 512 * 1024**2),
        ("12b", 12),
        (4096, 4096),
        (4096.0, 4096),
    ],
)
def test_sizes(text: object, expected: int) -> None:
    assert units.size(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "k",
        "-1",
        "1.5",
        "0.3k",
        "1tib",
        "1 2",
        "1e3",
        "9" * 400 + ".5k",
        1.5,
        float("nan"),
        float("inf"),
        False,
        None,
    ],
)
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - as above
        units.size(text)


@given(st.integers(0, 2**60))
def test_a_size_is_read_back_as_it_was_shown(value: int) -> None:
    assert units.size(units.show_size(value)) == value


@given(st.floats(0.001, 1e9) | st.integers(0, 10**7).map(float))
def test_a_duration_is_read_back_as_it_was_shown(value: float) -> None:
    assert units.seconds(units.show_seconds(value)) == value


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (3600, "1h"), (90, "90s"), (300, "5m"), (0.5, "0.5s")])
def test_durations_are_shown_short(value: float, text: str) -> None:
    assert units.show_seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (1000, "1000"), (65536, "64KiB"), (2**30, "1GiB")])
def test_sizes_are_shown_short(value: int, text: str) -> None:
    assert units.show_size(value) == text


@given(st.text())
def test_any_text_is_a_value_or_a_usage_error(text: str) -> None:
    for item in fields(GatewaySettings):
        try:
            value = check(item, text)
        except UsageError:
            continue
        assert type(value) is type(item.default)


@pytest.mark.parametrize(("kind", "item"), ITEMS)
def test_every_setting_is_fit_to_be_shown(kind: type[CommonSettings], item: Any) -> None:
    """A setting lacks nothing that its option, its row in the docs or its check needs."""
    assert item.metadata["section"] in SECTIONS
    assert item.metadata["help"].endswith(".")
    assert isinstance(item.default, float) == (item.metadata.get("unit") == "seconds")
    assert check(item, item.default) == item.default
    assert check(item, show(item, item.default)) == item.default, "the default cannot be typed"
    assert show_default(item)


@pytest.mark.parametrize("kind", KINDS)
def test_short_flags_are_unique(kind: type[CommonSettings]) -> None:
    short = [item.metadata["short"] for item in fields(kind) if "short" in item.metadata]
    assert len({*short, "-c"}) == len(short) + 1


def test_names_are_derived() -> None:
    items = {item.name: item for item in fields(GatewaySettings)}
    assert flag(items["log_level"]) == "--log-level"
    assert variables(items["log_level"]) == ("FLASKBUS_LOG_LEVEL",)
    assert variables(items["redis"]) == ("FLASKBUS_REDIS_URL", "REDIS_URL")


def test_build_reads_plain_values() -> None:
    settings = build(
        GatewaySettings,
        {
            "port": "8000",
            "hold": "1m",
            "body_limit": "1MiB",
            "http2": "Yes",
            "reload": True,
            "log_level": " INFO",
            "trusted_proxies": ["10.0.0.0/8", "*"],
        },
    )
    assert (settings.port, settings.hold, settings.body_limit) == (8000, 60.0, 2**20)
    assert (settings.http2, settings.reload, settings.log_level) == (True, True, "info")
    assert settings.trusted_proxies == "10.0.0.0/8,*"
    assert build(AgentSettings, {"factory": "off"}) == AgentSettings()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prot": 1}, "unknown setting 'prot'; did you mean 'port'?"),
        ({"zzzzzz": 1}, "unknown setting 'zzzzzz'"),
        ({"port": "x"}, "port must be a whole number, not 'x'"),
        ({"port": 80.0}, "port must be a whole number, not 80.0"),
        ({"port": True}, "port must be a whole number, not True"),
        ({"port": 65536}, "port must be at most 65535, not 65536"),
        ({"workers": 0}, "workers must be at least 1, not 0"),
        ({"http2": "perhaps"}, "http2 must be true or false, not 'perhaps'"),
        ({"http2": 1}, "http2 must be true or false, not 1"),
        ({"host": 5}, "host must be text, not 5"),
        ({"host": ["a"]}, "host must be text, not ['a']"),
        ({"trusted_proxies": [1]}, "trusted_proxies must be text, not [1]"),
        ({"trusted_proxies": "10.0.0.1/8"}, "trusted_proxies: 10.0.0.1/8 has host bits set"),
        (
            {"trusted_proxies": "proxy.example.com"},
            "trusted_proxies: 'proxy.example.com' does not appear to be",
        ),
        ({"log_level": "loud"}, "log_level must be one of debug, info, warning, error, not 'loud'"),
        ({"lease": "0.1s"}, "lease must be at least 0.5s, not 0.1s"),
        ({"lease": float("nan")}, "lease must be a duration such as 30, 500ms or 5m, not nan"),
        ({"body_limit": "a lot"}, "body_limit must be a size such as 65536 or 16MiB, not 'a lot'"),
        ({"namespace": "a:b"}, "namespace: namespace 'a:b' is not usable"),
    ],
)
def test_a_bad_value_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match="^" + re.escape(message)):
        build(GatewaySettings, values)


def test_no_secret_is_in_the_repr() -> None:
    """Which ends up in logs, and on the pages of debuggers."""
    settings = build(AgentSettings, {"redis": "redis://:hunter2@127.0.0.1:6379/0"})
    assert settings.redis == "redis://:hunter2@127.0.0.1:6379/0"
    assert "hunter2" not in repr(settings)


def test_the_reference_page_is_up_to_date() -> None:
    assert TARGET.read_text(encoding="utf-8") == reference(), "run: python docs/generate.py"


def test_the_reference_page_names_every_setting() -> None:
    page = Path(TARGET).read_text(encoding="utf-8")
    for kind in KINDS:
        for item in fields(kind):
            assert f"| `{item.name}` |" in page
            assert f"`{flag(item)}`" in page
