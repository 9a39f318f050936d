"""httpbin, unmodified: every endpoint answers behind the bus what it answers under gunicorn."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import httpbin
import pytest
from werkzeug.exceptions import HTTPException

from tests.integration.clients import Got, Sent, by_curl, by_httpx
from tests.integration.conftest import Site

pytestmark = pytest.mark.xdist_group("site")

Fetch = Callable[[str, Sent], Got]

MASKS = {
    r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}": "UUID",
    r'(nonce|opaque)="[0-9a-f]+"': r'\1="RANDOM"',
    r"^[0-9a-f]{32}$": "ETAG",
    r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT": "DATE",
}
"""What differs from one request to the next."""

NOT_VALID = re.compile(
    r"""/status/(?:204|304)$    # has a Content-Type
      | /status/(?:30[125]|40[127]|418)$|/basic-auth/  # has a body and no Content-Type
    """,
    re.VERBOSE,
)
"""Endpoints that ``wsgiref.validate`` refuses; they are requested without it."""

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
JSON = {"Content-Type": "application/json"}
PARTS = {"Content-Type": "multipart/form-data; boundary=limit"}
MULTIPART = (
    b'--limit\r\nContent-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
    b'--limit\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n\x00\x01\xff\r\n--limit--\r\n"
)
BASIC = {"Authorization": "Basic " + b64encode(b"me:secret").decode()}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "TRACE")


def sent(target: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Sent:
    return Sent(target, method, {name.replace("_", "-"): value for name, value in headers.items()}, body)


CASES = [
    sent("/"),
    sent("/", "HEAD"),
    sent("/", "OPTIONS"),
    sent("/static/favicon.ico"),
    sent("/no/such/thing"),
    sent("/html"),
    sent("/robots.txt"),
    sent("/deny"),
    sent("/ip"),
    sent("/uuid"),
    sent("/headers", Accept_Language="de", X_Thing="a, b"),
    sent("/user-agent", User_Agent="tester/1.0 (like a person)"),
    sent("/get?a=1&a=2&b=%C3%A9&c&d="),
    sent("/get", "HEAD"),
    sent("/get", "POST", b""),
    sent("/get", Origin="http://other.example"),
    sent("/get", "OPTIONS", Access_Control_Request_Headers="X-Thing"),
    sent("/post", "POST", b"a=1&b=%C3%A9", **FORM),
    sent("/post", "POST", MULTIPART, **PARTS),
    sent("/post", "POST", b'{"a": [1, "\xc3\xa9"]}', **JSON),
    sent("/post", "POST", bytes(range(256)), Content_Type="application/octet-stream"),
    sent("/post", "POST", b""),
    sent("/put", "PUT", b"text", Content_Type="text/plain"),
    sent("/patch", "PATCH", b'{"op": 1}', **JSON),
    sent("/delete?force=yes", "DELETE"),
    sent("/delete", "DELETE", b"why", Content_Type="text/plain"),
    *(sent("/anything", method) for method in METHODS),
    *(sent("/anything/a%20b/%C3%A9/c;d=1?q=%2F", method, b"x") for method in METHODS[1:-1]),
    sent("/gzip"),
    sent("/deflate"),
    sent("/brotli"),
    sent("/redirect/3"),
    sent("/redirect/2?absolute=true"),
    sent("/relative-redirect/2"),
    sent("/absolute-redirect/2"),
    sent("/redirect-to?url=http%3A%2F%2Fother.example%2F%3Fa%3D1&status_code=307"),
    *(sent("/redirect-to?url=%2Fget", method, None) for method in METHODS),
    sent("/stream/5"),
    *(sent(f"/status/{code}", method) for code in (200, 404, 418, 500) for method in METHODS),
    *(sent(f"/status/{code}") for code in (201, 204, 301, 302, 304, 305, 401, 402, 406, 407, 503, 599)),
    sent("/response-headers?X-Many=1&X-Many=2&Content-Type=text/plain"),
    sent("/response-headers?X-Many=1", "POST"),
    sent("/cookies", Cookie="a=1; b=2"),
    sent("/forms/post"),
    sent("/cookies/set/name/value"),
    sent("/cookies/set?one=1&two=2"),
    sent("/cookies/delete?one&two"),
    sent("/basic-auth/me/secret"),
    Sent("/basic-auth/me/secret", headers=BASIC),
    sent("/hidden-basic-auth/me/secret"),
    Sent("/hidden-basic-auth/me/secret", headers=BASIC),
    sent("/bearer"),
    sent("/bearer", Authorization="Bearer token"),
    sent("/digest-auth/auth/me/secret"),
    sent("/digest-auth/auth-int/me/secret/SHA-256"),
    sent("/digest-auth/auth/me/secret/SHA-512/never"),
    sent("/delay/0.05"),
    sent("/delay/0.05", "POST", b"a=1", **FORM),
    sent("/drip?duration=0.1&numbytes=4&delay=0"),
    sent("/drip?duration=0&numbytes=4&delay=0&code=500"),
    sent("/base64/SFRUUEJJTiBpcyBhd2Vzb21l"),
    sent("/base64/%C3%A9"),
    sent("/cache"),
    sent("/cache", If_None_Match="x"),
    sent("/cache", If_Modified_Since="Sat, 21 Nov 2026 00:00:00 GMT"),
    sent("/etag/abc"),
    sent("/etag/abc", If_None_Match='"abc"'),
    sent("/etag/abc", If_Match='"other"'),
    sent("/cache/60"),
    sent("/encoding/utf8"),
    sent("/bytes/1024?seed=1"),
    sent("/bytes/0"),
    sent("/stream-bytes/200000?seed=1&chunk_size=7000"),
    sent("/range/1024"),
    sent("/range/1024", Range="bytes=100-199"),
    sent("/range/1024", Range="bytes=-5"),
    sent("/range/1024", Range="bytes=2000-"),
    sent("/range/1024?chunk_size=100&duration=0", "HEAD"),
    sent("/links/5/2"),
    sent("/links/5"),
    *(
        sent("/image", Accept=kind)
        for kind in ("image/webp", "image/svg+xml", "image/jpeg", "image/png", "text/*")
    ),
    *(sent(f"/image/{kind}") for kind in ("png", "jpeg", "webp", "svg")),
    sent("/xml"),
    sent("/json"),
]


def name(case: Sent) -> str:
    return f"{case.method} {case.target[:40]} {' '.join(case.headers.values())[:20]}".strip()


@pytest.mark.parametrize("case", CASES, ids=name)
def test_same_answer_as_under_gunicorn(site: Site, case: Sent) -> None:
    for fetch in (by_httpx, by_curl):
        behind, direct = (fetch(url, at("/httpbin", case)).compared(MASKS) for url in (site.bus, site.direct))
        if not direct.values("content-length"):
            behind = behind.without("content-length")  # gunicorn has framed it in chunks
        if direct.status == 407:
            # gunicorn takes Proxy-Authenticate for a hop-by-hop header and drops it.
            behind = behind.without("proxy-authenticate")
        assert behind == direct, fetch.__name__


@pytest.mark.parametrize("case", [case for case in CASES if not NOT_VALID.match(case.target)], ids=name)
def test_valid_by_wsgiref(site: Site, case: Sent) -> None:
    """The validator makes a 500 of whatever it objects to in the environ, in the app or in its iterable."""
    answer, checked = (by_httpx(site.bus, at(mount, case)) for mount in ("/httpbin", "/checked/httpbin"))
    assert checked.status == answer.status


@pytest.mark.parametrize("fetch", [by_httpx, by_curl])
def test_chunks_of_an_upload_arrive_as_one_body(site: Site, fetch: Fetch) -> None:
    headers = {"Content-Type": "text/plain"}
    answer = fetch(site.bus, Sent("/httpbin/post", "POST", headers, b"in chunks", chunked=True))
    told = json.loads(answer.body)
    assert told["data"] == "in chunks"
    assert told["headers"]["Content-Length"] == "9"
    assert "Transfer-Encoding" not in told["headers"]


def test_every_endpoint_is_requested() -> None:
    urls = httpbin.app.url_map.bind("bus.example")
    requested = set()
    for case in CASES:
        with suppress(HTTPException):
            requested.add(urls.match(case.target.partition("?")[0], case.method)[0])
    assert requested == {rule.endpoint for rule in httpbin.app.url_map.iter_rules()}


def at(mount: str, case: Sent) -> Sent:
    return replace(case, target=mount + case.target)
