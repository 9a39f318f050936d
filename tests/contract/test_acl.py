"""Users with no more rights than they need: everything works, and nothing changes for clients."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.conftest import Broker
from tests.contract.behaviours import Behaviours, Site
from tests.contract.fences import KEYS, fenced, flaskbus, url_of

__all__ = ["fenced"]


@pytest.fixture(scope="module")
def site(fenced: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(
        tmp_path_factory.mktemp("acl"),
        admin_url=url_of(fenced, "admin"),
        gateway_url=url_of(fenced, "flaskbus-gateway"),
        agent_url=url_of(fenced, "flaskbus-agent-shop"),
    )
    with site.running() as running:
        yield running


class TestUsers(Behaviours):
    """The whole suite, with ``default`` switched off."""

    def test_the_tools_work(self, fenced: Broker, site: Site) -> None:
        tools = url_of(fenced, "flaskbus-tools")
        (mount,) = json.loads(flaskbus(tools, "mounts", "--json").stdout)
        assert (mount["mount"], mount["agents"]["alive"]) == ("/shop", 1)
        assert json.loads(flaskbus(tools, "agents", "--json").stdout)
        site.client.xadd(KEYS.of("/shop").dead, {"reason": "to be shown"})
        assert "to be shown" in flaskbus(tools, "dead", "list").stdout
        done = flaskbus(tools, "doctor", code=None)
        assert "may not" in done.stdout
        assert "Traceback" not in done.stderr
        flaskbus(tools, "healthcheck", "--agent")

    @pytest.mark.parametrize("words", [("unmount", "/shop", "--yes", "--force"), ("request", "/shop/quick")])
    def test_the_tools_change_nothing(self, fenced: Broker, site: Site, words: tuple[str, ...]) -> None:
        done = flaskbus(url_of(fenced, "flaskbus-tools"), *words, code=3)
        assert "permission" in done.stderr
        assert httpx.get(f"{site.url}/shop/quick").text == "quick"

    def test_whoever_may_send_sends(self, fenced: Broker, site: Site) -> None:
        assert flaskbus(url_of(fenced, "flaskbus-gateway"), "request", "/shop/quick").stdout == "quick"

    def test_an_agent_knows_whether_it_is_well(self, fenced: Broker, site: Site) -> None:
        flaskbus(url_of(fenced, "flaskbus-agent-shop"), "healthcheck", "--agent", "--mount", "/shop")
        done = flaskbus(url_of(fenced, "flaskbus-agent-shop"), "healthcheck", "--agent", code=1)
        assert "--mount" in done.stderr
