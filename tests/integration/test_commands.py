"""The commands of ``flaskbus`` against a real broker and a real agent."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple
from wsgiref.validate import validator

import click
import pytest
import redis

from flaskbus import wire
from flaskbus.broker import connect, parse_url
from flaskbus.cli import COMMANDS, cli
from flaskbus.client import BusClient, Outgoing
from flaskbus.commands.redis_cli import delegation
from flaskbus.commands.request import build
from flaskbus.errors import AgentLost, DeadlineBeforeStart, UsageError
from flaskbus.keys import GROUP, Keys
from flaskbus.messages import Reply, Request
from flaskbus.options import run
from flaskbus.registry import AgentRecord, Registry
from flaskbus.routing import Mount
from flaskbus.settings import AgentSettings, CommonSettings
from flaskbus.testing import running_bus
from flaskbus_agent.inprocess import InProcessAgent
from tests.conftest import Broker, free_port

MOUNT = Mount.parse("/app")
KEYS = Keys().of(MOUNT.key)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Outcome]
Environ = dict[str, Any]
Start = Callable[..., Any]


@pytest.fixture
def flaskbus(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Call:
    """Run ``flaskbus …`` in this process, against the broker of the test."""
    monkeypatch.setenv("FLASKBUS_REDIS_URL", broker.url)
    monkeypatch.chdir(tmp_path)

    def call(*args: str, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            run(cli, args)
        assert isinstance(end.value.code, int)
        return Outcome(end.value.code, *capfd.readouterr())

    return call


@validator
def app(environ: Environ, start_response: Start) -> Iterable[bytes]:
    """Says what it was asked, as JSON."""
    status = environ["PATH_INFO"].removeprefix("/status/") if "/status/" in environ["PATH_INFO"] else "200 OK"
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    said = {name: value for name, value in environ.items() if isinstance(value, str)}
    start_response(
        status, [("Content-Type", "application/json"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]
    )
    return [json.dumps({**said, "body": body.decode("latin-1")}).encode()]


@contextmanager
def serving(
    broker: Broker, application: Any = app, *, mount: Mount = MOUNT, name: str = "demo", **settings: Any
) -> Iterator[InProcessAgent]:
    agent = InProcessAgent(AgentSettings(redis=broker.url, **settings), {mount: application}, {mount: name})
    agent.start()
    try:
        yield agent
    finally:
        assert agent.stop(10.0)


def listed(broker: Broker, mount: Mount = MOUNT, **members: Any) -> AgentRecord:
    """List an agent that does not exist."""
    given: dict[str, Any] = {"id": "ghost", "name": "demo", "host": "elsewhere", "pid": 1, "at": time.time()}
    record = AgentRecord(**{**given, **members})
    with closing(broker.client()) as client:
        Registry(client, Keys()).claim(mount, record)
    return record


def enqueue(broker: Broker, request_id: str = "r1") -> bytes:
    """A request that waits."""
    flat = wire.encode_request(Request(request_id, "GET", "/app/x", "nobody", 30_000))
    with closing(broker.client()) as client:
        entry_id = client.xadd(KEYS.requests, dict(zip(flat[::2], flat[1::2], strict=True)))
    assert isinstance(entry_id, bytes)
    return entry_id


def nothing_is_left(broker: Broker) -> None:
    with closing(broker.client()) as client:
        assert client.xlen(KEYS.requests) == 0
        assert not client.keys("*:reply:*")
        if client.exists(KEYS.requests):
            assert client.xpending(KEYS.requests, GROUP)["pending"] == 0


# The group


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(flaskbus: Call, name: str) -> None:
    outcome = flaskbus(name, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"Usage: flaskbus {name} ")
    assert "Examples:" in outcome.out


def test_help_lists_the_commands(flaskbus: Call) -> None:
    out = flaskbus("--help").out
    assert all(re.search(rf"^  {name} +[A-Z]", out, re.MULTILINE) for name in COMMANDS)


def test_a_command_that_does_not_exist_has_a_neighbour(flaskbus: Call) -> None:
    outcome = flaskbus("mount")
    assert outcome.code == 2
    assert "there is no command 'mount'; did you mean 'mounts'?" in outcome.err


@pytest.mark.parametrize(
    "args",
    [("mounts",), ("agents",), ("unmount", "/app"), ("request", "/app/"), ("doctor",), ("redis", "PING")],
    ids=lambda args: args[0],
)
def test_a_broker_that_is_away_is_one_line_without_the_password(
    flaskbus: Call, args: tuple[str, ...]
) -> None:
    url = f"redis://me:hush@127.0.0.1:{free_port()}/0"
    name, *rest = args
    outcome = flaskbus(name, "--redis", url, *rest)
    assert outcome.code == 3
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith(
        f"flaskbus: error: the broker at {url.replace('hush', '***')} cannot be reached"
    )


@contextmanager
def user(broker: Broker, *rules: str) -> Iterator[str]:
    """The broker's URL for a user of its own, whose password is right."""
    with closing(broker.client()) as client:
        client.execute_command("ACL", "SETUSER", "guest", "on", ">right", *rules)  # type: ignore[no-untyped-call]
        try:
            yield broker.url.replace("//", "//guest:right@")
        finally:
            client.acl_deluser("guest")


