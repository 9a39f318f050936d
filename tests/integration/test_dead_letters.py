"""Dead letters, from a poisonous request to its replay, and what ``flaskbus dead`` does with what lies there."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from wsgiref.validate import validator

import httpx
import pytest

from flaskbus.broker import run_script
from flaskbus.cli import cli
from flaskbus.keys import DEAD_FIELD, DEAD_KEPT, DEAD_TTL_MS, GROUP, LIST_TTL_MS, Keys
from flaskbus.letters import Field, of_request, of_stranger
from flaskbus.messages import Request
from flaskbus.options import run
from flaskbus.registry import AgentRecord, Registry
from flaskbus.routing import Mount
from flaskbus.settings import AgentSettings
from flaskbus.testing import running_bus
from flaskbus_agent.inprocess import InProcessAgent
from tests.conftest import Broker
from tests.integration.procs import wait_until

APP = Mount.parse("/app")
M = Keys().of(APP.key)
AT = datetime(2026, 11, 21, 8, 0, 0, 0, UTC)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


@pytest.fixture
def dead(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> Call:
    """Run ``flaskbus dead …`` in this process, against the broker of the test."""
    monkeypatch.setenv("FLASKBUS_REDIS_URL", broker.url)
    monkeypatch.chdir(tmp_path)

    def call(*args: str, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfdbinary.readouterr()
        with pytest.raises(SystemExit) as end:
            run(cli, ("dead", *args))
        assert isinstance(end.value.code, int)
        out, err = (each.decode() for each in capfdbinary.readouterr())
        steers = [
            each for each in (out + err).replace("\r\n", "\n") if each != "\n" and not each.isprintable()
        ]
        assert not steers, "something that steers a terminal"
        return Outcome(end.value.code, out, err)

    return call


# Poison

POISON = """
import os, pathlib, signal, wsgiref.validate
import flask

app = flask.Flask(__name__)
app.wsgi_app = wsgiref.validate.validator(app.wsgi_app)
here = pathlib.Path(__file__).parent


@app.route("/<how>", methods=["GET", "PUT"])
def die(how):
    with (here / "runs").open("a") as ledger:
        ledger.write(how + "\\n")
    if not (here / "mended").exists():
        if how == "exit":
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)
    said = flask.request
    return {
        "size": len(said.stream.read(1 << 20)), "query": said.query_string.decode(),
        "cookie": said.headers.get("Cookie"),
        "authorization": said.headers.get("Authorization"), "trace": said.headers.get("X-Trace"),
    }
