"""Neighbouring wire versions understand each other, so that a fleet can be upgraded process by process."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import msgpack
import pytest

from flaskbus import wire
from flaskbus.keys import GROUP
from flaskbus.messages import NOT_RUN, Failure, Frame, Reply, Request
from tests.conftest import Broker, start_broker, stop_broker
from tests.contract.behaviours import Behaviours, M, Site
from tests.contract.neighbours import encode_request_1
from tests.integration.fleet import eventually
from tests.integration.test_promises import problem

OURS = 2
UPGRADES = [(1, OURS), (OURS, 1)]
OTHERS = [(OURS, OURS), (3, OURS), (OURS, 3), (1, 1)]
PAIRS = [*UPGRADES, *(pytest.param(pair, marks=pytest.mark.slow) for pair in OTHERS)]


def command(module: str, version: int) -> tuple[str, ...]:
    return (module,) if version == OURS else ("tests.contract.neighbours", str(version), module)


def site_of(broker: Broker, tmp_path_factory: pytest.TempPathFactory, gateway: int, agent: int) -> Site:
    return Site(
        tmp_path_factory.mktemp(f"versions-{gateway}-{agent}"),
        admin_url=broker.url,
        gateway_url=broker.url,
        agent_url=broker.url,
        gateway_command=command("flaskbus_gateway", gateway),
        agent_command=command("flaskbus_agent", agent),
    )


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: f"gateway-{pair[0]}-agent-{pair[1]}")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    # With a broker of its own: it lives on while other tests run.
    broker = start_broker("valkey", tmp_path_factory.mktemp("broker"))
    with site_of(broker, tmp_path_factory, *request.param).running() as site:
        yield site
    stop_broker(broker)


class TestNeighbours(Behaviours):
    pass


def test_our_version_is_the_one_that_is_tested() -> None:
    assert (wire.VERSION, wire.OLDEST_READABLE) == (OURS, OURS - 1)


@pytest.mark.parametrize("version", [4, 9])
class TestStrangers:
    """Two versions apart: nothing is guessed, and the answer says why."""

    def test_an_agent_that_is_too_new(
        self, broker: Broker, tmp_path_factory: pytest.TempPathFactory, version: int
    ) -> None:
        site = site_of(broker, tmp_path_factory, OURS, version)
        with site.running(answers=502):
            answer = problem(httpx.get(f"{site.url}/shop/quick", timeout=20))
            assert (answer["status"], answer["executed"]) == (502, "unknown")
            assert f"wire version {version}; this is version {OURS}" in answer["detail"]
            ((_, letter),) = site.client.xrevrange(M.dead, count=1)
            assert f"wire version {OURS}; this is version {version}" in letter[b"reason"].decode()
            site.client.delete(M.dead)

    def test_a_gateway_that_is_too_new(
        self, broker: Broker, tmp_path_factory: pytest.TempPathFactory, version: int
    ) -> None:
        site = site_of(broker, tmp_path_factory, version, OURS)
        with site.running(answers=502):
            answer = problem(httpx.get(f"{site.url}/shop/quick", timeout=20))
            assert (answer["status"], answer["executed"]) == (502, "unknown")
            ((_, letter),) = site.client.xrevrange(M.dead, count=1)
            assert f"wire version {version}; this is version {OURS}" in letter[b"reason"].decode()
            site.client.delete(M.dead)


class TestHandBack:
    """What only version 2 knows is not said to a gateway that speaks version 1."""

    @pytest.mark.parametrize(("version", "outcome"), [(1, Reply), (2, Failure), (3, Failure)])
    def test_an_entry_that_is_too_old_by_the_brokers_clock(
        self, site_of_ours: Site, version: int, outcome: type[Frame]
    ) -> None:
        request = Request(
            "old-1", "GET", "/shop/quick", "gw", 500, script_name="/shop", headers=((b"host", b"h"),)
        )
        fields = encode_request_1(request) if version == 1 else wire.encode_request(request)
        if version == 3:
            place = fields.index("head") + 1
            fields[place] = msgpack.packb([3, *msgpack.unpackb(fields[place])[1:], "new"])
        client = site_of_ours.client
        seconds, _ = client.time()
        entry = dict(zip(fields[::2], fields[1::2], strict=True))
        # In a new stream: neither a stream nor a group goes back to an id that is lower than its last.
        with client.pipeline() as pipe:
            pipe.delete(M.requests)
            pipe.xgroup_create(M.requests, GROUP, id="0", mkstream=True)
            pipe.xadd(M.requests, entry, id=f"{(seconds - 60) * 1000}-0")
            pipe.execute()
        (element,) = eventually(lambda: client.lrange(M.reply("old-1"), 0, -1))
        client.delete(M.reply("old-1"))
        frame = wire.decode_frame(element, max_size=10_000)
        assert isinstance(frame, outcome)
        assert not isinstance(frame, Failure) or frame.code == NOT_RUN


@pytest.fixture
def site_of_ours(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site_of(broker, tmp_path_factory, OURS, OURS).running() as site:
        yield site
