"""What strangers send, and what apps answer, through a real gateway: nothing is read in two ways.

The bytes are in :mod:`tests.faults.attacks`; docs/reference/attack-surface.md shows the same table
(``python -m tests.faults.test_attack_surface`` writes it).
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from flaskbus import embedded, wire
from flaskbus.broker import connect, run_script
from flaskbus.keys import GROUP, LIST_TTL_MS, Keys
from flaskbus.messages import Chunk, End, Frame, Head, Headers, Reply
from flaskbus.registry import AgentRecord, Registry
from flaskbus.routing import Mount
from flaskbus.testing import Bus, running_bus
from tests.faults.attacks import AFTER, ATTACKS, BODY_LIMIT, MOUNTS, Attack, get, page
from tests.integration.test_raw_http import CASES, PASSES

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "attack-surface.md"

Environ = dict[str, Any]
Start = Callable[..., Any]


class Site:
    """A gateway with three apps, which write down what reaches them."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.reached: list[str] = []
        self.environs: list[Environ] = []
        self.response: tuple[str, list[tuple[str, str]], list[bytes]] = ("200 OK", [], [b"ok"])
        """What the apps answer."""

    def app(self, name: str) -> Callable[[Environ, Start], Iterable[bytes]]:
        def run(environ: Environ, start_response: Start) -> Iterable[bytes]:
            self.environs.append(environ)
            self.reached.append(told(name, environ))
            status, headers, body = self.response
            start_response(status, headers)
            return body

        return run

    def connect(self) -> socket.socket:
        parts = urlsplit(self.bus.url)
        return socket.create_connection((parts.hostname, parts.port), timeout=20)

    def answers(self, sent: bytes) -> bytes:
        """All that comes back until the connection is closed."""
        received = b""
        with self.connect() as sock:
            sock.sendall(sent)
            while data := sock.recv(65536):
                received += data
        return received

    def forget(self) -> None:
        self.reached.clear()
        self.environs.clear()
        self.response = ("200 OK", [], [b"ok"])


def told(name: str, environ: Environ) -> str:
    """A request in a line, as :class:`~tests.faults.attacks.Attack` has it."""
    query = "?" + environ["QUERY_STRING"] if environ["QUERY_STRING"] else ""
    where = f"{environ['SCRIPT_NAME']} {environ['PATH_INFO']}{query}"
    body = environ["wsgi.input"].read()[:20].decode("latin-1")
    headers = {key[5:]: value for key, value in environ.items() if key.startswith("HTTP_")}
    host = headers.pop("HOST", "-")
    more = [f"body={body}"] if body else []
    more += [f"{key}={value}" for key, value in sorted(headers.items()) if key != "CONNECTION"]
    return " ".join([f"{name}: {environ['REQUEST_METHOD']} {host} {where}", *more])


@pytest.fixture(scope="module")
def module_site() -> Iterator[Site]:
    with (
        embedded.start() as broker,
        closing(connect(broker.url)) as client,
        closing(client.pubsub()) as keyspace,  # type: ignore[no-untyped-call]
    ):
        client.config_set("notify-keyspace-events", "KA")
        keyspace.psubscribe("__keyspace@*__:*")
        with (
            running_bus(
                broker.url, body_limit=BODY_LIMIT, header_timeout=10, body_timeout=1, keepalive=10
            ) as bus,
            ExitStack() as stack,
        ):
            site = Site(bus)
            for name, (prefix, host) in MOUNTS.items():
                stack.enter_context(bus.mount(site.app(name), prefix, host=host, name=name))
            yield site
        written = set()
        while message := keyspace.get_message(ignore_subscribe_messages=True, timeout=0.1):
            written.add(message["channel"].partition(b":")[2].decode())
    mounts = "|".join(re.escape(host + prefix) for prefix, host in (*MOUNTS.values(), ("/fake", "")))
    ours = re.compile(rf"flaskbus:(mounts|gateways|\{{({mounts})\}}:(requests|agents|mount|reply:[0-9a-f]+))")
    assert not {key for key in written if not ours.fullmatch(key)}, "a key was made of what a client said"