"""


@contextmanager
def poisonous(broker: Broker, directory: Path) -> Iterator[None]:
    """Two workers of that app; their supervisor is there to the end."""
    (directory / "poison.py").write_text(POISON)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "flaskbus_agent",
            "poison:app",
            "--prefix",
            "/app",
            "--name",
            "demo",
            "--workers",
            "2",
        ],
        cwd=directory,
        env={**os.environ, "FLASKBUS_REDIS_URL": broker.url, "PYTHONDONTWRITEBYTECODE": "1"},
        start_new_session=True,
    )
    try:
        with closing(broker.client()) as client:
            registry = Registry(client, Keys())
            wait_until(
                lambda: any(one.state == "ready" for one in registry.agents(APP)), "the agent is ready"
            )
        yield
    finally:
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.parametrize(("method", "how"), [("GET", "kill"), ("PUT", "exit")])
def test_what_kills_its_agents_is_kept_and_replayed_once_the_app_is_mended(
    broker: Broker, dead: Call, tmp_path: Path, method: str, how: str
) -> None:
    body = os.urandom(100_000) if method == "PUT" else b""
    (tmp_path / "whole").write_bytes(body)
    headers = {"Authorization": "Bearer hush", "Cookie": "a=hush", "X-Trace": "kept"}
    with running_bus(broker.url) as bus, poisonous(broker, tmp_path), closing(broker.client()) as client:
        answer = httpx.request(
            method, f"{bus.url}/app/{how}?page=1&token=hush", headers=headers, content=body, timeout=60
        )
        assert (answer.status_code, answer.json()["executed"]) == (502, "unknown")
        assert (tmp_path / "runs").read_text().split() == [how] * 3

        # What a person sees with redis-cli.
        ((_, letter),) = entries(client)
        assert letter[b"target"] == f"/app/{how}?page=1&token=(redacted)".encode()
        assert b"3 agents died" in letter[b"reason"]
        assert (letter[b"method"], letter[b"attempt"]) == (method.encode(), b"3")
        assert letter[b"size"] == str(len(body)).encode()
        assert b"kept" in letter[b"head"]
        assert not any(b"hush" in part for part in [*letter, *letter.values()])
        assert len(letter[b"body"]) <= 64 * 1024 + 5
        assert 0 < client.pttl(M.dead) <= DEAD_TTL_MS

        [listed] = json.loads(dead("list", "/app", "--json").out)
        assert listed["request_id"] == answer.json()["request_id"]
        assert listed["cut"] == (["body"] if body else [])
        assert listed["redacted"] == {"headers": ["authorization", "cookie"], "parameters": ["token"]}
        name = listed["request_id"]

        refused = dead("replay", "/app", name)
        given = ["-H", "Authorization: Bearer new", "-H", "Cookie: b=2", "--target", f"/app/{how}?token=new"]
        if body:
            assert (
                "only 65536 of the 100000 bytes of its body; give the whole with --data @FILE" in refused.err
            )
            refused = dead("replay", "/app", name, "--data", "@whole")
            given += ["--data", "@whole"]
        assert refused.code == 2
        assert "without the value of authorization, cookie; say -H 'Authorization: …'" in refused.err

        # It still kills its agent: once, and the letter stays.
        again = dead("replay", "/app", name, *given)
        assert again.code == 3
        assert re.search(r"letter \S+ stays: .* \(executed: unknown\)\n$", again.err)
        assert len((tmp_path / "runs").read_text().split()) == 4
        assert client.xlen(M.dead) == 1

        (tmp_path / "mended").touch()
        mended = dead("replay", "/app", name, *given)
        assert mended.code == 0, mended
        assert json.loads(mended.out) == {
            "size": len(body), "query": "token=new", "cookie": "b=2", "authorization": "Bearer new", "trace": "kept",
        }  # fmt: skip
        assert client.xlen(M.dead) == 0
        wait_until(lambda: client.xlen(M.requests) == 0, "nothing is left")


def test_poison_that_waits_for_an_agent_does_not_end_it(broker: Broker, tmp_path: Path) -> None:
    known(broker)
    with running_bus(broker.url) as bus, ThreadPoolExecutor() as pool, closing(broker.client()) as client:
        Registry(client, Keys()).leave(APP, "a")
        answers = [pool.submit(httpx.get, f"{bus.url}/app/kill", timeout=60) for _ in range(4)]
        wait_until(lambda: client.xlen(M.requests) == 4, "they wait")
        with poisonous(broker, tmp_path):
            assert [answer.result().status_code for answer in answers] == [502] * 4
            assert client.xlen(M.dead) == 4
            (tmp_path / "mended").touch()
            assert httpx.get(f"{bus.url}/app/kill", timeout=60).status_code == 200


def entries(client: Any, stream: str = M.dead) -> list[tuple[bytes, dict[bytes, bytes]]]:
    found: list[tuple[bytes, dict[bytes, bytes]]] = client.xrange(stream)
    return found


# What lies there


def written(broker: Broker, letter: list[Field], mount: Mount = APP) -> str:
    """A letter, written as the bury script does it; its id."""
    keys = Keys().of(mount.key)
    with closing(broker.client()) as client:
        with_group(client, keys.requests)
        entry = client.xadd(keys.requests, {"any": "thing"})
        client.xreadgroup(GROUP, "me", {keys.requests: ">"})
        args = [GROUP, entry, "me", DEAD_TTL_MS, DEAD_KEPT, LIST_TTL_MS, "", "", b"frame", *letter]
        assert run_script(client, "bury", [keys.requests, keys.dead, keys.reply("none")], args) == b"done"
        return entries(client, keys.dead)[-1][0].decode()


def with_group(client: Any, stream: str) -> None:
    if not client.exists(stream):
        client.xgroup_create(stream, GROUP, id="0", mkstream=True)


def request(**members: Any) -> Request:
    given: dict[str, Any] = {
        "id": "r1", "method": "PUT", "target": "/app/cart", "gateway": "gw", "ttl": 30_000, "attempt": 3,
        "headers": ((b"host", b"shop.example"), (b"content-length", b"3")), "body": b"tea",
    }  # fmt: skip
    return Request(**(given | members))


def given_up(broker: Broker, mount: Mount = APP, *, keep: int = 1000, **members: Any) -> str:
    return written(broker, of_request(request(**members), "it kills", at=AT, entry="1-1", keep=keep), mount)


def strange(broker: Broker, *fields: bytes) -> str:
    return written(broker, of_stranger(fields, "not ours", at=AT, entry="1-1"))


NASTY = (
    b"\x1b[2J",
    b"\xff\x00\x9b31m",
    b"body",
    b"\xdd\xff\xff\xff\xff",
    b"bidi",
    "\u202etxt".encode(),
    b"id",
    b"r2",
)


@validator
def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    status = environ.get("QUERY_STRING", "").replace("+", " ") or "200 OK"
    start_response(status, [("Content-Type", "text/plain")])
    size = int(environ.get("CONTENT_LENGTH") or 0)
    said = [environ["REQUEST_METHOD"], environ["SCRIPT_NAME"] + environ["PATH_INFO"], environ["HTTP_HOST"]]
    return [" ".join(said).encode() + b" " + environ["wsgi.input"].read(size)]


@contextmanager
def serving(broker: Broker, mount: Mount = APP) -> Iterator[None]:
    agent = InProcessAgent(AgentSettings(redis=broker.url), {mount: app}, {mount: "demo"})
    agent.start()
    try:
        yield
    finally:
        assert agent.stop(10.0)


def known(broker: Broker, mount: Mount = APP) -> None:
    with closing(broker.client()) as client:
        Registry(client, Keys()).claim(
            mount, AgentRecord(id="a", name="demo", host="h", pid=1, beat=1, state="ready")
        )


def left(broker: Broker, mount: Mount = APP) -> int:
    with closing(broker.client()) as client:
        length: Any = client.xlen(Keys().of(mount.key).dead)
        return int(length)


def test_list_shows_every_mount_the_latest_first(broker: Broker, dead: Call) -> None:
    tenants = Mount.parse("/", "*.example.com")
    first = given_up(broker, target="/app/" + "x" * 100)
    second = strange(broker, *NASTY)
    third = given_up(broker, tenants, method="GET", target="/a?token=hush", body=b"")
    outcome = dead("list")
    assert (outcome.code, outcome.err) == (0, "")
    head, *rows = [re.split(" {2,}", line) for line in outcome.out.splitlines()]
    assert head == ["MOUNT", "ID", "AGE", "METHOD", "TARGET", "BODY", "REASON"]
    ages = [row.pop(2) for row in rows]
    assert all(re.fullmatch(r"\d\.\ds", age) for age in ages)
    assert rows == [
        ["*.example.com/", third, "GET", "/a?token=(redacted)", "0", "it kills"],
        ["/app", second, "-", "-", str(sum(map(len, NASTY))), "not ours"],
        ["/app", first, "PUT", "/app/" + "x" * 54 + "…", "3", "it kills"],
    ]
    assert len(dead("list", "*.example.com/").out.splitlines()) == 2
    assert [one["id"] for one in json.loads(dead("list", "--json").out)] == [third, second, first]


def test_list_for_programs(broker: Broker, dead: Call) -> None:
    name = given_up(broker, headers=((b"cookie", b"hush"),), keep=1)
    [letter] = json.loads(dead("list", "/app", "--json").out)
    assert 0 <= letter.pop("age") < 60
    assert letter == {
        "mount": "/app", "id": name, "request_id": "r1", "method": "PUT", "target": "/app/cart",
        "reason": "it kills", "attempt": 3, "at": "2026-11-21T08:00:00+00:00", "size": 3, "cut": ["body"],
        "redacted": {"headers": ["cookie"], "parameters": []}, "ours": True,
    }  # fmt: skip


def test_list_of_nothing(broker: Broker, dead: Call) -> None:
    assert dead("list") == (0, "", "there are no dead letters\n")
    assert json.loads(dead("list", "--json").out) == []
    known(broker)
    assert dead("list", "/app") == (0, "", "there are no dead letters of /app\n")
    wrong = dead("list", "/ap")
    assert wrong.code == 2
    assert "nothing is mounted on /ap; did you mean /app?" in wrong.err
    assert "say / for the root" in dead("list", "").err


def test_list_takes_more_than_a_page(broker: Broker, dead: Call) -> None:
    name = given_up(broker)
    with closing(broker.client()) as client:
        for _ in range(250):
            client.xadd(M.dead, {"id": "r0"})
    names = [one["id"] for one in json.loads(dead("list", "--json").out)]
    assert len(names) == len(set(names)) == 251
    assert names[-1] == name
    assert names == sorted(names, key=lambda one: [int(part) for part in one.split("-")], reverse=True)


def test_show_tells_what_is_known(broker: Broker, dead: Call) -> None:
    name = given_up(
        broker,
        keep=1,
        target="/app/cart?key=hush",
        headers=((b"host", b"h"), (b"x", b"caf\xc3\xa9\x1b[2J\xff")),
    )
    outcome = dead("show", "/app", "r1")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines() == [
        "mount:    /app",
        f"letter:   {name}",
        "request:  r1",
        "reason:   it kills",
        "at:       2026-11-21T08:00:00+00:00",
        "attempt:  3",
        "gateway:  gw",
        "size:     3 bytes, 1 of them kept",
        "cut:      body",
        "",
        "PUT /app/cart?key=(redacted) HTTP/1.1",
        "host: h",
        r"x: café\x1b[2J\xff",
    ]
    assert dead("show", "/app", name, "--body").out == "t"
    shown = json.loads(dead("show", "/app", name, "--json").out)
    assert shown["headers"] == [["host", "h"], ["x", "café\x1b[2J\\xff"]]
    assert (shown["id"], shown["fields"]) == (name, [])


def test_show_of_a_stranger_does_not_steer_the_terminal(broker: Broker, dead: Call) -> None:
    name = strange(broker, *NASTY)
    outcome = dead("show", "/app", name)
    assert outcome.code == 0
    _, _, fields = outcome.out.partition("not a request of ours; its fields:\n")
    assert fields.splitlines() == [
        r"  \x1b[2J = \xff\x00\x9b31m", r"  body = \xdd\xff\xff\xff\xff", r"  bidi = \u202etxt", "  id = r2",
    ]  # fmt: skip
    assert json.loads(dead("show", "/app", name, "--json").out)["fields"][3] == ["id", "r2"]
    body = dead("show", "/app", name, "--body")
    assert (body.code, body.out) == (2, "")
    assert "is not a request of ours, so it has no body" in body.err


def test_what_somebody_else_wrote_there_is_shown(broker: Broker, dead: Call) -> None:
    with closing(broker.client()) as client:
        client.xadd(M.dead, {"hello": "world"})
        client.xadd(
            M.dead, {"id": "\x1b", "head": b"\x91" * 9000, "body": b"\xc6\xff\xff\xff\xff", "size": "x" * 99}
        )
        client.pexpire(M.dead, 60_000)
    assert len(dead("list").out.splitlines()) == 3
    [second, first] = json.loads(dead("list", "--json").out)
    assert "hello = world" in dead("show", "/app", first["id"]).out
    assert r"request:  \x1b" in dead("show", "/app", second["id"]).out


@pytest.mark.parametrize("command", [("show",), ("replay",), ("drop",)])
def test_an_id_that_is_not_there(broker: Broker, dead: Call, command: tuple[str]) -> None:
    given_up(broker)
    wrong = dead(*command, "/app", "1-1")
    assert wrong.code == 2
    assert "/app has no dead letter 1-1; flaskbus dead list /app shows what is there" in wrong.err
    unknown = dead(*command, "/ap", "1-1")
    assert (unknown.code, "nothing is mounted on /ap" in unknown.err) == (2, True)
    assert left(broker) == 1


# Replay


def test_replay_sends_a_new_request_and_removes_the_letter(broker: Broker, dead: Call) -> None:
    name = given_up(broker)
    with serving(broker):
        assert dead("replay", "/app", name) == (0, "PUT /app/cart shop.example tea", "")
    assert left(broker) == 0


def test_replay_goes_to_the_mount_of_the_letters_host(broker: Broker, dead: Call) -> None:
    tenants = Mount.parse("/", "*.example.com")
    name = given_up(broker, tenants, headers=((b"host", b"a.example.com"),), method="GET", body=b"")
    with serving(broker, tenants), serving(broker):
        assert dead("replay", "*.example.com/", name, "-i").out.endswith("GET /app/cart a.example.com ")
    assert left(broker, tenants) == 0


@pytest.mark.parametrize(("status", "code"), [("404+Not+Found", 1), ("500+Oops", 1), ("302+Found", 0)])
def test_any_answer_of_the_app_ends_the_letter(broker: Broker, dead: Call, status: str, code: int) -> None:
    name = given_up(broker, target=f"/app/cart?{status}")
    with serving(broker):
        assert dead("replay", "/app", name, "--keep").code == code
        assert left(broker) == 1
        outcome = dead("replay", "/app", name, "--include", "--data", "coffee")
    assert outcome.code == code
    assert outcome.out.startswith(f"HTTP/1.1 {status[:3]} ")
    assert outcome.out.endswith(" coffee")
    assert left(broker) == 0


def test_no_answer_keeps_the_letter(broker: Broker, dead: Call) -> None:
    name = given_up(broker)
    unknown = dead("replay", "/app", name)
    assert unknown.code == 3
    assert "no app is mounted on /app now, so 1 dead letter stayed" in unknown.err
    elsewhere = dead("replay", "/app", name, "--target", "/elsewhere")
    assert elsewhere.code == 3
    assert f"letter {name} stays: Nothing is mounted here: " in elsewhere.err
    known(broker)
    late = dead("replay", "/app", name, "--timeout", "100ms")
    assert (late.code, "(executed: no)" in late.err) == (3, True)
    assert left(broker) == 1


def test_replay_of_all_stops_where_the_bus_brings_no_answer(broker: Broker, dead: Call) -> None:
    for number in range(3):
        given_up(broker, id=f"r{number}")
    known(broker)
    outcome = dead("replay", "/app", "--all", "--timeout", "100ms")
    assert outcome.code == 3
    assert outcome.err.endswith("(executed: no); 2 more not sent\n")
    assert left(broker) == 3


def test_replay_of_all_is_a_line_each_and_leaves_what_is_not_whole(broker: Broker, dead: Call) -> None:
    first = given_up(broker, id="r1")
    secret = given_up(broker, id="r2", headers=((b"host", b"h"), (b"cookie", b"hush")))
    stranger = strange(broker, *NASTY)
    cut = given_up(broker, id="r3", keep=0)
    last = given_up(broker, id="r4", target="/app/cart?404+No")
    with serving(broker):
        outcome = dead("replay", "/app", "--all")
        assert outcome.out.splitlines() == [
            f"{first}  PUT /app/cart  200  30 bytes",
            f"{last}  PUT /app/cart?404+No  404  30 bytes",
        ]
        assert outcome.code == 1
        assert [line.split()[4] for line in outcome.err.splitlines()] == [secret, stranger, cut]
        assert left(broker) == 3
        again = dead("replay", "/app", secret, cut, "--without-credentials", "--data", "x")
        assert (again.code, len(again.out.splitlines())) == (0, 2)
    assert left(broker) == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "say which letters: one or more IDs, or --all"),
        (("r1", "--all"), "say which letters"),
        (("r1", "-H", "no header"), "is not a header"),
        (("r1", "--data", "@nowhere"), "No such file"),
        (("r1", "--timeout", "soon"), "must be a duration"),
        (("r1", "--target", "cart"), "--target cart has to begin with a slash; did you mean /cart?"),
        (("r1", "--target", ""), "has to begin with a slash"),
    ],
)
def test_replay_wrongly_used(broker: Broker, dead: Call, args: tuple[str, ...], said: str) -> None:
    given_up(broker)
    outcome = dead("replay", "/app", *args)
    assert (outcome.code, outcome.out) == (2, "")
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert left(broker) == 1


# Drop


def test_drop(broker: Broker, dead: Call) -> None:
    names = [given_up(broker, id=f"r{number}") for number in range(4)]
    assert dead("drop", "/app", names[0], names[0], "r1") == (0, "2 dead letters dropped\n", "")
    assert [one["id"] for one in json.loads(dead("list", "--json").out)] == names[:1:-1]
    wrong = dead("drop", "/app", names[2], "r9")
    assert (wrong.code, left(broker)) == (2, 2)
    no = dead("drop", "/app", "--all", stdin=b"n\n")
    assert "Drop 2 dead letters of /app? [y/N]" in no.out + no.err
    assert (no.code, left(broker)) == (1, 2)
    nobody = dead("drop", "/app", "--all")
    assert (nobody.code, left(broker)) == (2, 2)
    assert "nobody is here to be asked; say --yes" in nobody.err
    assert dead("drop", "/app", "--all", stdin=b"y\n").code == 0
    assert left(broker) == 0
    known(broker)
    assert dead("drop", "/app", "--all") == (
        0,
        "0 dead letters dropped\n",
        "there are no dead letters of /app\n",
    )
    assert dead("drop", "/app").code == 2


def test_letters_outlive_their_mount(broker: Broker, dead: Call) -> None:
    name = given_up(broker)
    with closing(broker.client()) as client:
        client.delete(M.requests)
    assert name in dead("list").out
    assert name in dead("show", "/app", name).out
    with serving(broker, Mount.parse("/")):  # whom they were not for
        outcome = dead("replay", "/app", name)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (3, "", 1)
    assert "no app is mounted on /app now" in outcome.err
    assert left(broker) == 1
    assert dead("drop", "/app", "--all", "--yes").code == 0


# Life, and who may look


def test_a_letter_lives_no_longer_because_others_come(broker: Broker) -> None:
    with closing(broker.client()) as client:
        seconds: Any = client.time()[0]
        old, young = (f"{(seconds * 1000 - DEAD_TTL_MS) + offset}-0" for offset in (-60_000, 60_000))
        for name in (old, young):
            client.xadd(M.dead, {"id": "r0"}, id=name)
        newest = given_up(broker)
        assert [key.decode() for key, _ in entries(client)] == [young, newest]
        assert 0 < client.pttl(M.dead) <= DEAD_TTL_MS


def test_a_strangers_entry_of_any_size_becomes_a_small_letter(broker: Broker, dead: Call) -> None:
    with serving(broker), closing(broker.client()) as client:
        client.xadd(
            M.requests, {b"x" * 100_000: b"y" * 1_000_000, b"Cookie": b"hush", b"data": b"Cookie: hush"}
        )
        client.xadd(M.requests, {f"field{number}": "x" * 100 for number in range(20_000)})
        wait_until(lambda: client.xlen(M.dead) == 2, "both are letters")
        for _, letter in entries(client):
            assert max(map(len, letter.values())) <= DEAD_FIELD
            assert sum(map(len, [*letter, *letter.values()])) < 40_000
            assert not any(b"hush" in value for value in letter.values())
        assert (client.xlen(M.requests), len(dead("list").out.splitlines())) == (0, 3)


@contextmanager
def user(broker: Broker, *rules: str) -> Iterator[str]:
    with closing(broker.client()) as client:
        client.execute_command("ACL", "SETUSER", "guest", "on", ">right", *rules)  # type: ignore[no-untyped-call]
        try:
            yield broker.url.replace("//", "//guest:right@")
        finally:
            client.acl_deluser("guest")


def test_a_user_of_one_mount_sees_its_letters_and_no_others(broker: Broker, dead: Call) -> None:
    name = given_up(broker)
    given_up(broker, Mount.parse("/other"))
    with user(broker, "~flaskbus:{/app}:*", "+@all", "-scan") as url:
        assert name in dead("list", "--redis", url, "/app").out
        assert "PUT /app/cart" in dead("show", "--redis", url, "/app", name).out
        for args in (
            ("list", "/other"),
            ("list",),
            ("show", "/other", "r1"),
            ("drop", "/other", "--all", "--yes"),
        ):
            refused = dead(args[0], "--redis", url, *args[1:])
            assert (refused.code, refused.out) == (3, "")
            assert "does not allow its user this" in refused.err
            assert refused.err.count("\n") == 1
        assert dead("drop", "--redis", url, "/app", "--all", "--yes").code == 0
        assert dead("list", "--redis", url, "/app") == (0, "", "there are no dead letters of /app\n")
    assert left(broker, Mount.parse("/other")) == 1
