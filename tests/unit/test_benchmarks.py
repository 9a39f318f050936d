"""The parts of the benchmarks that decide what a figure means: wrk's output, ratios, targets, tables."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import measure, wrk
from benchmarks.apps import CHUNK, MOUNTS, app, mounted, payload
from benchmarks.client import Connection, arrivals, mixed
from benchmarks.inprocess import rate
from benchmarks.limits import limited
from benchmarks.model import CPU, ERRORS, P50, THROUGHPUT, Deployment, Gap, Metric, Sample, Skip, Wrong
from benchmarks.report import as_json, markdown, number, table, target_table
from benchmarks.runner import Results, groups, shown, turns
from benchmarks.stats import percentile, ratio, summarize, values
from benchmarks.systems import SYSTEMS
from benchmarks.systems.nginx import configuration
from benchmarks.targets import TARGETS
from benchmarks.transfer import download, upload
from benchmarks.works import WORKS
from benchmarks.works.base import Scale, check, expected
from benchmarks.works.throughput import HELLO

GOOD = """\
Running 2s test @ http://127.0.0.1:9501/hello
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    10.01ms    8.68ms  99.72ms   90.03%
    Req/Sec     3.59k     0.90k    4.70k    70.00%
  Latency Distribution
     50%    7.61ms
     75%   12.01ms
     90%    1.20s
     99%  672.46ms
  7158 requests in 2.00s, 1.19MB read