@pytest.fixture
def site(module_site: Site) -> Site:
    module_site.forget()
    return module_site


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"(?:^|(?<=[}\nk]))HTTP/1\.[01] (\d{3}) ", answers)]


def idfn(attack: Attack) -> str:
    return attack.name.encode("ascii", "backslashreplace").decode()


@pytest.mark.parametrize("attack", ATTACKS, ids=idfn)
def test_bytes(site: Site, attack: Attack) -> None:
    answers = site.answers(attack.sent + AFTER)
    assert statuses(answers) == attack.statuses
    after = ["myapp: GET bus.example /myapp /after"] if attack.then == 200 else []
    assert site.reached == [*attack.reached, *after]
    if not attack.reached:
        # The app has a body that stopped, and nobody asks what it made of the beginning.
        executed = b"unknown" if attack.status == 408 else b"no"
        assert b'"executed": "%b"' % executed in answers


@pytest.mark.parametrize(
    ("data", "status"), [pytest.param(*case[1:], id=case[0]) for case in CASES if case[2] != PASSES]
)
def test_what_the_server_refuses_takes_what_is_behind_it_along(site: Site, data: bytes, status: int) -> None:
    assert statuses(site.answers(data + AFTER)) == [status]
    assert site.reached == []


def test_the_page_is_up_to_date() -> None:
    before, mark, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    assert mark
    assert rest == "\n\n" + page(), "run: python -m tests.faults.test_attack_surface"
    assert before


BEGIN = "<!-- Written by python -m tests.faults.test_attack_surface from tests/faults/attacks.py. -->"


# Who a client is


FORGED = [
    b"X-Forwarded-For: 192.0.2.1", b"X-Forwarded-Proto: https", b"X-Forwarded-Host: admin.example",
    b"X-Forwarded-Port: 1", b"X-Forwarded-Prefix: /evil", b"X-Real-IP: 192.0.2.1", b"Forwarded: for=192.0.2.1",
    b"X-Forwarded-Server: x", b"X-Forwarded-Ssl: on", b"X-Scheme: https",
]  # fmt: skip


def test_nobody_is_believed_but_a_trusted_proxy(module_site: Site) -> None:
    with running_bus(module_site.bus.broker_url, trusted_proxies="192.0.2.0/24") as bus:
        for prefix, host in MOUNTS.values():
            bus.await_route(Mount.parse(prefix, host))
        site = Site(bus)
        module_site.forget()
        assert statuses(site.answers(get(b"/myapp/x", *FORGED) + AFTER)) == [200, 200]
    assert module_site.reached[0] == "myapp: GET bus.example /myapp /x"
    environ = module_site.environs[0]
    assert (environ["REMOTE_ADDR"], environ["wsgi.url_scheme"]) == ("127.0.0.1", "http")


def test_a_client_cannot_take_a_trusted_proxys_word_away(site: Site) -> None:
    """By naming it in Connection, as if it spoke of one hop only."""
    named = b"Connection: x-forwarded-for, x-forwarded-proto"
    site.answers(get(b"/myapp/x", named, b"X-Forwarded-For: 192.0.2.1", b"X-Forwarded-Proto: https") + AFTER)
    environ = site.environs[0]
    assert (environ["REMOTE_ADDR"], environ["wsgi.url_scheme"]) == ("192.0.2.1", "https")


