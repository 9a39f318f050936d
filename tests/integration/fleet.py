"""Gateways and agents in processes of their own, under a load that knows what became of every request.

The app writes each run into a ledger outside the broker; the load keeps what each client saw. Together they
tell what was lost, what ran twice, and whether ``executed: "no"`` was true.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from flaskbus.broker import connect
from flaskbus.keys import Keys
from flaskbus.registry import AgentRecord, Registry
from flaskbus.routing import Mount
from tests.conftest import free_port
from tests.integration.procs import alive, descendants

APP = """
import os, time, wsgiref.validate
import flask

app = flask.Flask(__name__)
app.wsgi_app = wsgiref.validate.validator(app.wsgi_app)
ledger = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

@app.route("/<token>", methods=["GET", "POST"])
def run(token):
    os.write(ledger, f"{token}\\n".encode())
    time.sleep(0.003)
    return f"{token} {os.environ['AGENT']} {os.getpid()}"
"""

MOUNT = Mount.parse("/fleet")
LEASE = 2.0


def eventually(condition: Callable[[], Any], what: str = "", seconds: float = 30.0) -> Any:
    """The first true value of a condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what or condition}"
        time.sleep(0.02)
    return value


def whole_lines(path: Path) -> list[str]:
    """What others append to a file, but for a last line of which only a part is there yet."""
    return path.read_text().split("\n")[:-1]


class Program:
    """One of the commands, in a session of its own; ``inside`` is what it is started with."""

    def __init__(
        self, log: Path, module: str, *options: str, inside: Sequence[str] = (), **environ: str
    ) -> None:
        self.log_file = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*inside, sys.executable, "-m", module, *options],
                cwd=log.parent,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environ},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        return self.log_file.read_text()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def workers(self) -> list[int]:
        return alive(descendants(self.pid))

    def end(self, seconds: float = 30.0) -> None:
        """TERM, and wait; it must end by itself and in good order."""
        self.signal(signal.SIGTERM)
        assert self.process.wait(seconds) == 0, self.log()

    def kill(self) -> None:
        family = [self.pid, *self.workers()]
        for pid in alive(family):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Fleet:
    """A context manager that kills whatever is still running at its end."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self.url = url
        self.ledger = directory / "ledger"
        self.ledger.touch()
        (directory / "ledgered.py").write_text(APP)
        self.programs: list[Program] = []
        self.registry = Registry(connect(url), Keys())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.registry.client.close()
        for program in self.programs:
            if program.process.poll() is None:
                program.kill()
            print(f"--- {program.log_file.name}\n{program.log()}")  # shown where a test fails

    def start(self, name: str, module: str, *options: str, **more: Any) -> Program:
        log = self.directory / f"{len(self.programs)}-{name}.log"
        more.setdefault("FLASKBUS_REDIS_URL", self.url)
        program = Program(
            log, module, "--lease", str(LEASE), *options, LEDGER=str(self.ledger), AGENT=name, **more
        )
        self.programs.append(program)
        return program

    def gateway(self, *options: str, port: int = 0, **more: Any) -> tuple[Program, str]:
        """A gateway that accepts connections and has a worker, and its URL."""
        port = port or free_port()
        gateway = self.start("gateway", "flaskbus_gateway", "--port", str(port), *options, **more)

        def serves() -> bool:
            return "listening on" in gateway.log() and bool(gateway.workers())

        eventually(lambda: serves() or gateway.process.poll() is not None, "gateway")
        assert gateway.process.poll() is None, gateway.log()
        return gateway, f"http://127.0.0.1:{port}"

    def agent(self, name: str, *options: str, **more: Any) -> Program:
        """An agent whose workers are ready."""
        agent = self.start(name, "flaskbus_agent", "ledgered:app=/fleet", *options, **more)
        eventually(lambda: self.ready(agent) or agent.process.poll() is not None, f"agent {name}")
        assert agent.process.poll() is None, agent.log()
        return agent

    def records(self) -> list[AgentRecord]:
        return self.registry.agents(MOUNT)

    def ready(self, agent: Program) -> list[int]:
        """Process ids of an agent's workers that are ready."""
        records = self.records()
        return [each.pid for each in records if each.supervisor == agent.pid and each.state == "ready"]

    def runs(self) -> Counter[str]:
        """How often each token was run."""
        return Counter(self.ledger.read_text().split())

    def at_rest(self, *, lists: int = 0) -> None:
        """Nothing is left of any request, but at most so many reply lists, which expire by themselves."""
        client: Any = self.registry.client
        keys = Keys().of(MOUNT.key)

        def left() -> tuple[list[bytes], list[bytes]]:
            return client.xrange(keys.requests), list(client.scan_iter("*:reply:*"))

        def rested() -> bool:
            entries, found = left()
            return not entries and len(found) <= lists and all(client.ttl(key) > 0 for key in found)

        try:
            eventually(rested, "the broker is at rest")
        except AssertionError as error:
            error.add_note(f"left: {left()}")
            raise


