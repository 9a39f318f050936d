"""A bare WSGI callable and a Bottle app, the same behind the bus as under gunicorn."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.clients import HOST, Got, Sent, by_bytes, by_curl, by_httpx, parse
from tests.integration.conftest import Site

pytestmark = pytest.mark.xdist_group("site")

Fetch = Callable[[str, Sent], Got]

PATHS = r"""
/ /?? /?a=b&c /?%zz /?q=%C3%A9&r=%ff /a%20b /a+b /a%2Bb /a%252Fb /%C3%A9 /%c3%a9 /%ff%fe /a%2Fb /a%2fb /a;b=c /a;b/c
//a /// /a//b /a/ /a/./b /a/../b /./a /../a /a/. /a/.. /a/%2e%2e/b /a%5Cb /a\b /% /%4 /%zz /a%0Ab /a%0d%0ab
/~user/*!'()$&,=@ /a|b /a"b<c> /{a}[b] /a^b`c /a:80 /http://x.example/y /a%23b /a%3Fb?c
/deep/er /deep/er/ /deep/er?x /deep/erx /deep /deep/er//x /deep/er/%C3%A9?q=%C3%A9 /%64eep/er/x
/gr%C3%B6%C3%9Fe/x /gr%c3%b6%c3%9fe/x /%67r%C3%B6%C3%9Fe /gr%C3%B6%C3%9Fe /gr%C3%B6%C3%9F
""".split()  # noqa: SIM905 - the quoted list is ten times as long

REFUSED = [
    "/a%00b",
    "/a#b",
    "/deep//er",
    "/deep%2Fer/x",
    "/deep/er/../../x",
    "/deep/er/..%2f..%2fx",
    "/deep/er;x/y",
]
"""No path at all, or one that leads to another app where somebody else reads it."""

OURS = {"SERVER_SOFTWARE", "REMOTE_PORT", "SERVER_PORT", "REQUEST_URI", "flaskbus.request_id"}


def told(got: Got) -> dict[str, Any]:
    """What the bare app says of its request."""
    assert got.status == 200, got
    answer: dict[str, Any] = json.loads(got.body)
    answer["environ"] = {key: value for key, value in answer["environ"].items() if key not in OURS}
    return answer


def raw(*lines: str, body: bytes = b"") -> bytes:
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@pytest.mark.parametrize("path", PATHS)
def test_path_and_query_arrive_as_they_were_sent(site: Site, path: str) -> None:
    data = raw(f"GET {path} HTTP/1.1", f"Host: {HOST}", "Connection: close")
    behind, direct = (told(parse(by_bytes(url, data))) for url in (site.bus, site.direct))
    direct["environ"].pop("HTTP_CONNECTION")
    assert behind == direct


@pytest.mark.parametrize("path", REFUSED)
def test_what_has_two_readings_is_refused(site: Site, path: str) -> None:
    data = raw(f"GET {path} HTTP/1.1", f"Host: {HOST}", "Connection: close")
    assert parse(by_bytes(site.bus, data)).status == 400


REQUESTS = {
    **{method: Sent("/x", method) for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE")},
    **{method: Sent("/x", method) for method in ("PROPFIND", "MKCOL", "REPORT", "VERSION-CONTROL", "QUERY")},
    "empty body": Sent("/x", "POST", {}, b""),
    "binary body": Sent("/x", "POST", {"Content-Type": "application/octet-stream"}, bytes(range(256)) * 3),
    "body of a GET": Sent("/x", "GET", {"Content-Type": "text/plain"}, b"unusual"),
    "body of a PROPFIND": Sent("/x", "PROPFIND", {"Depth": "1", "Content-Type": "text/xml"}, b"<a/>"),
    "many headers": Sent("/x", headers={f"X-Number-{number}": str(number) for number in range(80)}),
    "large header": Sent("/x", headers={"X-Large": "a" * 8000}),
    "empty header": Sent("/x", headers={"X-Empty;": ""}),
    "cookie": Sent("/x", headers={"Cookie": 'a=1; b="2, 3"; c='}),
    "authorization": Sent("/x", headers={"Authorization": "Basic bWU6c2VjcmV0"}),
    "range": Sent("/x", headers={"Range": "bytes=0-1", "If-Range": '"x"'}),
    "TE": Sent("/x", headers={"Cache-Control": "no-cache", "Pragma": "no-cache", "Via": "1.1 other"}),
}  # fmt: skip


@pytest.mark.parametrize("sent", REQUESTS.values(), ids=REQUESTS)
def test_the_environ_is_the_same(site: Site, sent: Sent) -> None:
    fetch: Fetch = by_curl if sent.headers.get("X-Empty;") == "" else by_httpx
    behind, direct = (told(fetch(url, sent)) for url in (site.bus, site.direct))
    assert behind == direct


REPEATED = [
    ["X-Many: one", "X-Many: two", "x-many:three"],
    ["Accept: text/html", "Accept: */*;q=0.1"],
    ["X_Under: no", "X-Under: yes"],
    ["X-Forwarded: kept", "X-Request-ID: mine"],
    ["Host: other.example:8080"],
    ["X-Space: \t a  b \t"],
    ["X-Name: Gr\xfc\xdfe"],
]


