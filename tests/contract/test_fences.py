"""What the rules of ``flaskbus acl`` fence in, and what is said to who lacks a right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from flaskbus import wire
from flaskbus.acl import command_line, mend, rules
from flaskbus.broker import connect
from flaskbus.keys import GROUP
from flaskbus.messages import Request
from flaskbus.registry import AgentRecord, Registry
from flaskbus.routing import Mount
from tests.conftest import Broker
from tests.contract.behaviours import IDLE, SHOP, Site
from tests.contract.fences import KEYS, PASSWORD, fenced, flaskbus, give, url_of
from tests.integration.fleet import Program, eventually

__all__ = ["fenced"]

MINE = KEYS.of("/shop")
OTHERS = ("/shopping", "/shop/cart", "/", "/sho", "shop.example.com/shop", ".example.com/")


@pytest.fixture
def admin(fenced: Broker) -> Iterator[Any]:
    """Of a broker that is empty."""
    with connect(url_of(fenced, "admin")) as client:
        client.flushall()
        yield client
        client.flushall()


@pytest.fixture
def hostile(fenced: Broker, admin: Any) -> Iterator[Any]:
    """Whoever got hold of the password of an agent of ``/shop``."""
    with connect(url_of(fenced, "flaskbus-agent-shop")) as client:
        yield client


class TestTheLine:
    """What ``flaskbus acl`` prints is what is tested here, and redis-cli understands it."""

    @pytest.mark.parametrize(
        "words", [("gateway",), ("tools",), ("agent", "/shop"), ("agent", "/a'b$c`(d)", "*.example.com/")]
    )
    def test_as_printed(self, fenced: Broker, admin: Any, words: tuple[str, ...]) -> None:
        line = flaskbus(fenced.url, "acl", *words, "--user", "printed").stdout
        mounts = [Mount.from_name(word) for word in words[1:]]
        assert line.rstrip("\n") == command_line("printed", rules(words[0], mounts))  # type: ignore[arg-type]
        flaskbus(url_of(fenced, "admin"), "redis", stdin=line)
        typed = acl(admin, "printed")
        admin.execute_command("ACL", "SETUSER", "given", *rules(words[0], mounts))  # type: ignore[arg-type]
        assert typed == acl(admin, "given")
        # A second time nothing changes.
        flaskbus(url_of(fenced, "admin"), "redis", stdin=line)
        assert acl(admin, "printed") == typed

    def test_passwords_stay(self, admin: Any) -> None:
        admin.execute_command("ACL", "SETUSER", "kept", ">secret", *rules("tools"))
        admin.execute_command("ACL", "SETUSER", "kept", *rules("agent", [SHOP]))
        assert len(dict_of(admin.execute_command("ACL", "GETUSER", "kept"))["passwords"]) == 1
        assert acl(admin, "kept") == acl(admin, "flaskbus-agent-shop")

    @pytest.mark.parametrize("db", [0, 3])
    def test_the_database_of_the_url_and_no_other(self, fenced: Broker, admin: Any, db: int) -> None:
        admin.execute_command("ACL", "SETUSER", "based", f">{PASSWORD}", *rules("agent", [SHOP], db=db))
        for other in (0, 3, 4):
            with connect(url_of(fenced, "based").removesuffix("0") + str(other)) as client:
                if other in (0, db):  # every connection begins in the first
                    assert client.exists(MINE.requests) == 0
                else:
                    with pytest.raises(redis.exceptions.NoPermissionError):
                        client.exists(MINE.requests)


def dict_of(flat: Any) -> dict[str, Any]:
    if isinstance(flat, dict):
        return {text(key): value for key, value in flat.items()}
    return {text(name): value for name, value in zip(flat[::2], flat[1::2], strict=True)}


def text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def acl(admin: Any, user: str) -> str:
    """What ``ACL LIST`` says of a user, without its passwords."""
    (line,) = [text(each) for each in admin.execute_command("ACL", "LIST") if text(each).split()[1] == user]
    return " ".join(word for word in line.split()[2:] if not word.startswith("#"))


# Nothing of another mount


SESSION = frozenset(
    {
        # No key is named, nothing is told of others, and nothing of theirs changes.
        "asking", "auth", "discard", "exec", "hello", "multi", "ping", "quit", "readonly", "readwrite", "reset",
        "time", "unsubscribe", "unwatch",
    }
)  # fmt: skip


def refused(client: Any, *words: Any) -> bool:
    """Whether a command is refused for want of a right."""
    try:
        client.execute_command(*words)
    except redis.exceptions.NoPermissionError:
        return True
    except redis.exceptions.ResponseError as error:
        return bool(mend(str(error), ()))
    return False


class TestHostileAgents:
    @pytest.mark.parametrize("mount", OTHERS)
    def test_every_command_over_a_key_of_another_mount(self, hostile: Any, admin: Any, mount: str) -> None:
        key = KEYS.of(mount).requests
        admin.xgroup_create(key, GROUP, id="0", mkstream=True)
        before = admin.dump(key)
        assert [words for words in spoken(key) if not refused(hostile, *words)] == []
        assert admin.dump(key) == before
        assert admin.keys() == [key.encode()]

    def test_every_command_that_the_engine_has(self, fenced: Broker, hostile: Any, admin: Any) -> None:
        """Also those that nobody has thought of: each is refused, or is one of a short list."""
        key = KEYS.of("/shopping").requests
        admin.rpush(key, "x")
        allowed = set()
        for name, arity in commands(admin):
            words = [*name.split("|"), *[key] * (abs(arity) - len(name.split("|")))]
            verdict = text(admin.execute_command("ACL", "DRYRUN", "flaskbus-agent-shop", *words))
            if verdict == "OK":
                allowed.add(name)
        keyless = {"client|id", "client|setname", "script|load", "script|exists", "evalsha", "multi", "exec"}
        # Of these the words above name no key that the engine would find; test_every_command_over_… names them.
        moving = {"blmpop", "lmpop", "msetex", "sintercard", "xread", "xreadgroup"}
        helping = {name for name in allowed if name.endswith("|help")}
        assert allowed - SESSION - keyless - moving - helping == set()

    @pytest.mark.parametrize("keys", [[], [MINE.requests], [KEYS.mounts]])
    @pytest.mark.parametrize("mount", OTHERS)
    def test_scripts_have_no_more_rights_than_who_runs_them(
        self, hostile: Any, admin: Any, keys: list[str], mount: str
    ) -> None:
        key = KEYS.of(mount).owner
        admin.hset(key, "name", "other")
        for call in ("'HGET', '%s', 'name'", "'DEL', '%s'", "'HSET', '%s', 'name', 'mine'"):
            sha = hostile.script_load(f"return redis.call({call % key})")
            assert refused(hostile, "EVALSHA", sha, len(keys), *keys), call
        assert admin.hget(key, "name") == b"other"

    def test_the_bus_itself(self, hostile: Any, admin: Any) -> None:
        """Of what all mounts share an agent can add to the list of names, and ring."""
        admin.sadd(KEYS.mounts, "/shopping")
        admin.hset(KEYS.gateways, "gw", "{}")
        hostile.sadd(KEYS.mounts, "/shop")
        hostile.publish(KEYS.news, "/shop")
        shared: list[tuple[Any, ...]] = [
            ("SMEMBERS", KEYS.mounts),
            ("SREM", KEYS.mounts, "/shopping"),
            ("SPOP", KEYS.mounts),
            ("DEL", KEYS.mounts),
            ("EXPIRE", KEYS.mounts, 1),
            ("SINTERSTORE", KEYS.mounts, MINE.agents),
            ("SINTERSTORE", MINE.agents, KEYS.mounts),
            ("HGETALL", KEYS.gateways),
            ("HDEL", KEYS.gateways, "gw"),
            ("SUBSCRIBE", KEYS.news),
            ("PSUBSCRIBE", "*"),
            ("PUBLISH", "other-bus:news", "x"),
            ("PUBLISH", KEYS.of("/shopping").doorbell("agent"), "x"),
            ("SUBSCRIBE", KEYS.of("/shopping").doorbell("agent")),
            ("SADD", "flaskbus2:mounts", "/shop"),
            ("KEYS", "*"),
            ("SCAN", 0),
            ("RANDOMKEY",),
            ("DBSIZE",),
            ("FLUSHALL",),
            ("FLUSHDB",),
            ("SWAPDB", 0, 1),
            ("SELECT", 1),
            ("CONFIG", "GET", "*"),
            ("INFO",),
            ("MONITOR",),
            ("CLIENT", "LIST"),
            ("CLIENT", "KILL", "TYPE", "normal"),
            ("CLIENT", "PAUSE", 1),
            ("CLIENT", "UNBLOCK", 1),
            ("EVAL", "return 1", 0),
            ("SCRIPT", "FLUSH"),
            ("SCRIPT", "KILL"),
            ("FUNCTION", "LOAD", "x"),
            ("ACL", "LIST"),
            ("ACL", "SETUSER", "x"),
            ("SHUTDOWN",),
            ("SAVE",),
            ("MODULE", "LIST"),
            ("REPLICAOF", "h", 1),
            ("SLOWLOG", "GET"),
            ("PUBSUB", "CHANNELS"),
        ]
        assert [words for words in shared if not refused(hostile, *words)] == []
        assert admin.smembers(KEYS.mounts) == {b"/shop", b"/shopping"}
        assert admin.hgetall(KEYS.gateways) == {b"gw": b"{}"}

    def test_its_own_mount_is_its_own(self, hostile: Any) -> None:
        hostile.xgroup_create(MINE.requests, GROUP, id="0", mkstream=True)
        hostile.xadd(MINE.requests, {"x": "y"})
        hostile.rpush(MINE.reply("r1"), "frame")
        hostile.publish(MINE.doorbell("gw"), "r1")
        assert hostile.delete(MINE.requests, MINE.reply("r1")) == 2

    @pytest.mark.slow
    def test_what_it_writes_stops_no_gateway(self, fenced: Broker, tmp_path: Path) -> None:
        """A gateway serves others too, whatever lies under the keys of a mount."""
        site = Site(
            tmp_path,
            admin_url=url_of(fenced, "admin"),
            gateway_url=url_of(fenced, "flaskbus-gateway"),
            agent_url=url_of(fenced, "flaskbus-agent-shop"),
        )
        mounts = [Mount.parse(f"/evil{number}") for number in range(40)]
        with site.running(), connect(url_of(fenced, "admin")) as admin:
            give(admin, "evil", "agent", *mounts)
            with connect(url_of(fenced, "evil")) as client:
                registry = Registry(client, KEYS)
                for number, mount in enumerate(mounts):
                    registry.claim(mount, RECORD)
                    wrongs = mischief(client, KEYS.of(mount.key))
                    wrongs[number % len(wrongs)]()
                assert len(mounts) >= len(wrongs)
                for name in ("-" + SHOP.key, b"\xff", "-", SHOP.key):
                    client.publish(KEYS.news, name)
                looks(site)
                assert httpx.get(f"{site.url}/shop/quick").text == "quick"
                # It still learns of others.
                Registry(admin, KEYS).claim(IDLE, replace(RECORD, name="idle"))
                eventually(lambda: httpx.get(f"{site.url}/idle/x", timeout=20).status_code == 503)
            log = site.gateway.log()
            assert "Traceback" not in log
            assert "Logging error" not in log
            for mount in (*mounts, IDLE):
                keys = KEYS.of(mount.key)
                admin.delete(keys.agents, keys.owner, keys.requests, keys.dead)
            eventually(lambda: admin.smembers(KEYS.mounts) == {SHOP.key.encode()}, "the others are forgotten")
            assert httpx.get(f"{site.url}/shop/quick").text == "quick"


RECORD = AgentRecord(id="evil", name="evil", host="h", pid=1, beat=1, state="ready")


def looks(site: Site) -> None:
    """Wait until the gateway has looked at the registry twice more."""

    def beat() -> int:
        (record,) = Registry(site.client, KEYS).gateways().values()
        return int(record["beat"])

    seen = beat()
    eventually(lambda: beat() > seen + 1, "the gateway looks at the registry")


def mischief(client: Any, keys: Any) -> list[Callable[[], Any]]:
    def record(**members: Any) -> Callable[[], Any]:
        flat = {**json.loads(RECORD.dump()), **members}
        return lambda: client.hset(keys.agents, "evil", json.dumps(flat))

    wrong: tuple[Any, ...] = ([], {}, None)

    def group(name: bytes) -> None:
        client.xadd(keys.requests, {"id": "x", "from": b"\xff", "attempt": "9" * 30})
        client.xreadgroup(GROUP, name, {keys.requests: ">"})

    return [
        *(record(**{name: value}) for name in ("beat", "lease", "id", "state", "signing") for value in wrong),
        record(lease="soon"),
        record(lease=float("nan"), beat=10**400),
        record(id="\ud800", state="failed", reason="x" * 100_000),
        lambda: client.hset(keys.agents, "evil", "[" * 100_000),
        lambda: client.hset(keys.agents, b"\xff", b"\xff"),
        lambda: (client.delete(keys.agents), client.set(keys.agents, "x")),
        lambda: (client.delete(keys.owner), client.set(keys.owner, "x")),
        lambda: client.hset(keys.owner, mapping={"name": b"\xff", "idempotency_ttl": "x"}),
        lambda: client.hset(
            keys.owner, mapping={"idempotency_ttl": "9" * 400, "idempotency_identity": b"\xff,"}
        ),
        lambda: (client.delete(keys.requests), client.set(keys.requests, "x")),
        lambda: client.xgroup_destroy(keys.requests, GROUP),
        lambda: group(b"\xff\xfe"),
        lambda: group(b"evil"),
        lambda: client.xadd(
            keys.requests, {b"\xff": b"\xff"}, id="18446744073709551615-18446744073709551615"
        ),
    ]


def spoken(key: str) -> list[tuple[Any, ...]]:
    """Each command that names keys, in the forms that name this one."""
    mine = MINE.agents
    forms = f"""
    GET K|SET K v|GETSET K v|GETDEL K|GETEX K|SETNX K v|SETEX K 9 v|PSETEX K 9 v|MGET M K|MSET M v K v|MSETNX M v K v
    APPEND K v|STRLEN K|INCR K|DECR K|INCRBY K 1|DECRBY K 1|INCRBYFLOAT K 1|GETRANGE K 0 1|SETRANGE K 0 v|SUBSTR K 0 1
    LCS M K|SETBIT K 0 1|GETBIT K 0|BITCOUNT K|BITPOS K 1|BITOP NOT M K|BITOP NOT K M|BITFIELD K GET u8 0
    BITFIELD_RO K GET u8 0|PFADD K v|PFCOUNT K|PFMERGE M K|PFMERGE K M
    HSET K f v|HSETNX K f v|HMSET K f v|HGET K f|HMGET K f|HGETALL K|HKEYS K|HVALS K|HLEN K|HDEL K f|HEXISTS K f
    HINCRBY K f 1|HINCRBYFLOAT K f 1|HSCAN K 0|HRANDFIELD K|HSTRLEN K f
    LPUSH K v|RPUSH K v|LPUSHX K v|RPUSHX K v|LPOP K|RPOP K|LLEN K|LRANGE K 0 -1|LINDEX K 0|LINSERT K BEFORE a b
    LSET K 0 v|LREM K 0 v|LTRIM K 0 0|LPOS K v|LMOVE K M LEFT LEFT|LMOVE M K LEFT LEFT|RPOPLPUSH K M|RPOPLPUSH M K
    BLPOP K 1|BRPOP K 1|BLPOP M K 1|BLMOVE K M LEFT LEFT 1|BRPOPLPUSH M K 1|LMPOP 1 K LEFT|LMPOP 2 M K LEFT
    BLMPOP 1 1 K LEFT
    SADD K v|SREM K v|SMEMBERS K|SISMEMBER K v|SMISMEMBER K v|SCARD K|SPOP K|SRANDMEMBER K|SSCAN K 0|SMOVE K M v
    SMOVE M K v|SINTER M K|SINTERCARD 2 M K|SINTERSTORE M K|SINTERSTORE K M|SUNION M K|SUNIONSTORE M K|SUNIONSTORE K M
    SDIFF M K|SDIFFSTORE M K|SDIFFSTORE K M
    GEOSEARCHSTORE M K FROMLONLAT 0 0 BYRADIUS 1 m
    ZADD K 1 v|ZRANGE K 0 1|ZREM K v|ZCARD K|ZUNIONSTORE M 1 K|ZRANGESTORE M K 0 1|GEOADD K 1 1 v
    SORT K|SORT M GET K|SORT_RO K|SORT M STORE K
    XADD K * f v|XLEN K|XRANGE K - +|XREVRANGE K + -|XDEL K 1-1|XTRIM K MAXLEN 0|XREAD STREAMS K 0|XREAD STREAMS M K 0 0
    XGROUP CREATE K g 0|XGROUP DESTROY K agents|XGROUP SETID K agents 0|XGROUP CREATECONSUMER K agents c
    XGROUP DELCONSUMER K agents c|XREADGROUP GROUP agents c STREAMS K >|XREADGROUP GROUP agents c STREAMS M K > >
    XACK K agents 1-1|XPENDING K agents|XCLAIM K agents c 0 1-1|XAUTOCLAIM K agents c 0 0|XINFO STREAM K|XINFO GROUPS K
    XINFO CONSUMERS K agents|XSETID K 1-1
    DEL K|DEL M K|UNLINK K|EXISTS K|EXISTS M K|TYPE K|TTL K|PTTL K|EXPIRE K 1|PEXPIRE K 1|EXPIREAT K 1|PERSIST K
    EXPIRETIME K|RENAME K M|RENAME M K|RENAMENX M K|COPY K M|COPY M K|MOVE K 1|DUMP K|RESTORE K 0 v|TOUCH K|WATCH K
    OBJECT ENCODING K|MEMORY USAGE K|MIGRATE h 1 K 0 1|EVALSHA {"0" * 40} 1 K|EVALSHA {"0" * 40} 2 M K|EVAL x 1 K
    """
    return [
        tuple({"K": key, "M": mine}.get(word, word) for word in form.split())
        for line in forms.split("\n")
        for form in line.split("|")
        if form.split()
    ]


def commands(admin: Any) -> Iterator[tuple[str, int]]:
    """Name (``xinfo|stream``) and arity of everything that this engine knows."""
    connection = admin.connection_pool.get_connection()
    try:
        connection.send_command("COMMAND")
        found = connection.read_response()
    finally:
        admin.connection_pool.release(connection)
    for command in found:
        children = command[9] if len(command) > 9 else []
        if not children:
            yield text(command[0]), int(command[1])
        for child in children:
            yield text(child[0]), int(child[1])


# Whoever lacks something is told


class TestWhatIsMissing:
    @pytest.fixture
    def start(self, fenced: Broker, admin: Any, tmp_path: Path) -> Iterator[Callable[..., Program]]:
        """Start an agent of ``/shop`` whose user lacks one thing."""
        programs: list[Program] = []
        (tmp_path / "tiny.py").write_text(
            "def app(environ, start):\n    start('200 OK', [])\n    return [b'']\n"
        )

        def begin(*less: str) -> Program:
            give(admin, "lacking", "agent", SHOP)
            admin.script_flush()
            admin.execute_command("ACL", "SETUSER", "lacking", *less)
            program = Program(
                tmp_path / "agent.log", "flaskbus_agent", "tiny:app=/shop", "--lease=1",
                FLASKBUS_REDIS_URL=url_of(fenced, "lacking"),
            )  # fmt: skip
            programs.append(program)
            return program

        yield begin
        for program in programs:
            if program.process.poll() is None:
                program.kill()

    @pytest.mark.parametrize(
        ("less", "words"),
        [
            (("-evalsha",), "claim.lua"),
            (("-script|load",), "script"),
            (("-hset",), "claim.lua"),
            (("clearselectors",), "flaskbus:mounts"),
            (("resetkeys", "~other:*"), "/shop"),
        ],
    )
    def test_at_the_start(self, start: Callable[..., Program], less: tuple[str, ...], words: str) -> None:
        agent = start(*less)
        assert agent.process.wait(30) == 3
        (line,) = [line for line in agent.log().splitlines() if "flaskbus acl agent /shop" in line]
        assert words in line
        assert "Traceback" not in agent.log()

    @pytest.mark.parametrize(
        ("less", "words"),
        [
            (("-xreadgroup",), "xreadgroup"),
            (("-subscribe",), "subscribe"),
            (("-rpush",), "the reply to r1"),
        ],
    )
    def test_while_it_serves(
        self, fenced: Broker, admin: Any, start: Callable[..., Program], less: tuple[str, ...], words: str
    ) -> None:
        agent = start(*less)
        eventually(lambda: "is ready" in agent.log(), "the agent")
        if less == ("-rpush",):
            fields = wire.encode_request(
                Request("r1", "GET", "/shop/", "gw", 9000, headers=((b"host", b"h"),))
            )
            admin.xadd(MINE.requests, dict(zip(fields[::2], fields[1::2], strict=True)))
        eventually(lambda: "flaskbus acl agent /shop" in agent.log(), "it says what it lacks")
        (line,) = [line for line in agent.log().splitlines() if "flaskbus acl agent /shop" in line]
        assert words in line.lower()
        agent.kill()
        assert "Traceback" not in agent.log()


class TestPasswords:
    def test_every_character(self, fenced: Broker, admin: Any) -> None:
        with connect(url_of(fenced, "flaskbus-gateway")) as client:
            assert client.ping()

    def test_a_wrong_one_is_one_line_that_does_not_show_it(self, fenced: Broker, tmp_path: Path) -> None:
        url = url_of(fenced, "flaskbus-agent-shop", "wr@ng/one")
        (tmp_path / "tiny.py").write_text("def app(environ, start): ...\n")
        agent = Program(tmp_path / "agent.log", "flaskbus_agent", "tiny:app=/shop", FLASKBUS_REDIS_URL=url)
        gateway = Program(tmp_path / "gateway.log", "flaskbus_gateway", "--port=0", FLASKBUS_REDIS_URL=url)
        for program in (agent, gateway):
            assert program.process.wait(30) == 3, program.log()
            assert "refuses the user name or password" in program.log()
            assert "Traceback" not in program.log()
            assert "wr@ng" not in program.log()
            assert "wr%40ng" not in program.log()