def test_an_id_of_a_clients_own_is_not_the_correlation_id(site: Site) -> None:
    """Many clients with the same one get each their own answer, and none is in the bus's ids."""
    answers: dict[int, str] = {}
    ids: list[str] = []

    def app(environ: Environ, start_response: Start) -> Iterable[bytes]:
        ids.append(environ["flaskbus.request_id"])
        start_response("200 OK", [])
        return [environ["PATH_INFO"].encode()]

    with site.bus.mount(app, "/ids", threads=8) as url:

        def ask(number: int) -> None:
            headers = {"X-Request-ID": "same", "X-Correlation-ID": "same", "Flaskbus-Request-ID": "same"}
            with httpx.Client() as client:
                for turn in range(10):
                    answers[number * 100 + turn] = client.get(f"{url}/{number}-{turn}", headers=headers).text

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {number * 100 + turn: f"/{number}-{turn}" for number in range(8) for turn in range(10)}
    assert len(set(ids)) == 80
    assert not any("same" in each for each in ids)
    refused = httpx.get(f"{site.bus.url}/nowhere", headers={"X-Request-ID": "same"})
    assert "same" not in refused.text + str(refused.headers)


# What apps answer


@pytest.mark.parametrize(
    "headers",
    [
        [("X", "a\r\nSet-Cookie: evil=1")], [("X", "a\nb")], [("X", "a\rb")], [("X", "a\0b")], [("X", "a\x7f")],
        [("X\r\nY", "a")], [("X Y", "a")], [("X:Y", "a")], [("", "a")], [("Caf\xe9", "a")], [("X", "\u20ac")],
        [("Content-Length", "2"), ("Content-Length", "3")], [("Content-Length", "+2")], [("Content-Length", "2, 2")],
    ],
    ids=repr,
)  # fmt: skip
def test_what_would_split_a_response_is_an_error_of_the_app(
    site: Site, headers: list[tuple[str, str]]
) -> None:
    site.response = ("200 OK", headers, [b"ok"])
    answers = site.answers(get(b"/myapp/x", b"Connection: close"))
    assert statuses(answers) == [500]
    assert b"evil" not in answers


@pytest.mark.parametrize(
    "status", ["200 OK\r\nX: y", "100 Continue", "101 Switching Protocols", "2000 OK", "OK"]
)
def test_a_status_that_is_none(site: Site, status: str) -> None:
    site.response = (status, [], [b"ok"])
    assert statuses(site.answers(get(b"/myapp/x", b"Connection: close"))) == [500]


OWN_FRAMING = [
    ("Transfer-Encoding", "chunked"), ("Connection", "close, X-Gone"), ("X-Gone", "1"), ("Keep-Alive", "timeout=9"),
    ("Upgrade", "h2c"), ("Trailer", "X"), ("TE", "trailers"), ("Proxy-Connection", "close"), ("X-Stays", "1"),
]  # fmt: skip


def test_framing_and_connection_are_not_the_apps(site: Site) -> None:
    site.response = ("200 OK", OWN_FRAMING, [b"ok"])
    answer = site.answers(get(b"/myapp/x") + AFTER)
    head, _, rest = answer.partition(b"\r\n\r\n")
    names = [line.partition(b":")[0].lower() for line in head.split(b"\r\n")[1:]]
    assert sorted(names) == [b"content-length", b"date", b"server", b"x-stays"]
    assert rest.startswith(b"okHTTP/1.1 200 ")


@pytest.mark.parametrize(("length", "sent"), [("1", [b"o", b"k"]), ("1", [b"ok"]), ("0", [b"ok"])])
def test_what_is_beyond_its_length_is_not_the_next_response(
    site: Site, length: str, sent: list[bytes]
) -> None:
    site.response = ("200 OK", [("Content-Length", length)], sent)
    answer = site.answers(get(b"/myapp/x") + AFTER.replace(b"/after", b"/x"))
    bodies = re.split(rb"HTTP/1\.1 200 OK\r\n.*?\r\n\r\n", answer, flags=re.DOTALL)
    assert bodies == [b"", *[b"ok"[: int(length)]] * 2]


