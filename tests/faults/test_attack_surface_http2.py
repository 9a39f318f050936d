"""The rows of :mod:`tests.faults.attacks_http2`, sent by a client that checks nothing."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, ResponseReceived, StreamEnded, StreamReset

from flaskbus import embedded
from flaskbus.testing import Bus
from tests.faults.attacks import BODY_LIMIT, MOUNTS
from tests.faults.attacks_http2 import ATTACKS2, ENDED, RESET, Attack2, fields
from tests.faults.test_attack_surface import OWN_FRAMING, Site
from tests.integration.fleet import Fleet
from tests.integration.test_gateway_process import make_certificate, trusting


@pytest.fixture(scope="module")
def module_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Path]]:
    folder = tmp_path_factory.mktemp("http2")
    cert, key = make_certificate(folder)
    options = ["--http2", "--certfile", str(cert), "--keyfile", str(key), "--body-limit", str(BODY_LIMIT)]
    with embedded.start() as broker, Fleet(folder, broker.url) as fleet, ExitStack() as stack:
        _, url = fleet.gateway(*options)
        bus = Bus(url, broker.url)
        site = Site(bus)
        for name, (prefix, host) in MOUNTS.items():
            stack.enter_context(bus.mount(site.app(name), prefix, host=host, name=name))
        yield site, cert


@pytest.fixture
def site(module_site: tuple[Site, Path]) -> Site:
    module_site[0].forget()
    return module_site[0]


@pytest.fixture
def context(module_site: tuple[Site, Path]) -> ssl.SSLContext:
    context = trusting(module_site[1])
    context.set_alpn_protocols(["h2"])
    return context


def outcomes(
    site: Site, context: ssl.SSLContext, *requests: tuple[list[tuple[bytes, bytes]], bytes | None]
) -> list[str]:
    """What came of each request on one connection: a status, :data:`RESET` or :data:`ENDED`."""
    client = H2Connection(
        H2Configuration(
            validate_outbound_headers=False, normalize_outbound_headers=False, header_encoding=None
        )
    )
    found: dict[int, str] = {}
    complete: set[int] = set()
    with site.connect() as plain, context.wrap_socket(plain, server_hostname="localhost") as sock:
        client.initiate_connection()
        for number, (sent, body) in enumerate(requests):
            client.send_headers(2 * number + 1, sent, end_stream=body is None)
            if body is not None:
                client.send_data(2 * number + 1, body, end_stream=True)
            sock.sendall(client.data_to_send())
        while len(complete) < len(requests) and (data := sock.recv(65536)):
            for event in client.receive_data(data):
                if isinstance(event, ResponseReceived):
                    found[event.stream_id] = dict(event.headers)[b":status"].decode()
                elif isinstance(event, StreamReset):
                    found[event.stream_id] = RESET
                    complete.add(event.stream_id)
                elif isinstance(event, StreamEnded):
                    complete.add(event.stream_id)
                elif isinstance(event, ConnectionTerminated):
                    return [found.get(2 * number + 1, ENDED) for number in range(len(requests))]
            sock.sendall(client.data_to_send())
    return [found.get(2 * number + 1, "nothing") for number in range(len(requests))]


AFTER = fields(path=b"/myapp/after")


@pytest.mark.parametrize("attack", ATTACKS2, ids=lambda attack: attack.name)
def test_fields(site: Site, context: ssl.SSLContext, attack: Attack2) -> None:
    found = outcomes(site, context, (attack.fields, attack.body), (AFTER, None))
    reached = [one for one in site.reached if "/after" not in one]
    if attack.outcome == ENDED:
        assert (found[0], reached) == (ENDED, [])
        assert found[1] == ENDED
    elif attack.outcome == RESET or attack.outcome.isdigit():
        assert (found, reached) == ([attack.outcome, "200"], [])
    else:
        assert (found, reached) == (["200", "200"], [attack.outcome])


def test_what_splits_a_response_is_an_error_of_the_app(site: Site, context: ssl.SSLContext) -> None:
    site.response = ("200 OK", [("X", "a\r\nevil: 1")], [b"ok"])
    assert outcomes(site, context, (fields(), None)) == ["500"]


def test_framing_and_connection_are_not_the_apps(site: Site, context: ssl.SSLContext) -> None:
    """HTTP/2 has none of these; a client would end the connection for one."""
    site.response = ("200 OK", [*OWN_FRAMING], [b"ok"])
    assert outcomes(site, context, (fields(), None), (AFTER, None)) == ["200", "200"]
