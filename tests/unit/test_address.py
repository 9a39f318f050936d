"""Brokers' URLs: what they mean, what is wrong with them, and what of them is shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaskbus.address import Address, Tls, mask, parse_url
from flaskbus.errors import UsageError

GOOD = {
    "redis://": Address("single", (("127.0.0.1", 6379),)),
    "redis://cache": Address("single", (("cache", 6379),)),
    "redis://cache:7000/3": Address("single", (("cache", 7000),), db=3),
    "redis://[::1]:7000": Address("single", (("::1", 7000),)),
    "redis://[::1]": Address("single", (("::1", 6379),)),
    "redis://:p%40ss@cache?db=2": Address("single", (("cache", 6379),), db=2, password="p@ss"),
    "redis://ann:a:b@cache": Address("single", (("cache", 6379),), username="ann", password="a:b"),
    "redis://cache?username=ann&password=x": Address(
        "single", (("cache", 6379),), username="ann", password="x"
    ),
    "unix:///run/redis%20one.sock": Address("single", (("127.0.0.1", 6379),), path="/run/redis one.sock"),
    "unix://ann:x@/run/redis.sock?db=1": Address(
        "single", (("127.0.0.1", 6379),), path="/run/redis.sock", db=1, username="ann", password="x"
    ),
    "rediss://cache": Address("single", (("cache", 6379),), tls=Tls()),
    "rediss://cache?ssl_ca_certs=/ca.pem&ssl_certfile=/c.pem&ssl_keyfile=/k.pem": Address(
        "single", (("cache", 6379),), tls=Tls("/ca.pem", "/c.pem", "/k.pem")
    ),
    "rediss://cache?ssl_cert_reqs=none": Address(
        "single", (("cache", 6379),), tls=Tls(verify="none", check_hostname=False)
    ),
    "rediss://cache?ssl_cert_reqs=CERT_OPTIONAL": Address(
        "single", (("cache", 6379),), tls=Tls(verify="optional")
    ),
    "rediss://cache?ssl_check_hostname=False": Address(
        "single", (("cache", 6379),), tls=Tls(check_hostname=False)
    ),
    "redis+sentinel://s1,s2:7000,[::1]:7001/mymaster/2": Address(
        "sentinel", (("s1", 26379), ("s2", 7000), ("::1", 7001)), db=2, service="mymaster"
    ),
    "rediss+sentinel://ann:x@s1/my%20master?sentinel_username=bob&sentinel_password=y": Address(
        "sentinel",
        (("s1", 26379),),
        username="ann",
        password="x",
        tls=Tls(),
        service="my master",
        sentinel_username="bob",
        sentinel_password="y",
    ),
    "redis+cluster://ann:x@n1:7000,n2": Address(
        "cluster", (("n1", 7000), ("n2", 6379)), username="ann", password="x"
    ),
    "rediss+cluster://n1/0": Address("cluster", (("n1", 6379),), tls=Tls()),
}


@pytest.mark.parametrize("url", GOOD)
def test_a_url_is_taken_apart(url: str) -> None:
    assert parse_url(url) == GOOD[url]


def test_the_first_node_stands_for_all() -> None:
    address = parse_url("redis+cluster://n1:7000,n2")
    assert (address.host, address.port) == ("n1", 7000)


BAD = {
    "http://cache": "redis+sentinel://",
    "cache:6379": "begins with redis://",
    "redis://cache:port": "not a host and its port",
    "redis://cache:0": "not a host and its port",
    "redis://cache:65536": "not a host and its port",
    "redis://[::1": "is not valid",
    "redis://[::1]x:1": "is not valid",
    "redis://cache/one": "not the number of a database",
    "redis://cache/-1": "not the number of a database",
    "redis+sentinel://s1": "redis+sentinel://s1/mymaster",
    "redis+sentinel://s1/": "redis+sentinel://s1/mymaster",
    "redis+cluster://n1/1": "no databases",
    "unix://": "unix:///run",
    "redis://cache?ssl_ca_certs=/ca.pem": "rediss",
    "redis://cache?sentinel_password=x": "for redis+sentinel://",
    "redis://cache?socket_timeout=1": "unknown option 'socket_timeout'",
    "rediss://cache?ssl_ca_cert=/ca.pem": "did you mean 'ssl_ca_certs'",
    "rediss://cache?ssl_cert_reqs=maybe": "required, optional or none",
    "rediss://cache?ssl_check_hostname=maybe": "true or false",
}


@pytest.mark.parametrize("url", BAD)
def test_what_is_wrong_is_said(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_url(url)
    assert BAD[url] in str(caught.value)
    assert "\n" not in str(caught.value)


MASKED = {
    "redis://cache/1": "redis://cache/1",
    "redis://ann@cache": "redis://ann@cache",
    "redis://:secret@cache": "redis://:***@cache",
    "redis://ann:secret@cache:1/2": "redis://ann:***@cache:1/2",
    "redis://ann:se@cret@cache": "redis://ann:***@cache",
    "unix://ann:secret@/run/redis.sock?db=1": "unix://ann:***@/run/redis.sock?db=1",
    "unix:///run/redis.sock?password=secret&db=1": "unix:///run/redis.sock?password=***&db=1",
    "unix:///run/redis.sock?pass%77ord=secret": "unix:///run/redis.sock?pass%77ord=***",
    "redis+sentinel://ann:secret@s1,s2/m?sentinel_username=bob&sentinel_password=secret": (
        "redis+sentinel://ann:***@s1,s2/m?sentinel_username=bob&sentinel_password=***"
    ),
    "redis+cluster://:secret@n1:1,n2:2": "redis+cluster://:***@n1:1,n2:2",
    "redis://:sec/ret@cache": "redis://:***@cache",
    "redis://:sec?ret@cache": "redis://:***@cache",
    "redis://cache:1?password=sec@ret": "redis://cache:1?password=***",
    "redis://[::1": "redis://[::1",
    "secret": "secret",
    "redis:/:secret@cache": "redis:***@cache",
}


@pytest.mark.parametrize("url", MASKED)
def test_passwords_are_masked(url: str) -> None:
    assert mask(url) == MASKED[url]


@given(st.sampled_from(sorted(GOOD)), st.text(), st.integers(0, 80))
def test_a_url_with_a_slip_is_understood_or_refused(url: str, slip: str, place: int) -> None:
    text = url[:place] + slip + url[place:]
    try:
        address = parse_url(text)
    except UsageError:
        return
    assert address.nodes
    assert all(0 < port < 65536 for _, port in address.nodes)


@pytest.mark.parametrize("place", ["/", "?", "#", "/2", "@/"])
@pytest.mark.parametrize("scheme", ["redis://", "rediss+cluster://", "redis:/", "http://"])
def test_a_password_that_looks_like_more_of_the_url_is_not_shown(scheme: str, place: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_url(f"{scheme}:hunter{place}hunter@cache")
    assert "hunter" not in str(caught.value)


@given(st.sampled_from(["redis", "unix", "redis+sentinel", "rediss+cluster"]), st.integers(0, 3))
def test_no_password_is_shown_in_an_error(scheme: str, where: int) -> None:
    login = ":hunter2@" if where in (0, 2) else ""
    query = "?sentinel_password=hunter2&password=hunter2" if where in (1, 2) else ""
    try:
        parse_url(f"{scheme}://{login}host/x/y/z{query}")
    except UsageError as error:
        assert "hunter2" not in str(error)  # noqa: PT017