def test_a_user_of_several_mounts_wants_a_name(flaskbus: Call) -> None:
    mounts = ("/", "shop.example.com/api")
    refused = flaskbus("acl", "agent", *mounts)
    assert (refused.code, refused.out) == (2, "")
    assert "say which, as in --user shop" in refused.err
    assert flaskbus("acl", "agent", *mounts, "--user", "shop").out.startswith("ACL SETUSER shop ")
    assert flaskbus("acl", "agent", "/").out.startswith("ACL SETUSER flaskbus-agent ")


def test_a_wrong_password_is_one_line(flaskbus: Call, broker: Broker) -> None:
    with user(broker, "+@all") as url:
        outcome = flaskbus("mounts", "--redis", url.replace("right", "wrong"))
        assert flaskbus("redis", "--redis", url, "PING").out == "PONG\n"
    assert outcome.code == 3
    assert re.fullmatch(
        r"flaskbus: error: the broker at \S+ refuses the user name or password: .*\n", outcome.err
    )
    assert "wrong@" not in outcome.err


def test_a_user_who_may_not_is_told(flaskbus: Call, broker: Broker) -> None:
    with user(broker, "+ping", "+client") as url:
        outcome = flaskbus("mounts", "--redis", url)
    assert outcome.code == 3
    assert "does not allow its user this" in outcome.err


# request


def test_request_brings_what_the_app_answers(flaskbus: Call, broker: Broker) -> None:
    with serving(broker):
        outcome = flaskbus("request", "GET", "/app/caf%C3%A9?x=1")
    assert outcome.code == 0
    said = json.loads(outcome.out)
    assert said["REQUEST_METHOD"] == "GET"
    assert (said["SCRIPT_NAME"], said["PATH_INFO"]) == ("/app", "/caf\xc3\xa9")
    assert said["QUERY_STRING"] == "x=1"
    assert said["HTTP_HOST"] == "localhost"
    assert said["HTTP_USER_AGENT"].startswith("flaskbus/")
    nothing_is_left(broker)


