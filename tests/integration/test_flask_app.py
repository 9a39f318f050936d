"""A Flask app under a prefix: sessions, templates, blueprints, static files and redirects stay right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from http.cookies import SimpleCookie

import httpx
import pytest

from tests.integration.clients import Got, Sent, by_curl, by_httpx
from tests.integration.conftest import Site

pytestmark = pytest.mark.xdist_group("site")

MASKS = {r"session=[^;]+": "session=SIGNED"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}

CASES = [
    Sent(""),
    Sent("/"),
    Sent("/", "HEAD"),
    Sent("/", "POST", FORM, b"a=1"),
    Sent("/auth/login"),
    Sent("/auth/login", "POST", FORM, b"name=Ann&password=wrong"),
    Sent("/auth/login", "POST", FORM, b"name=Ann&password=right"),
    Sent("/auth/logout"),
    Sent("/add", "POST", FORM, b"text=no"),
    Sent("/entry/1000"),
    Sent("/where?a=%2F&b=%C3%A9"),
    Sent("/cookies"),
    Sent("/folder"),
    Sent("/folder?a=%20b"),
    Sent("/folder/"),
    Sent("/empty"),
    Sent("/stream"),
    Sent("/crash"),
    Sent("/assets/style.css"),
    Sent("/static/style.css"),
    Sent("/static/../journal.py"),
    Sent("/file", headers={"If-Modified-Since": "Sat, 01 Jan 2050 00:00:00 GMT"}),
    Sent("/file", headers={"Range": "bytes=5-9"}),
    Sent("/file", headers={"Range": "bytes=-4"}),
    Sent("/file", headers={"Range": "bytes=100000-"}),
    Sent("/file", "HEAD", {"Range": "bytes=5-9"}),
    Sent("/where", "POST"),
    Sent("/add", "POST", FORM, b"x" * (1024 * 1024 + 1)),
]


def name(sent: Sent) -> str:
    return f"{sent.method} {sent.target} {sent.headers.get('Range', '')}".strip()


def answers(site: Site, mount: str, sent: Sent) -> Iterator[tuple[Got, Got]]:
    there = Sent(mount + sent.target, sent.method, sent.headers, sent.body)
    for fetch in (by_httpx, by_curl):
        behind, direct = (fetch(url, there).compared(MASKS) for url in (site.bus, site.direct))
        if not direct.values("content-length"):
            behind = behind.without("content-length")
        yield behind, direct


@pytest.mark.parametrize("sent", CASES, ids=name)
def test_same_answer_as_under_gunicorn(site: Site, sent: Sent) -> None:
    for behind, direct in answers(site, "/journal", sent):
        assert behind == direct


@pytest.mark.parametrize("sent", [case for case in CASES if case.target != "/empty"], ids=name)
def test_valid_by_wsgiref(site: Site, sent: Sent) -> None:
    """All but the 204, to which Flask gives a Content-Type."""
    for behind, direct in answers(site, "/checked/journal", sent):
        assert behind == direct
        assert behind.status < 500 or sent.target == "/crash"


def test_a_file_that_was_not_changed_is_not_sent_again(site: Site) -> None:
    first = by_curl(site.bus, Sent("/journal/file"))
    (etag,) = first.values("etag")
    again = by_curl(site.bus, Sent("/journal/file", headers={"If-None-Match": etag}))
    assert (again.status, again.body) == (304, b"")
    assert again.values("etag") == [etag]
    part = by_curl(site.bus, Sent("/journal/file", headers={"Range": "bytes=2-5", "If-Range": etag}))
    assert (part.status, part.body) == (206, first.body[2:6])
    assert part.values("content-range") == [f"bytes 2-5/{len(first.body)}"]


def test_a_person_logs_in_and_writes(site: Site) -> None:
    with httpx.Client(base_url=site.bus, follow_redirects=True) as person:
        page = person.get("/diary/")
        login = re.findall(r'href="([^"]+)"', page.text)[-1]
        assert login == "/diary/auth/login"
        assert person.get(re.findall(r'href="([^"]+\.css)"', page.text)[0]).status_code == 200
        page = person.post(login, data={"name": "Zoë", "password": "right"})
        assert str(page.url) == f"{site.bus}/diary/"
        assert "Welcome, Zoë." in page.text
        action = re.findall(r'action="([^"]+)"', page.text)[0]
        page = person.post(action, data={"text": "<b>Grüße</b>"})
        assert [step.status_code for step in page.history] == [303]
        assert "&lt;b&gt;Grüße&lt;/b&gt;" in page.text
        assert "Added." in page.text
        entry = re.findall(r'href="([^"]+/entry/\d+)"', page.text)[-1]
        assert person.get(entry).text == "<b>Grüße</b>"
        assert person.get("/diary/stream").text == "/stream\n/diary/ for Zoë\n"
        page = person.get("/diary/auth/logout")
        assert "Zoë" not in page.text


def test_cookies_belong_to_the_prefix(site: Site) -> None:
    set_cookies = by_httpx(site.bus, Sent("/journal/cookies")).values("set-cookie")
    paths = {key: morsel["path"] for text in set_cookies for key, morsel in SimpleCookie(text).items()}
    assert paths == {"here": "/journal/", "everywhere": "/"}
