"""Idempotency-Key: what is one key, one operation, one caller; and what may be kept."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flaskbus.errors import InvalidRequest, UsageError
from flaskbus.idempotency import (
    Keeper,
    Policy,
    caller,
    fingerprint,
    header_names,
    may_keep,
    parse_key,
    record_name,
)
from flaskbus.messages import NOT_RUN, Chunk, End, Failure, Frame, Head, Headers, Reply
from flaskbus.settings import AgentSettings, build

ALICE: Headers = ((b"authorization", b"Bearer alice"),)
ON = Policy(60_000)


class TestKeys:
    @pytest.mark.parametrize(
        ("value", "key"),
        [
            (b"8e03978e-40d5-43dd-bc93-6894a57f9324", b"8e03978e-40d5-43dd-bc93-6894a57f9324"),
            (b'"8e03978e-40d5-43dd-bc93-6894a57f9324"', b"8e03978e-40d5-43dd-bc93-6894a57f9324"),
            (b"  key\t", b"key"),
            (b'"two words"', b"two words"),
            (rb'"a \"b\" \\c"', rb'a "b" \c'),
            (b'"a, b"', b"a, b"),
            (b"a;b=c/d+e==", b"a;b=c/d+e=="),
            (b"!#$%&'()*+-./09:;<=>?@AZ[\\]^_`az{|}~", b"!#$%&'()*+-./09:;<=>?@AZ[\\]^_`az{|}~"),
            (b"x" * 255, b"x" * 255),
            (b'"%s"' % (b"x" * 255), b"x" * 255),
            (b'"%s"' % (b'\\"' * 255), b'"' * 255),
        ],
    )
    def test_one_key(self, value: bytes, key: bytes) -> None:
        assert parse_key([value]) == key

    @pytest.mark.parametrize(
        "values",
        [
            [], [b"a", b"a"], [b""], [b" "], [b'""'], [b'"'], [b'"a'], [b'a"'], [b'"a"b"'], [b'"a";p=1'], [b"a, b"],
            [b"a,b"], [b"two words"], [b"caf\xc3\xa9"], [b'"caf\xe9"'], [b"a\x7f"], [b'"a\tb"'], [rb'"a\b"'],
            [b"x" * 256], [b'"%s"' % (b"x" * 256)], [b"(a b)"],
        ],
    )  # fmt: skip
    def test_what_is_not_one(self, values: list[bytes]) -> None:
        with pytest.raises(InvalidRequest, match="must be one key of 1 to 255") as caught:
            parse_key(values)
        assert caught.value.executed == "no"

    @given(st.lists(st.binary(max_size=300), max_size=3))
    def test_any_bytes_are_a_key_or_refused(self, values: list[bytes]) -> None:
        try:
            key = parse_key(values)
        except InvalidRequest:
            return
        assert 1 <= len(key) <= 255
        assert all(32 <= byte < 127 for byte in key)


texts = st.text(st.characters(max_codepoint=255), max_size=4)
names = st.tuples(
    st.sampled_from(["POST", "PUT", "PATCH", "POS"]),
    st.sampled_from(["", "a.example", "b.example", "a.example.", "1.2.3.4", "[::1]"]),
    texts,
    st.binary(max_size=4),
    st.binary(max_size=4),
)
credentials = st.lists(
    st.tuples(
        st.sampled_from([b"authorization", b"cookie", b"x-api-key", b"accept"]),
        st.sampled_from([b"", b"a", b"b", b"ab", b"a; b", b"authorization"]),
    ),
    max_size=4,
).map(tuple)


def identity(headers: Headers) -> tuple[object, ...]:
    """What an app could tell callers apart by."""
    cookies = [value for name, value in headers if name == b"cookie"]
    return (
        [value for name, value in headers if name == b"authorization"],
        b"; ".join(cookies) if cookies else None,
        [value for name, value in headers if name == b"x-api-key"],
    )


class TestRecords:
    @given(names, names)
    @example(("POST", "", "/a", b"b", b""), ("POST", "", "/", b"ab", b""))
    @example(("POST", "", "/a", b"b", b""), ("POST", "", "/a", b"", b"b"))
    def test_two_operations_never_share_one(
        self, one: tuple[str, str, str, bytes, bytes], other: tuple[str, str, str, bytes, bytes]
    ) -> None:
        assert (record_name(*one) == record_name(*other)) is (one == other)

    @given(credentials, credentials)
    @example(((b"authorization", b"a"),), ((b"cookie", b"a"),))
    @example(((b"authorization", b""),), ())
    def test_two_callers_are_never_one(self, one: Headers, other: Headers) -> None:
        same = caller(one, [b"x-api-key"]) == caller(other, [b"x-api-key"])
        assert same is (identity(one) == identity(other))

    def test_nobody(self) -> None:
        assert caller(((b"accept", b"*/*"), (b"x-user", b"a"))) == b""
        assert caller(((b"x-user", b"a"),), [b"x-user"]) != b""

    def test_http_2_may_cut_a_cookie_in_pieces(self) -> None:
        assert caller(((b"cookie", b"a=1; b=2"),)) == caller(((b"cookie", b"a=1"), (b"cookie", b"b=2")))

    @pytest.mark.parametrize(
        "host", ["Shop.Example", "shop.example:5000", "shop.example:", "SHOP.EXAMPLE:80"]
    )
    def test_case_and_port_of_the_host_do_not_matter(self, host: str) -> None:
        assert record_name("POST", host, "/", b"k", b"") == record_name(
            "POST", "shop.example", "/", b"k", b""
        )

    def test_nothing_of_a_client_is_in_the_name(self) -> None:
        assert len(record_name("POST", "h", "/{secret}*", b"key", b"")) == 64
        int(record_name("POST", "h", "/{secret}*", b"key", b""), 16)


class TestPolicy:
    def record(self, method: str = "POST", *headers: tuple[bytes, bytes], policy: Policy = ON) -> str:
        return policy.record(method, "h", "/t", (*ALICE, *headers))

    @pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "PROPPATCH"])
    def test_a_key_counts_where_something_may_change(self, method: str) -> None:
        name = self.record(method, (b"idempotency-key", b'"k"'))
        assert name == record_name(method, "h", "/t", b"k", caller(ALICE))

    @pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "TRACE"])
    def test_and_means_nothing_where_nothing_does(self, method: str) -> None:
        assert self.record(method, (b"idempotency-key", b"not, a, key")) == ""

    def test_without_a_key(self) -> None:
        assert self.record("POST", (b"accept", b"*/*")) == ""

    def test_a_wrong_one(self) -> None:
        with pytest.raises(InvalidRequest):
            self.record("POST", (b"idempotency-key", b"a"), (b"idempotency-key", b"b"))

    def test_what_tells_callers_apart(self) -> None:
        key, tenant = (b"idempotency-key", b"k"), (b"x-tenant", b"1")
        assert self.record("POST", key) == self.record("POST", key, tenant)
        knows = Policy(60_000, (b"x-tenant",))
        assert self.record("POST", key, policy=knows) != self.record("POST", key, tenant, policy=knows)

    @pytest.mark.parametrize("policy", [ON, Policy(1, (b"x-api-key", b"x-tenant"))])
    def test_there_and_back(self, policy: Policy) -> None:
        fields = policy.fields()
        ttl, who = (str(fields[name]).encode() for name in ("idempotency_ttl", "idempotency_identity"))
        assert Policy.load(ttl, who) == policy

    @pytest.mark.parametrize("ttl", [None, b"", b"soon", b"9" * 16])
    def test_not_opted_in(self, ttl: bytes | None) -> None:
        assert Policy.load(ttl, None) is None

    def test_what_a_stranger_wrote_makes_no_two_callers_one(self) -> None:
        assert Policy.load(b"5", None) == Policy(5)
        assert Policy.load(b"5", b"a b,,\xff") == Policy(5, (b"a b", b"\xff"))


class TestSettings:
    def test_off_by_default(self) -> None:
        assert AgentSettings().policy is None

    def test_on(self) -> None:
        settings = build(
            AgentSettings,
            {"idempotency_keys": "yes", "idempotency_ttl": "2m", "idempotency_identity": "X-User, x-b"},
        )
        assert settings.policy == Policy(120_000, (b"x-user", b"x-b"))
        assert settings.keeper == Keeper(120_000, 64 * 1024, (b"x-user", b"x-b"))
        assert AgentSettings(idempotency_keys=True).policy == Policy(86_400_000, (b"x-api-key",))

    @pytest.mark.parametrize("names", ["x_user", "a b", "a:b", "ä"])
    def test_what_is_no_header(self, names: str) -> None:
        with pytest.raises(ValueError, match="not the name of a header"):
            header_names(names)
        with pytest.raises(UsageError, match="idempotency_identity"):
            build(AgentSettings, {"idempotency_identity": names})


class TestBodies:
    JSON = (b"content-type", b"application/json")

    def test_the_same_body(self) -> None:
        assert fingerprint((self.JSON, *ALICE), b"{}") == fingerprint(((b"accept", b"*/*"), self.JSON), b"{}")

    @pytest.mark.parametrize(
        ("headers", "body"),
        [
            ((JSON,), b"{ }"),
            ((), b"{}"),
            ((JSON, (b"content-encoding", b"gzip")), b"{}"),
            (((b"content-encoding", b"application/json"),), b"{}"),
        ],
    )
    def test_another(self, headers: Headers, body: bytes) -> None:
        assert fingerprint(headers, body) != fingerprint((self.JSON,), b"{}")

    def test_a_body_is_no_header(self) -> None:
        assert fingerprint((), b"content-type") != fingerprint(((b"content-type", b""),), b"")


class TestKeeping:
    @pytest.mark.parametrize(
        ("request_headers", "reply_headers", "may"),
        [
            ((), ((b"Content-Type", b"text/plain"),), True),
            ((), ((b"Set-Cookie", b"session=1"),), False),
            (ALICE, ((b"Set-Cookie", b"session=1"),), True),
            (((b"cookie", b"old=1"),), ((b"set-cookie", b"session=1"),), True),
            (((b"x-user", b"a"),), ((b"set-cookie", b"session=1"),), False),
        ],
    )
    def test_a_session_is_for_the_one_who_began_it(
        self, request_headers: Headers, reply_headers: Headers, may: bool
    ) -> None:
        assert may_keep(request_headers, reply_headers) is may

    @pytest.mark.parametrize(
        ("frames", "size", "fate"),
        [
            ([Reply(1, 0, 201, (), b"tea")], 100, "answered"),
            ([Reply(1, 0, 500, (), b"")], 100, "answered"),
            ([Reply(1, 0, 201, (), b"tea")], 101, "unkept"),
            ([Reply(1, 0, 201, ((b"set-cookie", b"a=1"),), b"")], 1, "unkept"),
            ([Head(1, 0, 200, ()), Chunk(1, 1, b"tea"), End(1, 2)], 1, "unkept"),
            ([End(1, 5)], 1, "unkept"),
            ([Head(1, 0, 200, ()), Failure(1, 1, "app-error", "it raised")], 1, "unkept"),
            ([Failure(1, 0, NOT_RUN, "the agent stops")], 1000, "released"),
        ],
    )
    def test_what_becomes_of_a_record(self, frames: list[Frame], size: int, fate: str) -> None:
        assert Keeper(1, 100).fate((), frames, size) == fate

    def test_a_caller_may_be_known_by_another_header(self) -> None:
        assert may_keep(((b"x-user", b"a"),), ((b"set-cookie", b"session=1"),), [b"x-user"])