Requests/sec:   3575.40
Transfer/sec:    607.13KB
"""


class TestWrk:
    def test_what_it_says(self) -> None:
        seen = wrk.parse(GOOD)
        assert (seen.rate, seen.requests, seen.p50, seen.p99, seen.errors) == (3575.4, 7158, 7.61, 672.46, 0)
        assert seen.read == pytest.approx(1.19 * 2**20)

    @pytest.mark.parametrize(
        ("text", "milliseconds"),
        [
            ("572.00us", 0.572),
            ("7.61ms", 7.61),
            ("1.20s", 1200.0),
            ("1.50m", 90_000.0),
            ("2.00h", 7_200_000.0),
        ],
    )
    def test_units_of_time(self, text: str, milliseconds: float) -> None:
        assert wrk.parse(GOOD.replace("672.46ms", text)).p99 == pytest.approx(milliseconds)

    @pytest.mark.parametrize(("text", "size"), [("900.00B", 900), ("1.50KB", 1536), ("2.00GB", 2**31)])
    def test_units_of_size(self, text: str, size: float) -> None:
        assert wrk.parse(GOOD.replace("1.19MB", text)).read == pytest.approx(size)

    def test_every_kind_of_error_counts(self) -> None:
        more = "  Socket errors: connect 1, read 20, write 300, timeout 4000\n  Non-2xx or 3xx responses: 50000\n"
        assert wrk.parse(GOOD.replace("Requests/sec", more + "Requests/sec")).errors == 54321

    @pytest.mark.parametrize("line", ["  7158 requests", "Requests/sec", "     50%", "     99%"])
    def test_something_else_is_no_result(self, line: str) -> None:
        with pytest.raises(ValueError, match="wrk did not say"):
            wrk.parse("\n".join(each for each in GOOD.splitlines() if not each.startswith(line)))

    @settings(deadline=None)
    @given(st.text())
    def test_anything_else_is_no_result(self, text: str) -> None:
        with pytest.raises(ValueError, match="wrk did not say"):
            wrk.parse(text)

    def test_the_command(self) -> None:
        words = wrk.command("http://127.0.0.1:1/x", connections=32, seconds=0.4, script="post.lua")
        assert words[-1] == "http://127.0.0.1:1/x"
        assert words[words.index("--duration") + 1] == "1s"
        assert Path(words[words.index("--script") + 1]).is_file()


def sample(system: str, value: float, turn: int = 0, **more: object) -> Sample:
    fields = {"work": "hello", "variant": "32", "metric": THROUGHPUT, **more}
    return Sample(system=system, value=value, round=turn, **fields)  # type: ignore[arg-type]


class TestStats:
    def test_summary(self) -> None:
        summary = summarize([30.0, 10.0, 20.0, 20.0])
        assert summary is not None
        assert (summary.median, summary.least, summary.most, summary.count) == (20, 10, 30, 4)
        assert summary.spread == 0.5

    def test_nothing(self) -> None:
        assert summarize([]) is None
        assert math.isnan(percentile([], 0.5))

    def test_a_median_of_zero_has_no_spread(self) -> None:
        summary = summarize([0.0])
        assert summary is not None
        assert summary.spread == 0.0

    def test_percentiles_are_values(self) -> None:
        hundred = [float(number) for number in range(100, 0, -1)]
        assert [percentile(hundred, share) for share in (0, 0.5, 0.99, 1)] == [1, 50, 99, 100]

    @settings(deadline=None)
    @given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
    def test_enough_are_not_above_a_percentile(self, some: list[float], share: float) -> None:
        limit = percentile(some, share)
        assert limit in some
        assert sum(each <= limit for each in some) >= share * len(some) - 1e-9

    def test_ratios_are_taken_within_a_round(self) -> None:
        # The machine was twice as fast in the second round: for both.
        ours, theirs = {0: 150.0, 1: 300.0}, {0: 100.0, 1: 200.0, 2: 9000.0}
        share = ratio(ours, theirs)
        assert share is not None
        assert (share.median, share.least, share.most, share.count) == (1.5, 1.5, 1.5, 2)

    def test_no_ratio_to_nothing(self) -> None:
        assert ratio({0: 1.0}, {1: 1.0}) is None
        assert ratio({0: 1.0}, {0: 0.0}) is None

    def test_values_are_of_one_kind(self) -> None:
        some = [sample("uwsgi", 1), sample("uwsgi", 2, 1), sample("flaskbus", 3)]
        some += [
            sample("uwsgi", 4, metric=P50),
            sample("uwsgi", 5, variant="1"),
            sample("uwsgi", 6, work="io"),
        ]
        assert values(some, "hello", "32", "uwsgi", THROUGHPUT) == {0: 1, 1: 2}


class TestPlan:
    def test_each_system_has_each_place(self) -> None:
        assert [turns("abc", shift) for shift in range(4)] == [
            list("abc"),
            list("bca"),
            list("cab"),
            list("abc"),
        ]
        assert turns([], 3) == []

    def test_what_needs_the_same_runs_beside_each_other(self) -> None:
        plan = groups(WORKS, Scale())
        assert [work.name for work, _ in plan[Deployment()]][:4] == ["hello"] * 4
        assert plan[Deployment(mounts=MOUNTS)][0][0].name == "mounts"
        variants = sum(len(work.variants(Scale())) for work in WORKS)
        assert sum(map(len, plan.values())) == variants

    def test_the_shape_can_be_chosen(self) -> None:
        shape = Deployment(processes=1, threads=16)
        assert HELLO.deployment("32", Scale(deployment=shape)) == shape

    def test_names_fit(self) -> None:
        names = [system.name for system in SYSTEMS]
        assert len(set(names)) == len(names)
        assert len({work.name for work in WORKS}) == len(WORKS)
        for work in WORKS:
            assert set(work.systems) <= set(names)
            assert work.baseline in work.systems

    def test_a_gap_is_noted_once(self) -> None:
        results = Results()
        assert [results.gap("io", "32", "uwsgi", "away") for _ in range(2)] == [True, False]
        assert results.gaps == [Gap("io", "32", "uwsgi", "away")]


class TestReport:
    FLASKBUS, NGINX, *_ = SYSTEMS
    SAMPLES = (
        sample("flaskbus", 100, 0), sample("flaskbus", 120, 1), sample("flaskbus", 110, 2),
        sample("nginx-gthread", 50, 0), sample("nginx-gthread", 60, 1), sample("nginx-gthread", 110, 2),
        sample("flaskbus", 7, metric=Metric("calls", "/request")), sample("nginx-gthread", 0, metric=ERRORS),
        sample("flaskbus", 12.345, metric=CPU, variant="128"),
    )  # fmt: skip

    def test_table(self) -> None:
        assert table(HELLO, SYSTEMS, self.SAMPLES).splitlines() == [
            "| | flaskbus | nginx → gunicorn gthread |",
            "| --- | ---: | ---: |",
            "| 32: throughput, requests/s | 110 ±9% (2.00) | 60 ±50% |",
            "| 32: calls, /request | 7 | – |",
            "| 128: CPU of all processes, µs/request | 12.3 | – |",
        ]

    def test_errors_are_shown_where_there_were_some(self) -> None:
        text = table(HELLO, SYSTEMS, [*self.SAMPLES, sample("uwsgi", 3, metric=ERRORS)])
        assert "| 32: errors, requests | – | 0 | 3 |" in text

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (6572.4, "6,572"),
            (99.96, "100.0"),
            (12.345, "12.3"),
            (0.61249, "0.612"),
            (7, "7"),
            (math.nan, "–"),
        ],
    )
    def test_numbers(self, value: float, text: str) -> None:
        assert number(value) == text

    def test_targets(self) -> None:
        lines = target_table(self.SAMPLES).splitlines()
        assert lines[2:] == [
            "| hello, 32 connections, requests/s against nginx-gthread | ≥ 1.3 | 2 | 2 (1 to 2) | as aimed at |"
        ]
        assert target_table([]) == ""

    def test_verdicts(self) -> None:
        higher, lower = TARGETS[0], next(target for target in TARGETS if not target.higher)
        assert [higher.verdict(summarize([value])) for value in (1.2, 1.3, 2.0)] == [
            "**missed**", "reached", "as aimed at",
        ]  # fmt: skip
        assert [lower.verdict(summarize([value])) for value in (1.7, 1.6, 1.0)] == [
            "**missed**", "reached", "as aimed at",
        ]  # fmt: skip
        assert higher.verdict(None) == "not measured"

    def test_each_target_finds_its_figures(self) -> None:
        from benchmarks.watch import AFTER, BEFORE, MEMORY, PEAK
        from benchmarks.watch import CONNECTIONS as TO_BROKER
        from benchmarks.works.events import OPEN
        from benchmarks.works.held import CONNECTIONS, PER_REQUEST
        from benchmarks.works.mix import FAST_P99

        some = [
            sample(system, 1.0, work=work, variant=variant, metric=metric)
            for system in ("flaskbus", "nginx-gthread", "nginx-granian", "uwsgi")
            for work, variant, metric in (
                *(("hello", count, THROUGHPUT) for count in HELLO.cases),
                ("hello", "1", P50),
                *(("mix", rate, FAST_P99) for rate in ("350/s", "525/s")),
                *(("scaling", count, THROUGHPUT) for count in ("1", "32")),
                *(
                    ("held", level, metric)
                    for level in ("100", "10,000")
                    for metric in (CONNECTIONS, PER_REQUEST)
                ),
                ("sse-many", "500", OPEN),
                *(
                    (work, variant, Metric(name, "", when=when))
                    for work, variant, name in (
                        ("sse-many", "500", TO_BROKER),
                        ("websocket", "32", TO_BROKER),
                        ("upload-large", "2 GiB", MEMORY + "broker"),
                    )
                    for when in (BEFORE, PEAK, AFTER)
                ),
            )
        ]
        assert [target.title for target in TARGETS if target.measured(some) is None] == []

    def test_the_whole(self) -> None:
        gaps = [
            Gap("uwsgi", "", "", "not installed: uwsgi"),
            Gap("upload", "1 GiB", "flaskbus", "answered 413"),
        ]
        text = markdown({"Python": "3.x"}, [HELLO], SYSTEMS, self.SAMPLES, gaps)
        assert "- Python: 3.x\n" in text
        assert "## hello: hello, JSON, by connections\n" in text
        assert text.endswith("- uwsgi: not installed: uwsgi\n- upload, 1 GiB, flaskbus: answered 413\n")

    def test_json(self) -> None:
        document = json.loads(as_json({}, self.SAMPLES, [Gap("io", "32", "uwsgi", "away")]))
        assert len(document["samples"]) == len(self.SAMPLES)
        assert document["samples"][0] == {
            "work": "hello", "variant": "32", "system": "flaskbus", "round": 0,
            "metric": "throughput", "unit": "requests/s", "value": 100,
        }  # fmt: skip
        assert [target["verdict"] for target in document["targets"]] == ["as aimed at"]
        assert document["not measured"][0]["reason"] == "away"

    def test_progress(self) -> None:
        from benchmarks.model import Figure

        assert (
            shown([Figure(THROUGHPUT, 6572.4), Figure(P50, 0.5)])
            == "throughput 6,572.4 requests/s, p50 0.5 ms"
        )


class TestLoad:
    def test_arrivals_are_as_many_as_asked_for(self) -> None:
        due = arrivals(500, 10, seed=1)
        assert due == arrivals(500, 10, seed=1) != arrivals(500, 10, seed=2)
        assert due == sorted(due)
        assert due[-1] < 10
        assert len(due) == pytest.approx(5000, rel=0.1)

    def test_nginx(self) -> None:
        text = configuration(Path("/tmp/x"), 8080, [Path("/tmp/x/app0.sock"), Path("/tmp/x/app1.sock")])
        assert text.count("server unix:/tmp/x/app0.sock max_fails=0;") == 2
        assert text.count("{") == text.count("}")
        assert "listen 127.0.0.1:8080 " in text

    def test_the_payload_is_as_long_as_asked_for(self) -> None:
        assert [len(payload(size)) for size in (0, 1, 16, 10240, 102400)] == [0, 1, 16, 10240, 102400]
        assert payload(10240) == payload(102400)[:10240]

    def test_the_app_alone(self) -> None:
        assert rate("/hello", 0.01) > 10
        with pytest.raises(AssertionError):
            rate("/nowhere", 0.01)

    def test_the_app_is_the_same_on_each_mount(self) -> None:
        assert (
            expected("GET", "/m7/hello")
            == expected("GET", "/hello")
            == (200, b'{"message":"hello, world"}\n')
        )
        assert {f"/m{number}" for number in range(MOUNTS)} == set(mounted.mounts)
        assert set(mounted.mounts.values()) == {app}


ANSWERS = {
    "/length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "/chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n",
    "/refused": b"HTTP/1.1 503 Away\r\ncontent-length: 0\r\n\r\n",
    "/hello": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother",
}


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while head := await reader.readline():
        while (await reader.readline()).strip():
            pass
        writer.write(ANSWERS[head.split()[1].decode()])
    writer.close()


class TestClient:
    def test_answers(self) -> None:
        async def ask() -> list[tuple[int, bytes]]:
            async with await asyncio.start_server(_serve, "127.0.0.1", 0) as server:
                connection = await Connection.open(server.sockets[0].getsockname()[1])
                answers = [
                    await connection.get(path) for path in ("/length", "/chunks", "/refused", "/length")
                ]
                connection.close()
            return [(answer.status, answer.body) for answer in answers]

        assert asyncio.run(ask()) == [(200, b"hello"), (200, b"hello"), (503, b""), (200, b"hello")]

    def test_each_request_of_a_mix_is_counted(self) -> None:
        async def ask() -> list[tuple[str, int]]:
            async with await asyncio.start_server(_serve, "127.0.0.1", 0) as server:
                port = server.sockets[0].getsockname()[1]
                seen = await mixed(port, [(0.0, "/length"), (0.01, "/refused"), (0.02, "/chunks")])
            assert all(each.latency >= 0 for each in seen)
            return [(each.path, each.status) for each in seen]

        assert asyncio.run(ask()) == [("/length", 200), ("/refused", 503), ("/chunks", 200)]

    def test_another_answer_is_no_figure(self) -> None:
        async def ask() -> str:
            async with await asyncio.start_server(_serve, "127.0.0.1", 0) as server:
                port = server.sockets[0].getsockname()[1]
                with pytest.raises(Wrong) as wrong:
                    await asyncio.to_thread(check, port, "/hello")
            return str(wrong.value)

        assert asyncio.run(ask()) == "GET /hello: 200 b'other', which is not what the app answers"


async def _take_or_refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Uploads: 413 at once. Downloads: 64 KiB too little of what is asked for, or zeros."""
    head = (await reader.readuntil(b"\r\n\r\n")).split()
    if head[0] == b"POST":
        writer.write(b"HTTP/1.1 413 Large\r\nContent-Length: 2\r\n\r\n{}")
    else:
        size = int(head[1].rpartition(b"/")[2])
        body = payload(CHUNK) if size == 2 * CHUNK else bytes(size)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + body)
    await writer.drain()
    writer.close()


