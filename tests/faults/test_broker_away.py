"""The broker dies and comes back with its data (AOF): what ran is answered, once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from wsgiref.validate import validator

import flask
import httpx
import pytest

from flaskbus.testing import running_bus
from tests.faults.mortal import MortalBroker
from tests.integration.test_promises import SHOP, M, at_rest, eventually, known, problem


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[MortalBroker]:
    mortal = MortalBroker(tmp_path)
    yield mortal
    mortal.close()


def test_a_reply_waits_for_the_broker_and_the_app_runs_once(mortal: MortalBroker) -> None:
    app, go, runs = flask.Flask("mortal"), threading.Event(), []
    app.wsgi_app = validator(app.wsgi_app)  # type: ignore[assignment,method-assign]

    @app.post("/work")
    def work() -> str:
        runs.append(1)
        assert go.wait(30)
        return "done"

    @app.get("/hello")
    def hello() -> str:
        return "hello"

    with ThreadPoolExecutor(4) as pool, running_bus(mortal.broker.url) as bus:
        with bus.mount(app, "/shop", threads=2) as url:
            answer = pool.submit(httpx.post, f"{url}/work", timeout=60)
            eventually(lambda: runs)
            mortal.kill()
            go.set()
            away = httpx.get(f"{url}/hello", timeout=30)
            assert (away.status_code, problem(away)["executed"]) == (503, "no")
            mortal.revive()
            assert answer.result().text == "done"
            eventually(lambda: httpx.get(f"{url}/hello", timeout=30).text == "hello")
            assert len(runs) == 1
            at_rest(mortal.broker)


def test_requests_that_waited_are_served_after_its_return(mortal: MortalBroker) -> None:
    app = flask.Flask("patient")
    app.wsgi_app = validator(app.wsgi_app)  # type: ignore[assignment,method-assign]
    app.add_url_rule("/<name>", view_func=lambda name: name)
    with ThreadPoolExecutor(8) as pool, running_bus(mortal.broker.url) as bus:
        with bus.mount(app, "/shop", name="patient"):
            pass
        with bus.mount(app, "/shop", name="patient") as url:
            assert httpx.get(f"{url}/before").text == "before"
            mortal.kill()
            answers = [pool.submit(httpx.get, f"{url}/{n}", timeout=30) for n in range(4)]
            mortal.revive()
            # Sent within the time that the gateway waits for a broker, or surely not sent at all.
            for n, answer in enumerate(answers):
                response = answer.result()
                assert response.text == str(n) or problem(response)["executed"] == "no"
            assert eventually(lambda: httpx.get(f"{url}/after", timeout=30).text) == "after"


def test_what_a_restarted_broker_says_is_not_sworn_to(mortal: MortalBroker) -> None:
    """It may have lost its last writes, and with them that an agent had the request."""
    known(mortal.broker)
    with ThreadPoolExecutor(1) as pool, running_bus(mortal.broker.url, hold=4.0) as bus:
        bus.await_route(SHOP)
        answer = pool.submit(httpx.get, f"{bus.url}/shop/x", timeout=30)
        with mortal.broker.client() as client:
            eventually(lambda: client.xlen(M.requests) == 1)
        mortal.kill()
        mortal.revive()
        response = answer.result()
        assert (response.status_code, problem(response)["executed"]) == (503, "unknown")
        at_rest(mortal.broker)
