"""Dead letters: what is kept and what is not, what can be read again, and what a replay needs."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaskbus.errors import UsageError
from flaskbus.keys import DEAD_FIELD
from flaskbus.letters import (
    FIELDS_KEPT,
    HEADERS_KEPT,
    NAME_KEPT,
    REASON_KEPT,
    Field,
    Letter,
    Mend,
    is_secret,
    mended,
    of_request,
    of_stranger,
    redact_target,
)
from flaskbus.messages import Headers, Request

AT = datetime(2026, 11, 21, 8, 0, 0, 123, UTC)
KEY = b"1763712345678-0"


def request(**members: object) -> Request:
    given: dict[str, object] = {
        "id": "r1",
        "method": "PUT",
        "target": "/shop/cart",
        "gateway": "gw",
        "ttl": 30_000,
        "headers": ((b"host", b"shop.example"),),
        "body": b"tea",
        "attempt": 3,
    }
    return Request(**(given | members))  # type: ignore[arg-type]


def stored(letter: list[Field]) -> dict[bytes, bytes]:
    """The letter as the broker gives it back."""
    flat = [part if isinstance(part, bytes) else str(part).encode() for part in letter]
    assert len(flat) % 2 == 0
    return dict(zip(flat[::2], flat[1::2], strict=True))


def buried(one: Request, keep: int = 1000) -> dict[bytes, bytes]:
    return stored(of_request(one, "3 agents died", at=AT, entry=b"1-1", keep=keep))


def loaded(one: Request, keep: int = 1000) -> Letter:
    return Letter.load(KEY, buried(one, keep))


def stranger(*fields: bytes, reason: str = "not ours") -> dict[bytes, bytes]:
    return stored(of_stranger(fields, reason, at=AT, entry=b"1-1"))


# What is secret


@pytest.mark.parametrize(
    "name",
    [
        "authorization", "proxy-authorization", "cookie", "x-api-key", "apikey", "api_key", "x-auth-token",
        "x-csrf-token", "x-amz-security-token", "access_token", "client_secret", "password", "passwd", "pwd",
        "X-Amz-Signature", "X-Amz-Credential", "sig", "key", "auth", "x-auth", "sessionid", "jwt",
        "AWSAccessKeyId", "PrivateKey",
    ],
)  # fmt: skip
def test_names_of_credentials(name: str) -> None:
    assert is_secret(name.encode())
    assert is_secret(name.upper().encode())


@pytest.mark.parametrize(
    "name",
    [
        "accept",
        "host",
        "author",
        "content-type",
        "idempotency-key",
        "sort_key",
        "monkey",
        "design",
        "page",
        "x-request-id",
    ],
)
def test_names_of_all_else(name: str) -> None:
    assert not is_secret(name.encode())


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ("/a", "/a"),
        ("/a?", "/a?"),
        ("/a?b=1&token=hush&c=2", "/a?b=1&token=(redacted)&c=2"),
        ("/a?token=hush", "/a?token=(redacted)"),
        ("/a?t%6Fken=hush", "/a?t%6Fken=(redacted)"),
        ("/a?b=1;token=hush;c", "/a?b=1;token=(redacted);c"),
        ("/a?token=hush=more", "/a?token=(redacted)"),
        ("/a?token=&b", "/a?token=&b"),
        ("/a?token", "/a?token"),
        ("/a?x=1?token=no", "/a?x=1?token=no"),
        ("/token=a?author=me", "/token=a?author=me"),
    ],
)
def test_redacted_targets(target: str, kept: str) -> None:
    assert redact_target(target) == kept
    assert redact_target(kept) == kept


# A letter of ours


def test_plain_fields_come_first_and_then_the_request() -> None:
    letter = buried(request(traceparent="00-a-b-01"))
    assert list(letter) == [
        b"id", b"method", b"target", b"reason", b"attempt", b"at", b"size", b"cut", b"from", b"entry",
        b"ttl", b"traceparent", b"head", b"body",
    ]  # fmt: skip
    assert letter[b"at"] == b"2026-11-21T08:00:00+00:00"
    assert (letter[b"size"], letter[b"cut"], letter[b"entry"]) == (b"3", b"", b"1-1")
    assert (letter[b"reason"], letter[b"attempt"]) == (b"3 agents died", b"3")


def test_it_is_read_again_as_it_was() -> None:
    one = request()
    letter = loaded(one)
    assert letter.request is not None
    assert replace(letter.request, version=one.version) == one
    assert (letter.key, letter.id, letter.method, letter.target) == (KEY.decode(), "r1", "PUT", "/shop/cart")
    assert (letter.attempt, letter.size, letter.cut, letter.sender) == (3, 3, (), "gw")
    assert (letter.fields, letter.redacted) == ((), ((), ()))


def test_credentials_do_not_stay() -> None:
    one = request(
        target="/shop/cart?access_token=hush&page=2",
        headers=(
            (b"authorization", b"Bearer hush"),
            (b"cookie", b"a=hush"),
            (b"cookie", b"b=hush"),
            (b"x-api-key", b"hush"),
            (b"referer", b"https://x/?token=hush"),
            (b"accept", b"text/html"),
        ),
    )
    letter = buried(one)
    assert not any(b"hush" in value for value in letter.values())
    assert letter[b"target"] == b"/shop/cart?access_token=(redacted)&page=2"
    found = Letter.load(KEY, letter)
    assert found.redacted == (("authorization", "cookie", "x-api-key"), ("access_token",))
    assert found.request is not None
    assert found.request.headers[-2:] == (
        (b"referer", b"https://x/?token=(redacted)"),
        (b"accept", b"text/html"),
    )


@pytest.mark.parametrize(
    ("keep", "kept", "cut"), [(3, b"tea", ()), (2, b"te", ("body",)), (0, b"", ("body",))]
)
def test_a_body_is_cut_and_says_so(keep: int, kept: bytes, cut: tuple[str, ...]) -> None:
    letter = loaded(request(), keep)
    assert letter.request is not None
    assert (letter.request.body, letter.size, letter.cut) == (kept, 3, cut)


def test_a_head_is_never_cut_in_the_middle() -> None:
    many = tuple((b"x-%03d" % number, b"v" * 1000) for number in range(100))
    letter = loaded(request(headers=many))
    assert letter.request is not None
    kept = letter.request.headers
    assert kept == many[: len(kept)]
    assert HEADERS_KEPT - 1006 <= sum(len(name) + len(value) for name, value in kept) <= HEADERS_KEPT
    assert letter.cut == ("headers",)


def test_headers_and_body_can_both_be_cut() -> None:
    letter = loaded(request(headers=((b"x", b"v" * HEADERS_KEPT),)), 1)
    assert letter.cut == ("headers", "body")
    assert letter.request is not None
    assert letter.request.headers == ()


@given(
    st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=2000)), max_size=60),
    st.binary(max_size=3000),
    st.integers(0, 2000),
)
def test_any_request_has_a_bounded_letter_that_can_be_read(
    headers: list[tuple[bytes, bytes]], body: bytes, keep: int
) -> None:
    one = request(headers=tuple(headers), body=body)
    letter = buried(one, keep)
    # Each header costs up to ten bytes of msgpack beside what it holds.
    assert sum(map(len, letter.values())) <= HEADERS_KEPT + 10 * len(headers) + keep + 500
    found = Letter.load(KEY, letter)
    assert found.request is not None
    assert found.request.body == body[:keep]
    assert ("body" in found.cut) == (len(body) > keep)


def test_a_long_reason_is_cut() -> None:
    assert len(stranger(b"a", b"b", reason="x" * 9999)[b"reason"]) == REASON_KEPT


# A letter of a stranger


def test_its_fields_are_kept_under_names_of_their_own() -> None:
    letter = stranger(b"id", b"x1", b"from", b"gw", b"attempt", b"2", b"reason", b"mine", b"hello", b"world")
    assert list(letter)[:10] == list(buried(request()))[:10]
    assert (letter[b"id"], letter[b"from"], letter[b"attempt"]) == (b"x1", b"gw", b"2")
    assert (letter[b"reason"], letter[b"was:reason"]) == (b"not ours", b"mine")
    assert (
        letter[b"size"]
        == str(sum(map(len, [b"idx1", b"fromgw", b"attempt2", b"reasonmine", b"helloworld"]))).encode()
    )
    found = Letter.load(KEY, letter)
    assert found.request is None
    assert dict(found.fields)[b"hello"] == b"world"
    assert (found.cut, found.redacted) == ((), ((), ()))


def test_an_empty_entry() -> None:
    found = Letter.load(KEY, stranger())
    assert (found.id, found.method, found.target, found.size, found.fields) == ("", "", "", 0, ())


def test_a_field_without_a_value_is_left_out() -> None:
    assert Letter.load(KEY, stranger(b"a", b"1", b"b")).fields == ((b"a", b"1"),)


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        (b"body", b"x" * 10_000, b"x" * DEAD_FIELD),
        (b"authorization", b"Bearer hush", b"(redacted)"),
        (b"data", b'{"Authorization": "Bearer hush"}', b'{"(redacted)'),
        (b"head", b"\x93\xc4\x06Cookie\xc4\x04hush", b"\x93\xc4\x06(redacted)"),
        (b"data", b"x" * (DEAD_FIELD - 3) + b"jwt=hush", b"x" * (DEAD_FIELD - 3) + b"(re"),
        (b"target", b"/a?token=hush", b"/a?token=(redacted)"),
        (b"n" * 1000, b"v", b"v"),
    ],
)  # fmt: skip
def test_a_field_is_cut_at_its_length_and_where_a_credential_begins(
    name: bytes, value: bytes, kept: bytes
) -> None:
    letter = stranger(name, value)
    assert letter[b"was:" + name[:NAME_KEPT]] == kept
    assert letter[b"cut"] == b"fields"
    assert not any(b"hush" in each for each in letter.values())


def test_its_plain_fields_are_redacted_and_cut_too() -> None:
    letter = stranger(b"target", b"/a?token=hush", b"method", b"M" * 9999, b"from", b"g" * 9999)
    assert letter[b"target"] == b"/a?token=(redacted)"
    assert (len(letter[b"method"]), len(letter[b"from"])) == (DEAD_FIELD, DEAD_FIELD)


def test_the_number_of_fields_is_bounded() -> None:
    letter = stranger(*(b"%d" % number for number in range(20_000)))
    assert sum(name.startswith(b"was:") for name in letter) == FIELDS_KEPT
    assert letter[b"cut"] == b"fields"


@given(st.lists(st.binary(max_size=300), max_size=100))
def test_any_entry_has_a_bounded_letter(fields: list[bytes]) -> None:
    letter = stranger(*fields)
    assert len(letter) <= FIELDS_KEPT + 10
    assert Letter.load(KEY, letter).request is None


@given(
    st.dictionaries(
        st.sampled_from([b"id", b"head", b"body", b"ttl", b"size", b"attempt", b"x"]) | st.binary(),
        st.binary(),
    )
)
def test_whatever_lies_in_the_stream_can_be_read(fields: dict[bytes, bytes]) -> None:
    letter = Letter.load(KEY, fields)
    assert isinstance(letter.size, int)


@pytest.mark.parametrize("value", [b"-1", b"1" * 99, b"x", b"\xb2", b""])
def test_numbers_that_are_none(value: bytes) -> None:
    assert Letter.load(KEY, {b"size": value, b"attempt": value}).size == 0


@pytest.mark.parametrize("body", [b"\xdd\xff\xff\xff\xff", b"\x91" * 5000, b"\xc6\xff\xff\xff\xff", b"\x80"])
def test_msgpack_that_is_a_bomb_is_not_a_request(body: bytes) -> None:
    good = buried(request())
    for name in (b"head", b"body"):
        letter = Letter.load(KEY, good | {name: body})
        assert letter.request is None
        assert dict(letter.fields)[name] == body


# Replay


def replayed(letter: Letter, headers: Headers = (), body: bytes | None = None, **mend: object) -> Request:
    return mended(letter, Mend(headers=headers, body=body, **mend))  # type: ignore[arg-type]


SECRET = request(
    target="/shop/cart?a=1&token=hush&b=2",
    headers=(
        (b"host", b"h"),
        (b"authorization", b"hush"),
        (b"x-api-key", b"hush"),
        (b"content-length", b"3"),
    ),
)


def test_what_was_kept_whole_is_sent_as_it_was() -> None:
    one = request(target="/shop/cart?a=1&")
    again = replayed(loaded(one))
    assert (again.target, again.headers, again.body) == (one.target, one.headers, one.body)


def test_it_has_no_part_in_the_record_of_its_idempotency_key() -> None:
    one = request(headers=((b"host", b"shop.example"), (b"idempotency-key", b"k")), idempotency="0" * 64)
    assert replayed(loaded(one)) == replace(one, idempotency="")


def test_credentials_have_to_be_given() -> None:
    with pytest.raises(
        UsageError, match=r"without the value of authorization, x-api-key; say -H 'Authorization: …'"
    ):
        replayed(loaded(SECRET))
    authorization = ((b"authorization", b"new"),)
    with pytest.raises(UsageError, match=r"without the value of x-api-key; say -H 'X-Api-Key: …'"):
        replayed(loaded(SECRET), authorization)
    both = (*authorization, (b"x-api-key", b"newer"))
    with pytest.raises(UsageError, match=r"the value of token in its query; say --target"):
        replayed(loaded(SECRET), both)
    again = replayed(loaded(SECRET), both, target="/shop/cart?token=new")
    assert again.target == "/shop/cart?token=new"
    assert again.headers == ((b"host", b"h"), (b"content-length", b"3"), *both)


def test_or_left_out() -> None:
    again = replayed(loaded(SECRET), without_credentials=True)
    assert again.target == "/shop/cart?a=1&b=2"
    assert again.headers == ((b"host", b"h"), (b"content-length", b"3"))
    given = replayed(loaded(SECRET), ((b"authorization", b"new"),), without_credentials=True)
    assert given.headers[-1] == (b"authorization", b"new")


@pytest.mark.parametrize(
    ("target", "left"),
    [
        ("/a?token=x", "/a"),
        ("/a?b=1;key=x", "/a?b=1"),
        ("/a?key=x;b=1", "/a?b=1"),
        ("/a?b=1&sig=x&c=2", "/a?b=1&c=2"),
    ],
)
def test_a_query_without_its_secrets(target: str, left: str) -> None:
    assert replayed(loaded(request(target=target)), without_credentials=True).target == left


def test_a_header_that_is_given_takes_the_place_of_all_of_its_name() -> None:
    one = request(headers=((b"accept", b"a"), (b"accept", b"b"), (b"host", b"h")))
    again = replayed(loaded(one), ((b"accept", b"c"),))
    assert again.headers == ((b"host", b"h"), (b"accept", b"c"))


def test_a_body_that_was_cut_has_to_be_given() -> None:
    one = request(headers=((b"content-length", b"3"), (b"host", b"h")))
    letter = loaded(one, 1)
    with pytest.raises(
        UsageError, match="only 1 of the 3 bytes of its body; give the whole with --data @FILE"
    ):
        replayed(letter)
    again = replayed(letter, body=b"coffee")
    assert again.body == b"coffee"
    assert again.headers == ((b"host", b"h"), (b"content-length", b"6"))


def test_what_lost_headers_or_is_no_request_cannot_be_sent() -> None:
    with pytest.raises(
        UsageError, match=r"has lost headers, which were larger than 64 KiB; .* flaskbus request PUT"
    ):
        replayed(loaded(request(headers=((b"x", b"v" * HEADERS_KEPT),))))
    with pytest.raises(UsageError, match="is not a request of ours"):
        replayed(Letter.load(KEY, stranger(b"a", b"b")))