@pytest.mark.parametrize("lines", REPEATED, ids=lambda lines: lines[0])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_repeated_headers_and_versions_are_the_same(site: Site, version: str, lines: list[str]) -> None:
    host = [] if lines[0].startswith("Host") else [f"Host: {HOST}"]
    data = raw(f"GET /x HTTP/{version}", *host, *lines, "Connection: close")
    behind, direct = (told(parse(by_bytes(url, data))) for url in (site.bus, site.direct))
    direct["environ"].pop("HTTP_CONNECTION")
    assert behind == direct


def test_cookies_of_several_lines_are_one_list(site: Site) -> None:
    """As RFC 9113 section 8.2.3 has it; gunicorn joins them with a comma, and the second is lost."""
    data = raw("GET /x HTTP/1.1", f"Host: {HOST}", "Cookie: a=1", "Cookie: b=2", "Connection: close")
    assert told(parse(by_bytes(site.bus, data)))["environ"]["HTTP_COOKIE"] == "a=1; b=2"


def test_http_1_0_needs_no_host(site: Site) -> None:
    data = raw("GET /x HTTP/1.0")
    behind, direct = (told(parse(by_bytes(url, data))) for url in (site.bus, site.direct))
    assert behind == direct
    assert behind["environ"]["SERVER_PROTOCOL"] == "HTTP/1.0"


@pytest.mark.parametrize("fetch", [by_httpx, by_curl])
def test_a_chunked_upload_is_whole(site: Site, fetch: Fetch) -> None:
    body = bytes(range(256)) * 1000
    sent = Sent("/x", "PUT", {"Content-Type": "application/octet-stream"}, body, chunked=True)
    behind, direct = (told(fetch(url, sent)) for url in (site.bus, site.direct))
    assert behind["length"] == len(body)
    # The body is whole before the app is called, so its length is known: for an app, that is the plainer request.
    assert behind["environ"].pop("CONTENT_LENGTH") == str(len(body))
    assert direct["environ"].pop("HTTP_TRANSFER_ENCODING") == "chunked"
    for answer in (behind, direct):
        answer["environ"].pop("HTTP_EXPECT", None)
    assert behind == direct


BOTTLE = [
    Sent("/bottle"),
    Sent("/bottle/"),
    Sent("/bottle/", "HEAD"),
    Sent("/bottle/", "OPTIONS"),
    Sent("/bottle/who?a=1&a=2&b=%C3%A9", headers={"Cookie": "other=1"}),
    Sent(
        "/bottle/upload",
        "POST",
        {"Content-Type": "multipart/form-data; boundary=limit"},
        b'--limit\r\nContent-Disposition: form-data; name="note"\r\n\r\nGr\xc3\xb6\xc3\x9fe\r\n'
        b'--limit\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n\x00\x01\xff\r\n--limit--\r\n",
    ),
    Sent("/bottle/any", "PROPFIND", {}, b"any method"),
    Sent("/bottle/away"),
    Sent("/bottle/file/style.css"),
    Sent("/bottle/file/style.css", "HEAD"),
    Sent("/bottle/file/style.css", headers={"Range": "bytes=5-9"}),
    Sent("/bottle/file/style.css", headers={"If-Modified-Since": "Sat, 01 Jan 2050 00:00:00 GMT"}),
    Sent("/bottle/file/../apps/bare.py"),
    Sent("/bottle/lines"),
    Sent("/bottle/teapot"),
    Sent("/bottle/crash"),
    Sent("/bottle/none"),
]


@pytest.mark.parametrize("fetch", [by_httpx, by_curl])
@pytest.mark.parametrize("sent", BOTTLE, ids=lambda sent: f"{sent.method} {sent.target} {sent.headers}"[:60])
def test_bottle_answers_the_same(site: Site, fetch: Fetch, sent: Sent) -> None:
    behind, direct = (fetch(url, sent).compared({}) for url in (site.bus, site.direct))
    if not direct.values("content-length"):
        behind = behind.without("content-length")
    assert behind == direct


@pytest.mark.parametrize("fetch", [by_httpx, by_curl])
def test_bottle_takes_a_chunked_upload(site: Site, fetch: Fetch) -> None:
    """Under gunicorn it answers 400: it wants to take chunks apart that gunicorn took apart already."""
    answer = fetch(site.bus, Sent("/bottle/any", "PUT", {}, b"in chunks", chunked=True))
    assert (answer.status, answer.body) == (200, b"in chunks")


def test_bottle_believes_its_signed_cookie(site: Site) -> None:
    cookies = by_httpx(site.bus, Sent("/bottle/")).values("set-cookie")
    assert len(cookies) == 2
    back = "; ".join(cookie.partition(";")[0] for cookie in cookies)
    answer = by_httpx(site.bus, Sent("/bottle/who", headers={"Cookie": back}))
    assert json.loads(answer.body)["seen"] == "yes"
