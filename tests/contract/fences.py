"""A broker that nobody may use but users of ours, and who they are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from flaskbus.acl import Role, rules
from flaskbus.keys import Keys
from flaskbus.routing import Mount
from tests.conftest import ENGINES, Broker, start_broker, stop_broker
from tests.contract.behaviours import SHOP

PASSWORD = "p@ss:w/r?d #1%é+&"
"""With every character that means something in a URL."""

KEYS = Keys()


def url_of(broker: Broker, user: str, password: str = PASSWORD) -> str:
    return f"redis://{quote(user, safe='')}:{quote(password, safe='')}@{urlsplit(broker.url).netloc}/0"


def give(client: Any, user: str, role: Role, *mounts: Mount) -> None:
    client.execute_command("ACL", "SETUSER", user, f">{PASSWORD}", *rules(role, mounts))


@pytest.fixture(scope="module", params=ENGINES)
def fenced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker that ``default`` cannot use; ``admin`` can do all."""
    broker = start_broker(request.param, tmp_path_factory.mktemp(f"acl-{request.param}"))
    with broker.client() as client:
        client.execute_command("ACL", "SETUSER", "admin", "on", f">{PASSWORD}", "~*", "&*", "+@all")
        give(client, "flaskbus-gateway", "gateway")
        give(client, "flaskbus-agent-shop", "agent", SHOP)
        give(client, "flaskbus-tools", "tools")
        client.execute_command("ACL", "SETUSER", "default", "off")
    yield broker
    stop_broker(broker)


def flaskbus(
    url: str, *words: str, code: int | None = 0, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "flaskbus", *words],
        env={**os.environ, "FLASKBUS_REDIS_URL": url, "FLASKBUS_LEASE": "1"},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert code is None or done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done