@pytest.mark.parametrize(("length", "method"), [("3", b"GET"), ("9" * 17, b"GET")])
def test_what_is_short_of_its_length_ends_the_connection(site: Site, length: str, method: bytes) -> None:
    site.response = ("200 OK", [("Content-Length", length)], [b"ok"])
    answer = site.answers(get(b"/myapp/x", method=method) + AFTER)
    assert answer.endswith(b"\r\n\r\nok")
    assert len(statuses(answer)) == 1


# An agent that is not ours, and may write frames


FRAMED: dict[str, tuple[Headers, list[bytes]]] = {
    "a line end in a value": (((b"x", b"a\r\nevil: 1"),), []),
    "a line end in a name": (((b"x: y\r\nevil", b"1"),), []),
    "a colon in a name": (((b"evil: y", b"1"),), []),
    "a space in a name": (((b"x evil", b"1"),), []),
    "no name": (((b"", b"evil"),), []),
    "a coding": (((b"Transfer-Encoding", b"evil"),), []),
    "a connection": (((b"Connection", b"evil"),), []),
    "two lengths": (((b"content-length", b"2"), (b"Content-Length", b"7")), []),
    "a list of lengths": (((b"content-length", b"2, 2"),), []),
    "a signed length": (((b"content-length", b"+2"),), []),
    "a length that is too small": (((b"content-length", b"1"),), [b"content-length: 1"]),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["reply", "stream"])
@pytest.mark.parametrize("name", FRAMED)
def test_frames_cannot_break_the_framing(site: Site, name: str, streamed: bool) -> None:
    headers, kept = FRAMED[name]
    with closing(connect(site.bus.broker_url)) as client:
        fake = FakeAgent(client)
        site.bus.await_route(fake.mount)
        thread = threading.Thread(target=fake.answer, args=(headers, streamed))
        thread.start()
        answer = site.answers(get(b"/fake/x") + AFTER)
        thread.join()
        fake.leave()
    head, _, rest = answer.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n")[1:] if not line.startswith((b"Date:", b"Server:"))]
    assert b"evil" not in answer
    assert lines == (kept or [b"transfer-encoding: chunked"])
    assert rest.startswith(b"oHTTP/1.1 200" if kept else b"2\r\nok\r\n0\r\n\r\nHTTP/1.1 200")
    assert site.reached == ["myapp: GET bus.example /myapp /after"]


class FakeAgent:
    """An agent on a mount of its own that answers one request with headers of its choice."""

    mount = Mount.parse("/fake")

    def __init__(self, client: Any) -> None:
        self.client = client
        self.keys = Keys().of(self.mount.key)
        self.registry = Registry(client, Keys())
        record = AgentRecord(id="fake", name="fake", host="h", pid=1, beat=1, state="ready", lease=60)
        self.registry.claim(self.mount, record)

    def answer(self, headers: Headers, streamed: bool) -> None:
        [(_, [(entry_id, fields)])] = self.client.xreadgroup(
            GROUP, "fake", {self.keys.requests: ">"}, count=1, block=10_000
        )
        sender, attempt = wire.peek_sender(list(sum(fields.items(), ())))
        request_id = fields[b"id"].decode()
        frames: list[Frame] = [Reply(attempt, 0, 200, headers, b"ok")]
        if streamed:
            frames = [Head(attempt, 0, 200, headers), Chunk(attempt, 1, b"ok"), End(attempt, 2)]
        args = [GROUP, entry_id, "fake", LIST_TTL_MS, self.keys.doorbell(sender), request_id, 0]
        keys = [self.keys.requests, self.keys.reply(request_id)]
        assert run_script(self.client, "finish", keys, [*args, *map(wire.encode_frame, frames)]) == b"done"

    def leave(self) -> None:
        self.registry.leave(self.mount, "fake")
        self.registry.unmount(self.mount)


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0]
    PAGE.write_text(f"{text}{BEGIN}\n\n{page()}", encoding="utf-8")
