"""A Django project with its admin: login, CSRF, messages, redirects and static files under a prefix."""

from __future__ import annotations

import re
from collections.abc import Callable

import httpx
import pytest

from tests.integration.clients import HOST, Got, Sent, by_curl, by_httpx
from tests.integration.conftest import Site

pytestmark = pytest.mark.xdist_group("site")

MASKS = {
    r'name="csrfmiddlewaretoken" value="\w+"': "TOKEN",
    r"csrftoken=\w+": "csrftoken=TOKEN",
    r"sessionid=\w+": "sessionid=ID",
    r"messages=[^;]{20,}": "messages=SIGNED",
    r"<bdi>[^<]*</bdi>": "PARTS OF A HASH",
    r"expires=[^;]+": "expires=LATER",
    r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT": "DATE",
    r"datetime=\S+": "NOW",
    r"\b\d{1,2}:\d\d(:\d\d)?( [ap]\.m\.)?": "TIME",
}
"""What differs from one request to the next."""

CASES = [
    Sent("/where?a=1"),
    Sent("/gr%C3%B6%C3%9Fe/%C3%A9?q=%F0%9F%90%8D"),
    Sent("/admin"),
    Sent("/admin/"),
    Sent("/admin/login/?next=/django/admin/"),
    Sent("/admin/login/", "HEAD"),
    Sent("/admin/login/", "POST", {"Content-Type": "application/x-www-form-urlencoded"}, b"username=admin"),
    Sent("/admin/jsi18n/"),
    Sent("/none"),
    Sent("/where", "PROPFIND", {"Depth": "0"}),
    Sent("/static/admin/css/base.css"),
    Sent("/static/admin/css/base.css", "HEAD"),
    Sent("/static/admin/css/base.css", headers={"If-Modified-Since": "Sat, 01 Jan 2050 00:00:00 GMT"}),
    Sent("/static/admin/img/icon-yes.svg"),
    Sent("/static/admin/none.css"),
]


@pytest.mark.parametrize("fetch", [by_httpx, by_curl])
@pytest.mark.parametrize("sent", CASES, ids=lambda sent: f"{sent.method} {sent.target} {sent.headers}"[:60])
def test_same_answer_as_under_gunicorn(site: Site, fetch: Callable[[str, Sent], Got], sent: Sent) -> None:
    there = Sent(f"/django{sent.target}", sent.method, sent.headers, sent.body)
    behind, direct = (fetch(url, there).compared(MASKS) for url in (site.bus, site.direct))
    if not direct.values("content-length"):
        behind = behind.without("content-length")
    assert behind == direct
    assert behind.status < 500


def administer(url: str) -> list[tuple[str, Got]]:
    """What a person does with the admin, and every answer on the way."""
    pages: list[tuple[str, Got]] = []

    def keep(response: httpx.Response) -> None:
        response.read()
        headers = [(key.decode().lower(), value.decode("latin-1")) for key, value in response.headers.raw]
        got = Got(response.status_code, headers, response.content).compared(MASKS)
        pages.append((f"{response.request.method} {response.request.url.path}", got))

    with httpx.Client(
        base_url=url,
        headers={"Host": HOST, "Accept-Encoding": "identity"},
        event_hooks={"response": [keep]},
    ) as person:

        def fill_in(place: str, **fields: str) -> httpx.Response:
            form = person.get(place)
            for url in re.findall(r'(?:href|src)="([^"]+\.(?:css|js|svg))"', form.text):
                assert url.startswith("/django/static/admin/")
                assert person.get(url).status_code == 200
            token = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', form.text)[0]
            answer = person.post(place, data={"csrfmiddlewaretoken": token, **fields})
            while answer.is_redirect:
                answer = person.get(answer.headers["Location"])
            return answer

        login = "/django/admin/login/?next=/django/admin/auth/user/"
        assert "Please enter the correct username" in fill_in(login, username="admin", password="wrong").text
        assert "1 user" in fill_in(login, username="admin", password="secret").text
        password = {"password1": "unguessable!", "password2": "unguessable!"}
        added = fill_in(
            "/django/admin/auth/user/add/", username="zoë", usable_password="true", **password, _save="Save"
        )
        assert "was added successfully" in added.text
        assert "zoë" in added.text
        assert person.post("/django/admin/logout/").status_code == 403  # without its CSRF token
        history = person.get("/django/admin/auth/user/2/history/")
        assert history.status_code == 200
        deleted = fill_in("/django/admin/auth/user/2/delete/", post="yes")
        assert "was deleted successfully" in deleted.text
    return pages


def test_a_person_uses_the_admin(site: Site) -> None:
    for (step, behind), (expected, direct) in zip(administer(site.bus), administer(site.direct), strict=True):
        assert step == expected
        assert behind.body.splitlines() == direct.body.splitlines(), step
        assert behind == direct, step