@dataclass(frozen=True)
class Seen:
    """What a client saw of one request; ``status`` 0 is a connection that broke."""

    token: str
    method: str
    sent: float
    ended: float
    status: int
    text: str
    executed: str

    @property
    def agent(self) -> str:
        return self.text.split()[1] if self.status == 200 else ""

    @property
    def worker(self) -> int:
        return int(self.text.split()[2]) if self.status == 200 else 0


@dataclass
class Load:
    """Threads that send one request after the other until the ``with`` block ends.

    ``urls`` are gateways: a client whose connection is refused, and only then, turns to the next. With
    ``keep`` a client keeps its connection, otherwise each request has its own.
    """

    urls: Sequence[str]
    threads: int = 6
    methods: Sequence[str] = ("POST",)
    keep: bool = True
    uds: str | None = None
    mount: str = "/fleet"
    prefix: str = ""
    seen: list[Seen] = field(default_factory=list)
    _done: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _workers: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        for number in range(self.threads):
            thread = threading.Thread(target=self._run, args=(number,), daemon=True)
            self._workers.append(thread)
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._workers:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._workers), "a request was never answered"

    def _client(self) -> httpx.Client:
        limits = httpx.Limits(max_keepalive_connections=None if self.keep else 0)
        return httpx.Client(transport=httpx.HTTPTransport(uds=self.uds, limits=limits), timeout=50)

    def _run(self, number: int) -> None:
        with self._client() as client:
            serial = 0
            while not self._done.is_set():
                serial += 1
                seen = self._request(
                    client,
                    f"{self.prefix}{number}-{serial}",
                    self.methods[serial % len(self.methods)],
                    number,
                )
                with self._lock:
                    self.seen.append(seen)

    def _request(self, client: httpx.Client, token: str, method: str, first: int) -> Seen:
        sent = time.monotonic()
        for attempt in range(100 * len(self.urls)):
            url = self.urls[(first + attempt) % len(self.urls)]
            try:
                answer = client.request(method, f"{url}{self.mount}/{token}")
            except httpx.TransportError as error:
                if refused(error):
                    time.sleep(0.05)
                    continue
                return Seen(token, method, sent, time.monotonic(), 0, repr(error), "unknown")
            return Seen(
                token, method, sent, time.monotonic(), answer.status_code, answer.text, _executed(answer)
            )
        return Seen(token, method, sent, time.monotonic(), 0, "refused", "no")

    # What came of it

    def good(self) -> int:
        return sum(each.status == 200 for each in tuple(self.seen))

    def bad(self) -> list[Seen]:
        return [each for each in tuple(self.seen) if each.status != 200]

    def more(self, count: int, condition: Callable[[Seen], bool] = lambda _: True) -> None:
        """Wait until ``count`` more good answers of a kind have come, to requests that were sent after now."""
        now = time.monotonic()

        def enough() -> bool:
            later = (each for each in tuple(self.seen) if each.sent > now and each.status == 200)
            return sum(map(condition, later)) >= count

        try:
            eventually(enough, f"{count} more good answers")
        except AssertionError as error:
            error.add_note(f"the last bad ones: {self.bad()[-3:]}")
            raise

    def judge(self, runs: Mapping[str, int]) -> None:
        """Every answer is true: good ones ran, ``no`` did not, nothing that is not idempotent ran twice."""
        wrong = [each for each in self.seen if each.status == 200 and each.text.split()[0] != each.token]
        assert not wrong, "replies that are another's"
        lost = [each for each in self.seen if each.status == 200 and not runs[each.token]]
        assert not lost, "answers to what never ran"
        lies = [each for each in self.seen if each.executed == "no" and runs[each.token]]
        assert not lies, "ran, and was told that it did not"
        twice = [each for each in self.seen if each.method == "POST" and runs[each.token] > 1]
        assert not twice, "ran twice"


def refused(error: BaseException) -> bool:
    """Whether nothing listened, so that the request surely went nowhere."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionRefusedError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _executed(answer: httpx.Response) -> str:
    if answer.headers.get("content-type") != "application/problem+json":
        return "yes" if answer.status_code == 200 else "unknown"
    return str(answer.json()["executed"])


@contextmanager
def loads(*some: Load) -> Iterator[tuple[Load, ...]]:
    """Several loads at a time."""
    with ExitStack() as stack:
        yield tuple(stack.enter_context(load) for load in some)
