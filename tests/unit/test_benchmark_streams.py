"""The parts of the benchmark of streams: its clients, what it watches, and how that is shown."""

from __future__ import annotations

import base64
import hashlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

import pytest
from werkzeug.serving import make_server

from benchmarks import websocket
from benchmarks.apps import CHUNK, PATTERN, app, checksum, chunks
from benchmarks.cli import _chosen
from benchmarks.events import Audience, Caller, Listener
from benchmarks.model import Deployment, Metric, Sample, Skip, Wrong
from benchmarks.report import as_json, markdown, states
from benchmarks.systems import SYSTEMS
from benchmarks.targets import TARGETS
from benchmarks.transfer import download, upload
from benchmarks.watch import AFTER, BEFORE, CONNECTIONS, MEMORY, PEAK, growth
from benchmarks.works import GROUPS, WORKS
from benchmarks.works.base import Scale

EVENT_STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The app behind a server of its own."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@contextmanager
def speaks(*parts: bytes) -> Iterator[int]:
    """A server that takes one connection, says this part by part, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                for part in parts:
                    connection.sendall(part)
                    time.sleep(0.01)  # so that the parts come one by one

        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1]
        thread.join()


class TestTransfers:
    def test_no_part_is_like_another_within_the_pattern(self) -> None:
        parts = list(chunks(len(PATTERN) + CHUNK))
        assert len(set(parts[:-1])) == len(PATTERN) // CHUNK
        assert parts[-1] == parts[0]
        assert checksum(2 * CHUNK) != checksum(3 * CHUNK)

    def test_both_ways(self, port: int) -> None:
        # More than the pattern, so that it begins anew.
        size = len(PATTERN) + 3 * CHUNK
        assert download(port, size) > 0
        assert upload(port, size) > 0

    @pytest.mark.parametrize("move", [download, upload])
    def test_nobody_answers(self, move: Callable[[int, int], float]) -> None:
        with speaks() as port, pytest.raises(Wrong, match=r"closed without an answer|missing"):
            move(port, CHUNK)


class TestListener:
    def test_events_that_come_in_pieces(self) -> None:
        whole = EVENT_STREAM + b"a\r\ndata: 11\n\n\r\n14\r\ndata: 22\n\ndata: 33\n\n\r\n0\r\n\r\n"
        for cut in range(1, len(whole)):
            with speaks(whole[:cut], whole[cut:]) as port, closing(Listener(port, "/")) as listener:
                seen: list[int] = []
                while not listener.ended:
                    seen += listener.read()
                assert seen == [11, 22, 33]
                assert (listener.events, listener.status) == (3, 200)
            if cut > len(EVENT_STREAM) + 14:
                break

    def test_a_refusal(self) -> None:
        with speaks(b"HTTP/1.1 503 Away\r\n\r\n") as port, closing(Listener(port, "/")) as listener:
            assert listener.read() == []
            assert (listener.ended, listener.status, listener.events) == (True, 503, 0)


class TestAudience:
    def test_another_client_is_heard_beside_them(self, port: int) -> None:
        with closing(Audience()) as audience, closing(Caller(port, "/hello", 10)) as caller:
            audience.join(port, "/ticks/50/50", 8)
            audience.listen(10, enough=8)
            assert len(audience.firsts) == audience.open == 8
            with pytest.raises(Wrong, match="closed"):  # as this server does after each answer
                audience.listen(10, caller=caller)
            assert (len(caller.latencies), caller.errors) == (1, 0)

    def test_what_was_due_and_who_had_it(self, port: int) -> None:
        with closing(Audience()) as audience:
            audience.join(port, "/ticks/4/50", 3)
            while audience.open or len(audience.firsts) < 3:
                audience.listen(0.05)
        whole = audience.whole()
        assert all(due % 50_000_000 == 0 for due in audience.later)
        # They may have begun on both sides of such a moment.
        assert sum(len(each) for each in audience.later.values()) == 3 * 4
        assert all(1 <= len(each) <= 3 for each in audience.later.values())
        assert all(latency >= 0 for each in audience.later.values() for latency in each)
        assert list(whole) == []  # all are at their end
        assert audience.open == 0

    def test_another_client_is_answered_meanwhile(self) -> None:
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
        refusal = b"HTTP/1.1 503 Away\r\nContent-Length: 0\r\n\r\n"
        with speaks(answer, b"{}", refusal) as port, closing(Caller(port, "/", 10)) as caller:
            assert caller.wait() == 0
            caller.send()
            assert caller.wait() == float("inf")
            while not caller.latencies:
                caller.read()
            assert caller.errors == 0
            assert 9 < caller.wait() <= 10
            caller.send()
            while len(caller.latencies) < 2:
                caller.read()
            assert caller.errors == 1
            with pytest.raises(Wrong):
                caller.read()


class TestWebSocket:
    @staticmethod
    @contextmanager
    def pairs(count: int, answer: Callable[[bytes], bytes]) -> Iterator[Sequence[socket.socket]]:
        """Ends of sockets; what is written to them comes back as ``answer`` makes it, in two parts."""
        threads, sockets = [], []

        def serve(sock: socket.socket) -> None:
            while data := sock.recv(64):
                reply = answer(data)
                sock.sendall(reply[:3])
                sock.sendall(reply[3:])

        for _ in range(count):
            ours, theirs = socket.socketpair()
            threads.append(threading.Thread(target=serve, args=(theirs,)))
            threads[-1].start()
            sockets.append((ours, theirs))
        yield [ours for ours, _ in sockets]
        for ours, theirs in sockets:
            ours.close()
            theirs.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for _, theirs in sockets:
            theirs.close()

    def test_each_has_one_message_under_way(self) -> None:
        with self.pairs(3, lambda data: bytes([0x81, 2]) + data[6:]) as sockets:
            latencies = websocket.echoes(sockets, 0.2, b"hi")
        assert len(latencies) > 3
        assert all(0 < each <= 200 for each in latencies)

    def test_another_echo(self) -> None:
        with (
            self.pairs(1, lambda data: b"\x81\x02ho") as sockets,
            pytest.raises(Wrong, match="the echo is not what was sent"),
        ):
            websocket.echoes(sockets, 0.2, b"hi")

    def test_the_handshake(self) -> None:
        magic = b"dGhlIHNhbXBsZSBub25jZQ==258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(magic).digest())
        good = b"HTTP/1.1 101 Switching\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        with speaks(good) as port:
            websocket.upgrade(port, "/echo").close()
        with speaks(good.replace(accept, b"other")) as port, pytest.raises(Wrong, match="6455"):
            websocket.upgrade(port, "/echo")
        with speaks(b"HTTP/1.1 404 No\r\n\r\n") as port, pytest.raises(Skip, match="404"):
            websocket.upgrade(port, "/echo")
        with speaks(b"HTTP/1.1 101") as port, pytest.raises(Wrong, match="in the handshake"):
            websocket.upgrade(port, "/echo")


def state(
    name: str, *values: float, system: str = "flaskbus", variant: str = "1", turn: int = 0
) -> list[Sample]:
    unit = "" if name == CONNECTIONS else "MiB"
    return [
        Sample("sse-many", variant, system, turn, Metric(name, unit, when=when), value)
        for when, value in zip((BEFORE, PEAK, AFTER), values, strict=True)
    ]


class TestStates:
    SAMPLES = (
        *state(MEMORY + "gateway", 20, 26, 21), *state(MEMORY + "gateway", 24, 24, 24, turn=1),
        *state(MEMORY + "agent", 30, 31, 30), *state(MEMORY + "agent", 30, 33, 30, turn=1),
        *state(CONNECTIONS, 19, 19, 18), *state(MEMORY + "nginx", 1, 100, 1, system="nginx-gthread"),
        *state(MEMORY + "agent", 30, 90, 30, variant="2"),
        Sample("sse-many", "1", "flaskbus", 0, Metric("latency", "ms"), 5),
    )  # fmt: skip

    def test_growth_is_that_of_who_grows_most(self) -> None:
        grown = growth(self.SAMPLES, "sse-many", "flaskbus", of=MEMORY, variant="1")
        assert grown == {0: 6, 1: 3}
        assert growth(self.SAMPLES, "sse-many", "flaskbus", of=MEMORY) == {0: 60, 1: 3}
        assert growth(self.SAMPLES, "sse-many", "flaskbus", of=CONNECTIONS, variant="1") == {0: 0}
        assert growth(self.SAMPLES, "upload", "flaskbus", of=MEMORY) == {}

    def test_table(self) -> None:
        assert states(SYSTEMS, self.SAMPLES).splitlines() == [
            "| | | before | peak | after |",
            "| --- | --- | ---: | ---: | ---: |",
            "| 1: flaskbus | memory of gateway, MiB | 22 | 25 | 22.5 |",
            "| 1: flaskbus | memory of agent, MiB | 30 | 32 | 30 |",
            "| 1: flaskbus | connections to the broker | 19 | 19 | 18 |",
            "| 1: nginx → gunicorn gthread | memory of nginx, MiB | 1 | 100 | 1 |",
            "| 2: flaskbus | memory of agent, MiB | 30 | 90 | 30 |",
        ]

    def test_the_report_has_them_apart(self) -> None:
        work = next(each for each in WORKS if each.name == "sse-many")
        text = markdown({}, [work], SYSTEMS, self.SAMPLES, [])
        assert work.note in text
        assert "\n| 1: latency, ms | 5 | – |\n\nMemory is " in text
        assert '"metric": "memory of gateway, before"' in as_json({}, self.SAMPLES, [])

    def test_targets(self) -> None:
        samples = [
            *(each for each in self.SAMPLES if each.metric.when),
            *(
                Sample("upload-large", "2 GiB", "flaskbus", 0, each.metric, each.value)
                for each in state(MEMORY + "broker", 4, 14, 4)
            ),
        ]
        target = next(each for each in TARGETS if each.title.startswith("upload of 2 GiB"))
        measured = target.measured(samples)
        assert measured is not None
        assert (measured.median, target.verdict(measured)) == (10, "reached")
        assert target.measured(self.SAMPLES) is None


class TestPlan:
    def test_a_group_stands_for_its_works(self) -> None:
        names = [work.name for work in WORKS]
        assert set(GROUPS["streams"]) <= set(names)
        assert _chosen(names, ["hello,streams"], "work", GROUPS) == ["hello", *GROUPS["streams"]]

    def test_who_has_no_budget_for_streams_has_threads(self) -> None:
        many = next(work for work in WORKS if work.name == "sse-many")
        assert many.deployment("500", Scale()) == Deployment(streams=500)
        assert Deployment(threads=4, streams=500).at_once == 504

    def test_streams_are_watched_by_process(self) -> None:
        from benchmarks import measure

        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
            assert 0 < measure.private(child.pid) <= measure.pss([child.pid])