def test_request_sends_headers_and_a_body(flaskbus: Call, broker: Broker, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\x00\xff\n")
    with serving(broker):
        typed = json.loads(
            flaskbus(
                "request", "PUT", "/app/", "-d", "a=b", "-H", "X-One: 1", "-H", "Content-Type: text/x"
            ).out
        )
        from_file = json.loads(flaskbus("request", "/app/", "-d", "@file").out)
        from_stdin = json.loads(flaskbus("request", "/app/", "-d", "-", stdin=b"in\xff").out)
        empty = json.loads(flaskbus("request", "/app/", "-d", "").out)
    assert typed["REQUEST_METHOD"] == "PUT"
    assert (typed["HTTP_X_ONE"], typed["CONTENT_TYPE"], typed["CONTENT_LENGTH"]) == ("1", "text/x", "3")
    assert typed["body"] == "a=b"
    assert (from_file["REQUEST_METHOD"], from_file["body"]) == ("POST", "\x00\xff\n")
    assert from_file["CONTENT_TYPE"] == "application/x-www-form-urlencoded"
    assert from_stdin["body"] == "in\xff"
    assert (empty["REQUEST_METHOD"], empty["CONTENT_LENGTH"]) == ("POST", "0")


def test_request_goes_to_the_mount_of_the_host(flaskbus: Call, broker: Broker) -> None:
    with (
        serving(broker, mount=Mount.parse("/", "*.example.com"), name="tenants"),
        serving(broker, mount=Mount.parse("/app"), name="demo"),
    ):
        by_option = json.loads(flaskbus("request", "/app/x", "--host", "a.example.com").out)
        by_url = json.loads(flaskbus("request", "https://a.example.com/app/x").out)
        by_header = json.loads(flaskbus("request", "/app/x", "-H", "Host: a.example.com").out)
        plain = json.loads(flaskbus("request", "/app/x").out)
    assert by_option["SCRIPT_NAME"] == by_url["SCRIPT_NAME"] == by_header["SCRIPT_NAME"] == ""
    assert by_url["HTTP_HOST"] == by_header["HTTP_HOST"] == "a.example.com"
    assert (by_url["wsgi.url_scheme"], by_url["SERVER_PORT"]) == ("https", "443")
    assert plain["SCRIPT_NAME"] == "/app"


def test_request_shows_status_and_headers(flaskbus: Call, broker: Broker) -> None:
    with serving(broker):
        included = flaskbus("request", "-i", "/app/status/404 Not Found")
        head = flaskbus("request", "HEAD", "/app/")
    assert included.code == 1
    assert included.out.startswith(
        "HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n"
    )
    assert head.code == 0
    assert head.out.startswith("HTTP/1.1 200 OK\r\n")
    assert head.out.endswith("\r\n\r\n")


@pytest.mark.parametrize(
    ("status", "code"), [("200 OK", 0), ("302 Found", 0), ("400 Bad", 1), ("500 Oops", 1)]
)
def test_exit_code_of_request(flaskbus: Call, broker: Broker, status: str, code: int) -> None:
    with serving(broker):
        assert flaskbus("request", f"/app/status/{status}").code == code


def test_an_unknown_mount_is_told_on_stderr(flaskbus: Call, broker: Broker) -> None:
    outcome = flaskbus("request", "/nope")
    assert outcome == (
        3,
        "",
        "flaskbus request: Nothing is mounted here: no app is mounted at localhost/nope (executed: no)\n",
    )


def test_a_body_that_agents_would_refuse_is_not_sent(
    flaskbus: Call, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASKBUS_BODY_LIMIT", "3")
    with serving(broker):
        outcome = flaskbus("request", "/app/", "-d", "abcd")
    assert outcome.code == 3
    assert "4 bytes; at most 3 are taken (executed: no)" in outcome.err


def test_a_request_that_no_agent_takes_is_taken_back(flaskbus: Call, broker: Broker) -> None:
    listed(broker, state="ready")
    outcome = flaskbus("request", "/app/", "--timeout", "100ms")
    assert outcome.code == 3
    assert "no agent of /app was free within 0.1 s (executed: no)" in outcome.err
    nothing_is_left(broker)


def test_a_request_that_runs_too_long_may_have_run(flaskbus: Call, broker: Broker) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def slow(environ: Environ, start_response: Start) -> Iterable[bytes]:
        asked.set()
        assert go_on.wait(30)
        return app(environ, start_response)

    with serving(broker, slow):
        outcome = flaskbus("request", "/app/", "--timeout", "300ms")
        go_on.set()
    assert asked.is_set()
    assert outcome.code == 3
    assert "/app has not answered within 0.3 s (executed: unknown)" in outcome.err
    nothing_is_left(broker)


def test_agents_that_fail_to_start_end_the_wait_at_once(flaskbus: Call, broker: Broker) -> None:
    listed(broker, state="failed", reason="ModuleNotFoundError: No module named 'shop'")
    started = time.monotonic()
    outcome = flaskbus("request", "/app/", "--timeout", "60s")
    assert time.monotonic() - started < 30
    assert outcome.code == 3
    assert "fail to start: ModuleNotFoundError: No module named 'shop' (executed: no)" in outcome.err
    nothing_is_left(broker)


def test_a_mount_without_its_queue_is_told_at_once(flaskbus: Call, broker: Broker) -> None:
    listed(broker, state="ready")
    with closing(broker.client()) as client:
        client.delete(KEYS.requests)
        outcome = flaskbus("request", "/app/")
        assert not client.exists(KEYS.requests)
    assert outcome.code == 3
    assert "/app has no queue" in outcome.err


class Stream:
    """An app that yields when it is told to; notices when its iterable is closed."""

    def __init__(self) -> None:
        self.steps = [threading.Event() for _ in range(3)]
        self.closed = threading.Event()

    def __call__(self, environ: Environ, start_response: Start) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        try:
            for number, step in enumerate(self.steps):
                assert step.wait(30)
                yield b"%d\n" % number
        finally:
            self.closed.set()


def test_a_stream_is_shown_as_it_comes(broker: Broker, tmp_path: Path) -> None:
    stream = Stream()
    with serving(broker, stream):
        process = subprocess.Popen(
            [sys.executable, "-m", "flaskbus", "request", "--redis", broker.url, "/app/"],
            stdout=subprocess.PIPE,
            cwd=tmp_path,
        )
        assert process.stdout is not None
        with process:
            for number, step in enumerate(stream.steps):
                step.set()
                assert process.stdout.readline() == b"%d\n" % number
        assert process.returncode == 0
    nothing_is_left(broker)


def outgoing(**members: Any) -> Outgoing:
    return Outgoing(
        **{"method": "GET", "target": "/app/", "host": "x", "headers": ((b"host", b"x"),), **members}
    )


def test_a_stream_that_nobody_reads_on_is_closed(broker: Broker) -> None:
    stream = Stream()
    settings = CommonSettings(redis=broker.url)
    with serving(broker, stream), closing(broker.client()) as client:
        stream.steps[0].set()
        with BusClient(client, settings).send(outgoing()) as answer:
            assert next(iter(answer)) == b"0\n"
        stream.steps[1].set()
        assert stream.closed.wait(10)
        assert not stream.steps[2].is_set()
    nothing_is_left(broker)


def test_a_stream_larger_than_the_window_comes_whole(broker: Broker) -> None:
    def large(environ: Environ, start_response: Start) -> Iterable[bytes]:
        start_response("200 OK", [])
        return (bytes([number]) * 65536 for number in range(100))

    with serving(broker, large, window=65536), closing(broker.client()) as client:
        with BusClient(client, CommonSettings(redis=broker.url)).send(outgoing()) as answer:
            body = b"".join(answer)
    assert body == b"".join(bytes([number]) * 65536 for number in range(100))
    nothing_is_left(broker)


def test_a_stream_that_breaks_is_told(broker: Broker) -> None:
    def broken(environ: Environ, start_response: Start) -> Iterable[bytes]:
        start_response("200 OK", [])
        yield b"begun"
        raise ZeroDivisionError

    with serving(broker, broken), closing(broker.client()) as client:
        with BusClient(client, CommonSettings(redis=broker.url)).send(outgoing()) as answer:
            body = iter(answer)
            assert next(body) == b"begun"
            with pytest.raises(AgentLost, match="ZeroDivisionError"):
                next(body)
    nothing_is_left(broker)


def test_a_broken_connection_loses_no_reply(broker: Broker) -> None:
    """Both of the client's connections are cut while the app runs: it looks at the list anew."""

    def cutting(environ: Environ, start_response: Start) -> Iterable[bytes]:
        with closing(broker.client()) as other:
            victims = [one["id"] for one in other.client_list() if one["name"] == "victim"]
            assert len(victims) == 2
            for number in victims:
                other.client_kill_filter(_id=number)
        return app(environ, start_response)

    with serving(broker, cutting), closing(connect(broker.url, name="victim")) as client:
        with BusClient(client, CommonSettings(redis=broker.url)).send(outgoing()) as answer:
            assert answer.status == 200
            assert json.loads(b"".join(answer))["PATH_INFO"] == "/"
    nothing_is_left(broker)


def test_frames_that_are_not_of_this_run_are_passed_over(broker: Broker) -> None:
    def meddling(environ: Environ, start_response: Start) -> Iterable[bytes]:
        with closing(broker.client()) as other:
            for frame in (Reply(9, 0, 500, (), b"another attempt"), Reply(1, 7, 500, (), b"too early")):
                other.rpush(KEYS.reply(environ["flaskbus.request_id"]), wire.encode_frame(frame))
        return app(environ, start_response)

    with serving(broker, meddling), closing(broker.client()) as client:
        with BusClient(client, CommonSettings(redis=broker.url)).send(outgoing()) as answer:
            assert answer.status == 200
    nothing_is_left(broker)


def test_a_frame_that_is_not_ours_ends_the_exchange(broker: Broker) -> None:
    def meddling(environ: Environ, start_response: Start) -> Iterable[bytes]:
        with closing(broker.client()) as other:
            other.rpush(KEYS.reply(environ["flaskbus.request_id"]), b"junk")
        return app(environ, start_response)

    with serving(broker, meddling), closing(broker.client()) as client:
        with pytest.raises(AgentLost, match="not readable"):
            BusClient(client, CommonSettings(redis=broker.url)).send(outgoing())
    nothing_is_left(broker)


def test_a_request_that_vanished_is_not_waited_for(broker: Broker) -> None:
    go_on = threading.Event()

    def forgetful(environ: Environ, start_response: Start) -> Iterable[bytes]:
        with closing(broker.client()) as other:
            other.delete(KEYS.requests)
        assert go_on.wait(30)
        return app(environ, start_response)

    with serving(broker, forgetful), closing(broker.client()) as client:
        started = time.monotonic()
        with pytest.raises(AgentLost, match="the request is gone") as end:
            BusClient(client, CommonSettings(redis=broker.url)).send(outgoing(timeout=60.0))
        go_on.set()
    assert time.monotonic() - started < 30
    assert end.value.executed == "unknown"
    nothing_is_left(broker)


def test_a_stream_that_vanished_is_not_waited_for(broker: Broker) -> None:
    stream = Stream()
    with serving(broker, stream), closing(broker.client()) as client:
        stream.steps[0].set()
        with BusClient(client, CommonSettings(redis=broker.url)).send(outgoing()) as answer:
            body = iter(answer)
            assert next(body) == b"0\n"
            client.delete(KEYS.requests)
            with pytest.raises(AgentLost, match="the stream broke off"):
                next(body)
        stream.steps[1].set()
        assert stream.closed.wait(10)
    nothing_is_left(broker)


def losing_the_answer(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let XADD do its work, and lose its answer."""
    xadd = client.xadd

    def lost(*args: Any, **options: Any) -> None:
        xadd(*args, **options)
        raise redis.exceptions.ConnectionError("cut")

    monkeypatch.setattr(client, "xadd", lost)


def test_a_request_whose_sending_was_not_confirmed_still_brings_its_reply(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(broker), closing(broker.client()) as client:
        losing_the_answer(client, monkeypatch)
        with BusClient(client, CommonSettings(redis=broker.url)).send(outgoing()) as answer:
            assert answer.status == 200
    nothing_is_left(broker)


def test_a_request_whose_sending_was_not_confirmed_is_found_and_taken_back(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed(broker, state="ready")
    other = enqueue(broker)
    with closing(broker.client()) as client:
        losing_the_answer(client, monkeypatch)
        with pytest.raises(DeadlineBeforeStart) as end:
            BusClient(client, CommonSettings(redis=broker.url)).send(outgoing(timeout=0.1))
        left: Any = client.xrange(KEYS.requests)
        assert [entry_id for entry_id, _ in left] == [other]
    assert end.value.executed == "no"


def test_a_broker_that_is_full_refuses_the_request(flaskbus: Call, broker: Broker) -> None:
    listed(broker, state="ready")
    with closing(broker.client()) as client:
        client.config_set("maxmemory", "1")
        try:
            outcome = flaskbus("request", "/app/")
        finally:
            client.config_set("maxmemory", "0")
    assert outcome.code == 3
    assert outcome.err.startswith("flaskbus request: The broker is out of memory: ")
    assert "(executed: no)" in outcome.err
    nothing_is_left(broker)


def request_process(broker: Broker, directory: Path, target: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "flaskbus", "request", "--redis", broker.url, target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=directory,
    )


def test_a_reader_who_had_enough_ends_the_request(broker: Broker, tmp_path: Path) -> None:
    closed = threading.Event()

    def endless(environ: Environ, start_response: Start) -> Iterable[bytes]:
        start_response("200 OK", [])
        try:
            while True:
                yield bytes(65536)
        finally:
            closed.set()

    with serving(broker, endless), request_process(broker, tmp_path, "/app/") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10) == bytes(10)
        process.stdout.close()
        assert process.wait(20) == 1
        assert process.stderr.read() == b""
        assert closed.wait(10)
    nothing_is_left(broker)


def test_ctrl_c_takes_the_request_back(broker: Broker, tmp_path: Path) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def slow(environ: Environ, start_response: Start) -> Iterable[bytes]:
        asked.set()
        assert go_on.wait(30)
        return app(environ, start_response)

    with serving(broker, slow), request_process(broker, tmp_path, "/app/") as process:
        assert asked.wait(20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        go_on.set()
    assert (process.returncode, out, err.strip()) == (130, b"", b"")
    nothing_is_left(broker)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("app/x",), "target 'app/x' has to begin with a slash; did you mean /app/x?"),
        (("ftp://h/x",), "neither a path nor an http or https URL"),
        (("GE T", "/"), "'GE T' is not a method"),
        (("GET", "/", "/x"), "what is '/x'?"),
        (("/", "-H", "nonsense"), "--header 'nonsense' is not a header"),
        (("/", "-H", "a: b\nc: d"), "is not a header"),
        (("/", "-d", "@missing"), "--data @missing: No such file or directory"),
        (("/", "--timeout", "soon"), "--timeout must be a duration"),
        (("/", "--timeout", "0"), "--timeout must be more than 0"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(flaskbus: Call, args: tuple[str, ...], said: str) -> None:
    outcome = flaskbus("request", *args)
    assert outcome.code == 2
    assert said in outcome.err


def test_what_a_person_types_becomes_a_target() -> None:
    assert build(("/a b/é?q=%20",), (), None, None, 1.0).target == "/a%20b/%C3%A9?q=%20"
    assert build(("get", "/"), (), None, None, 1.0).method == "GET"
    assert build(("propfind", "/"), (), None, None, 1.0).method == "PROPFIND"
    assert build(("/",), ("X: é",), None, None, 1.0).headers[-1] == (b"x", "é".encode())
    with pytest.raises(UsageError):
        build(("",), (), None, None, 1.0)


# mounts, agents, unmount


def test_mounts(flaskbus: Call, broker: Broker) -> None:
    with serving(broker, threads=3) as agent:
        listed(broker, id="old", at=time.time() - 60, state="ready")
        document = json.loads(flaskbus("mounts", "--json").out)
        table = flaskbus("mounts").out.splitlines()
        found = json.loads(flaskbus("agents", "--json").out)
        rows = flaskbus("agents", "/app").out.splitlines()
    assert document == [
        {
            "mount": "/app",
            "host": "",
            "prefix": "/app",
            "app": "demo",
            "agents": {"alive": 1, "listed": 2},
            "waiting": 0,
            "running": 0,
            "oldest": None,
        }
    ]
    assert table[0].split() == ["MOUNT", "APP", "AGENTS", "WAITING", "RUNNING", "OLDEST"]
    assert table[1].split() == ["/app", "demo", "1/2", "0", "0", "-"]
    assert {record["id"] for record in found} == {agent.id, "old"}
    mine = next(record for record in found if record["id"] == agent.id)
    assert (mine["mount"], mine["state"], mine["threads"], mine["pid"]) == ("/app", "ready", 3, os.getpid())
    assert mine["age"] < 10
    assert len(rows) == 3
    assert any(row.startswith("/app") and "old" in row and row.endswith("60s ago") for row in rows)


def test_mounts_count_what_waits_and_what_runs(flaskbus: Call, broker: Broker) -> None:
    listed(broker, state="ready")
    for number in range(3):
        enqueue(broker, f"r{number}")
    with closing(broker.client()) as client:
        client.xreadgroup(GROUP, "ghost", {KEYS.requests: ">"}, count=1)
        [view] = json.loads(flaskbus("mounts", "--json").out)
        assert (view["waiting"], view["running"]) == (2, 1)
        assert 0 <= view["oldest"] < 60
        client.xgroup_destroy(KEYS.requests, GROUP)
        [view] = json.loads(flaskbus("mounts", "--json").out)
        assert (view["waiting"], view["running"]) == (3, 0)


def test_an_empty_bus_says_what_to_do(flaskbus: Call) -> None:
    assert flaskbus("mounts") == (
        0, "", "nothing is mounted; flaskbus-agent MODULE:APP --prefix /PATH mounts an app\n"
    )  # fmt: skip
    assert flaskbus("agents") == (0, "", "no agent is listed\n")
    assert flaskbus("mounts", "--json").out == "[]\n"


def test_an_agent_that_failed_says_why(flaskbus: Call, broker: Broker) -> None:
    listed(broker, state="failed", reason="SyntaxError: invalid syntax")
    assert flaskbus("agents").out.splitlines()[-1] == "/app: ghost failed: SyntaxError: invalid syntax"


@pytest.mark.parametrize("command", ["agents", "unmount"])
def test_a_mount_that_is_not_there_has_a_neighbour(flaskbus: Call, broker: Broker, command: str) -> None:
    listed(broker)
    outcome = flaskbus(command, "/ap")
    assert outcome == (2, "", "flaskbus: error: nothing is mounted on /ap; did you mean /app?\n")
    assert "flaskbus mounts shows what is there" in flaskbus(command, "/quite/another").err
    assert "has no slash" in flaskbus(command, "app").err


def mounted(broker: Broker) -> bool:
    with closing(broker.client()) as client:
        return Registry(client, Keys()).owner(MOUNT) is not None


def test_unmount_asks_first(flaskbus: Call, broker: Broker) -> None:
    listed(broker, at=0.0)
    enqueue(broker)
    refused = flaskbus("unmount", "/app", stdin=b"n\n")
    assert refused.code == 1
    assert (
        "Unmount /app of the app demo with 1 request waiting, to be answered at the deadline?" in refused.out
    )
    assert mounted(broker)
    assert flaskbus("unmount", "/app", stdin=b"").code == 2
    assert mounted(broker)
    assert flaskbus("unmount", "/app", stdin=b"y\n").out.endswith("/app is no longer mounted\n")
    assert not mounted(broker)


def test_unmount_is_refused_while_agents_would_bring_it_back(flaskbus: Call, broker: Broker) -> None:
    listed(broker, state="ready")
    outcome = flaskbus("unmount", "/app", "--yes")
    assert outcome.code == 3
    assert "/app has 1 live agent (ghost), which would bring it back" in outcome.err
    assert mounted(broker)
    assert flaskbus("unmount", "/app", "--yes", "--force").code == 0
    assert not mounted(broker)


def test_another_namespace_is_another_bus(flaskbus: Call, broker: Broker) -> None:
    listed(broker)
    assert json.loads(flaskbus("mounts", "--namespace", "staging", "--json").out) == []


# healthcheck


def test_the_broker_is_what_is_checked_first(flaskbus: Call, broker: Broker) -> None:
    assert flaskbus("healthcheck") == (0, "", "")
    assert flaskbus("healthcheck", "--broker") == (0, "", "")
    away = flaskbus("healthcheck", "--redis", f"redis://127.0.0.1:{free_port()}/0")
    assert away.code == 1
    assert away.err.startswith("unhealthy: the broker at redis://127.0.0.1:")
    with closing(broker.client()) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            unfit = flaskbus("healthcheck")
        finally:
            client.config_set("maxmemory-policy", "noeviction")
    assert unfit.code == 1
    assert "may evict requests" in unfit.err


class Answering(BaseHTTPRequestHandler):
    """Answers everything with 503, and remembers what it was asked."""

    asked: list[str]

    def answer(self) -> None:
        self.asked.append(self.requestline)
        self.send_error(503)

    do_GET = do_OPTIONS = answer

    def log_message(self, *args: Any) -> None:
        pass


def test_any_answer_of_a_gateway_is_a_good_one(flaskbus: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answering, "asked", [], raising=False)
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        port = server.server_port
        monkeypatch.setenv("FLASKBUS_PORT", str(port))
        assert flaskbus("healthcheck", "--gateway", f"http://127.0.0.1:{port}").code == 0
        assert flaskbus("healthcheck", "--gateway", f"http://127.0.0.1:{port}/health?x=1").code == 0
        assert flaskbus("healthcheck", "--gateway").code == 0
        server.shutdown()
        thread.join()
    # An app at / would see a GET, so none is sent unless a path was given.
    assert Answering.asked == ["OPTIONS * HTTP/1.1", "GET /health?x=1 HTTP/1.1", "OPTIONS * HTTP/1.1"]


def test_a_real_gateway_is_healthy_until_it_is_gone(flaskbus: Call, broker: Broker) -> None:
    with running_bus(broker.url) as bus:
        assert flaskbus("healthcheck", "--broker", "--gateway", bus.url) == (0, "", "")
    outcome = flaskbus("healthcheck", "--gateway", bus.url)
    assert outcome.code == 1
    assert outcome.err.startswith(f"unhealthy: no gateway answers at {bus.url}")


def test_a_gateway_on_a_unix_socket_is_asked_there(flaskbus: Call, broker: Broker, tmp_path: Path) -> None:
    path = tmp_path / "gateway.sock"
    process = subprocess.Popen(
        [sys.executable, "-m", "flaskbus_gateway", "--redis", broker.url, "--host", f"unix:{path}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 15
        while flaskbus("healthcheck", "--gateway", f"unix:{path}").code:
            assert process.poll() is None
            assert time.monotonic() < deadline
    finally:
        process.terminate()
        process.wait(10)


def test_a_url_that_is_none_is_a_usage_error(flaskbus: Call) -> None:
    outcome = flaskbus("healthcheck", "--gateway", "127.0.0.1:5000")
    assert outcome.code == 2
    assert "is not an http or https URL" in outcome.err


def test_an_agent_is_healthy_while_its_heart_beats(
    flaskbus: Call, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASKBUS_LEASE", "2")
    with serving(broker, lease=2.0) as agent:
        assert flaskbus("healthcheck", "--agent") == (0, "", "")
        assert flaskbus("healthcheck", "--agent", agent.id) == (0, "", "")
        other = flaskbus("healthcheck", "--agent", "nobody")
    assert other == (1, "", "unhealthy: no agent nobody is ready\n")
    gone = flaskbus("healthcheck", "--agent")
    assert gone.code == 1
    assert re.fullmatch(r"unhealthy: no agent of \S+ is ready\n", gone.err)
    listed(broker, state="ready")
    still = flaskbus("healthcheck", "--agent", "ghost")
    assert still == (1, "", "unhealthy: no agent ghost has sent a heartbeat for 1 s\n")


# redis


def test_redis_speaks_like_redis_cli(flaskbus: Call, broker: Broker) -> None:
    with closing(broker.client()) as client:
        client.rpush("l", "a", "é")
        client.expire("l", 100)
    assert flaskbus("redis", "--no-raw", "PING").out == "PONG\n"
    assert flaskbus("redis", "--no-raw", "ECHO", "PONG").out == '"PONG"\n'
    assert flaskbus("redis", "--no-raw", "LRANGE", "l", "0", "-1").out == '1) "a"\n2) "\\xc3\\xa9"\n'
    assert flaskbus("redis", "--no-raw", "GET", "nothing").out == "(nil)\n"
    assert flaskbus("redis", "--no-raw", "LLEN", "l").out == "(integer) 2\n"
    assert flaskbus("redis", "LRANGE", "l", "0", "-1").out == "a\né\n"  # raw, since this is no terminal
    wrong = flaskbus("redis", "--no-raw", "GET", "l")
    assert wrong.code == 1
    assert wrong.out.startswith("(error) WRONGTYPE ")


def test_redis_shows_what_flaskbus_packed(flaskbus: Call, broker: Broker) -> None:
    listed(broker)
    enqueue(broker)
    out = flaskbus("redis", "--no-raw", "--decode", "XRANGE", KEYS.requests, "-", "+").out
    assert '"target"' in out
    assert '"/app/x"' in out
    assert '[2, "http", "1.1", "", 0, "", 0, "", []]' in out
    assert "\\x" not in out
    assert "\\x" in flaskbus("redis", "--no-raw", "XRANGE", KEYS.requests, "-", "+").out


def test_redis_reads_commands_from_a_pipe(flaskbus: Call) -> None:
    outcome = flaskbus(
        "redis", "--no-raw",
        stdin=b'MULTI\nSET a "x y"\n\nGET a\nEXEC\n"unbalanced\nDEL a\nquit\nPING\n',
    )  # fmt: skip
    assert outcome.out == 'OK\nQUEUED\nQUEUED\n1) OK\n2) "x y"\n(integer) 1\n'
    assert outcome.err == "Invalid argument(s)\n"
    assert outcome.code == 0


def test_redis_listens_until_it_is_stopped(broker: Broker, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "flaskbus", "redis", "--redis", broker.url, "--no-raw", "SUBSCRIBE", "bell"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    with process, closing(broker.client()) as client:
        assert [process.stdout.readline() for _ in range(3)] == [
            '1) "subscribe"\n',
            '2) "bell"\n',
            "3) (integer) 1\n",
        ]
        client.publish("bell", "ding")
        assert [process.stdout.readline() for _ in range(3)] == [
            '1) "message"\n',
            '2) "bell"\n',
            '3) "ding"\n',
        ]
        process.terminate()


def test_a_connection_that_breaks_is_one_line(flaskbus: Call, broker: Broker) -> None:
    def cut() -> None:
        with closing(broker.client()) as client:
            while not (blocked := [one for one in client.client_list() if one["cmd"] == "blpop"]):
                time.sleep(0.01)
            client.client_kill_filter(_id=blocked[0]["id"])

    thread = threading.Thread(target=cut)
    thread.start()
    outcome = flaskbus("redis", "BLPOP", "nothing", "0")
    thread.join()
    assert outcome.code == 3
    assert outcome.err.count("\n") == 1
    assert f"the connection to the broker at {broker.url} broke" in outcome.err


def test_a_real_redis_cli_never_has_the_password_on_its_command_line() -> None:
    url = "rediss://me:hush@broker.example.com:6390/3?ssl_ca_certs=/etc/ca.pem"
    assert delegation(parse_url(url), None) == (
        [
            *("-h", "broker.example.com", "-p", "6390", "-n", "3", "--user", "me"),
            *("--tls", "--cacert", "/etc/ca.pem"),
        ],
        {"REDISCLI_AUTH": "hush"},
    )
    assert delegation(parse_url("unix:///run/redis.sock?db=1"), True) == (
        ["-s", "/run/redis.sock", "-n", "1", "--raw"],
        {},
    )


@contextmanager
def on_a_terminal(directory: Path, path: str, *args: str) -> Iterator[tuple[subprocess.Popen[bytes], FileIO]]:
    """``flaskbus redis`` with a terminal for input and output, and that PATH."""
    ours, theirs = pty.openpty()
    with FileIO(ours, "r+") as terminal:
        process = subprocess.Popen(
            [sys.executable, "-m", "flaskbus", "redis", *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=directory,
            env={**os.environ, "PATH": path, "TERM": "dumb"},
        )
        os.close(theirs)
        with process:
            yield process, terminal


def test_redis_prompts_on_a_terminal(broker: Broker, tmp_path: Path) -> None:
    where = broker.url.removeprefix("redis://").removesuffix("/0").encode()
    with on_a_terminal(tmp_path, "", "--redis", broker.url) as (process, terminal):
        terminal.write(b"ECHO hi\n")
        shown = b"".join(iter(terminal.readline, b'"hi"\r\n'))
        terminal.write(b"quit\n")
        assert process.wait(20) == 0
    assert where + b"> " in shown


def test_redis_leaves_the_prompt_to_a_real_redis_cli(tmp_path: Path) -> None:
    program = tmp_path / "redis-cli"
    program.write_text('#!/bin/sh\necho "real $* $REDISCLI_AUTH"\n')
    program.chmod(0o755)
    with on_a_terminal(tmp_path, str(tmp_path), "--redis", "redis://:hush@h:1/2") as (process, terminal):
        assert terminal.readline() == b"real -h h -p 1 -n 2 hush\r\n"
        assert process.wait(20) == 0


# flask bus

HELLO = """
from flask import Flask
from flaskbus.extension import FlaskBus

bus = FlaskBus()

def create_app():
    app = Flask(__name__)
    app.config.from_prefixed_env()
    bus.init_app(app)

    @app.get("/")
    def index():
        return {"id": bus.request_id, "threads": bus.settings.threads}

    return app
"""


def flask(directory: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flask", "--app", "hello", "bus", *args],
        cwd=directory,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def hello(tmp_path: Path) -> Path:
    (tmp_path / "hello.py").write_text(HELLO)
    return tmp_path


def test_flask_bus_knows_the_broker_of_the_app(hello: Path, broker: Broker) -> None:
    from_app = {"FLASK_FLASKBUS_REDIS_URL": broker.url}
    with serving(broker):
        there = flask(hello, "mounts", "--json", **from_app)
        stronger = flask(hello, "mounts", **from_app, FLASKBUS_REDIS_URL=f"redis://127.0.0.1:{free_port()}")
        unknown = flask(hello, "mounts", **from_app, FLASK_FLASKBUS_REDIS_ULR="x")
        status = flask(hello, "request", "/app/status/404 No", **from_app)
    assert (there.returncode, json.loads(there.stdout)[0]["mount"]) == (0, "/app")
    assert stronger.returncode == 3
    assert stronger.stderr.startswith("flask bus: error: the broker at redis://127.0.0.1:")
    assert unknown.returncode == 2
    assert "unknown config key 'FLASKBUS_REDIS_ULR'; did you mean 'FLASKBUS_REDIS_URL'?" in unknown.stderr
    assert status.returncode == 1


def test_flask_bus_agent_serves_the_app(hello: Path, broker: Broker, flaskbus: Call) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "flask", "--app", "hello", "bus", "agent", "--prefix", "/hello"],
        cwd=hello,
        env={**os.environ, "FLASK_FLASKBUS_REDIS_URL": broker.url, "FLASK_FLASKBUS_THREADS": "7"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with closing(broker.client()) as client:
            deadline = time.monotonic() + 30
            while not client.hlen(Keys().of("/hello").agents):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        outcome = flaskbus("request", "/hello/")
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert outcome.code == 0
    said = json.loads(outcome.out)
    assert said["threads"] == 7
    assert said["id"]


def test_the_order_of_help_is_the_order_of_the_table() -> None:
    assert cli.list_commands(click.Context(cli)) == list(COMMANDS)


def test_an_error_of_the_broker_is_one_line(flaskbus: Call, broker: Broker) -> None:
    with closing(broker.client()) as client:
        client.set("flaskbus:mounts", "not a set")
        outcome = flaskbus("mounts")
        client.delete("flaskbus:mounts")
    assert outcome.code == 3
    assert re.fullmatch(
        r"flaskbus: error: the broker at \S+ answers with an error: WRONGTYPE .*\n", outcome.err
    )