class TestTransfer:
    @staticmethod
    def meet(move: Callable[[int, int], float], size: int) -> float:
        async def both() -> float:
            async with await asyncio.start_server(_take_or_refuse, "127.0.0.1", 0) as server:
                return await asyncio.to_thread(move, server.sockets[0].getsockname()[1], size)

        return asyncio.run(both())

    def test_a_refused_upload_is_no_failure(self) -> None:
        with pytest.raises(Skip, match=r"^answered 413: "):
            self.meet(upload, 1 << 20)

    def test_a_short_download_is_no_figure(self) -> None:
        with pytest.raises(Wrong, match=r"^download: 65536 bytes are missing$"):
            self.meet(download, 2 * CHUNK)

    def test_other_bytes_are_no_figure(self) -> None:
        with pytest.raises(Wrong, match=r"^download: the bytes are not the app's$"):
            self.meet(download, CHUNK)


class TestMeasure:
    def test_a_family(self) -> None:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
            assert set(measure.family([os.getpid()])) >= {os.getpid(), child.pid}
            assert measure.family([child.pid]) == [child.pid]
            assert 0 < measure.private(child.pid) <= measure.pss([child.pid])
        assert measure.private(child.pid) == measure.pss([child.pid]) == 0

    def test_how_busy(self) -> None:
        assert 0 <= measure.busy(0.05) <= 1

    def test_what_the_broker_used_meanwhile(self) -> None:
        before = measure.BrokerUse(1.0, Counter(xadd=5, ping=1), 10.0)
        used = measure.BrokerUse(1.5, Counter(xadd=9, ping=1), 12.0) - before
        assert (used.cpu, used.calls, used.at) == (0.5, Counter(xadd=4), 2.0)


class TestCommandLine:
    @staticmethod
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        root = Path(__file__).parents[2]
        return subprocess.run(
            [sys.executable, "-m", "benchmarks", *words],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )

    def test_what_there_is(self) -> None:
        ran = self.run("--list")
        assert ran.returncode == 0
        for name in (*(system.name for system in SYSTEMS), *(work.name for work in WORKS)):
            assert f"\n{name}: " in f"\n{ran.stderr}"

    def test_a_wrong_name(self) -> None:
        ran = self.run("--only", "hello,hallo")
        assert ran.returncode == 2
        assert "there is no work 'hallo'; there are hello," in ran.stderr


def test_a_process_is_limited_for_as_long_as_the_block_runs() -> None:
    def group(pid: int) -> list[str]:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        return [line for line in lines if "flaskbus-bench" in line]

    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            with limited([process.pid], 0.5):
                assert len(group(process.pid)) == 1
            assert not group(process.pid)
        except Skip as reason:
            pytest.skip(str(reason))
        finally:
            process.kill()
