"""Whatever was changed, left out, added, kept too long or sent twice is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flaskbus import wire
from flaskbus.errors import UsageError
from flaskbus.messages import Chunk, Frame, Reply, Request
from flaskbus.signing import (
    CLOCK_DOUBT,
    SIGNATURE_SIZE,
    Replays,
    Seal,
    SignatureError,
    check_keys,
    check_secret,
    make_key,
    make_seal,
    opener,
    parse_keys,
    seals_of,
    secret_fingerprint,
    signature_of,
    worth_saying,
)
from tests.unit.test_wire import frames, requests, stored

SECRET = "0123456789abcdef0123456789abcdef"
SEAL = Seal("/shop", b"k" * 32)
NOW = 1_700_000_000
REQUEST = Request("id1", "POST", "/shop/buy?x=1", "gw", 1000, headers=((b"cookie", b"a"),), body=b"data")


def entry(request: Request, seal: Seal = SEAL, expires: int = NOW) -> list[bytes]:
    """What an agent reads of a request that was signed."""
    return stored(seal.sign_request(wire.encode_request(request), expires))


class TestRequests:
    @given(requests, st.integers(0, 2**40))
    def test_signed_right(self, request: Request, expires: int) -> None:
        fields = entry(request, expires=expires)
        assert SEAL.check_request(fields, expires) == fields[-1]
        # What was signed is still the request that it was.
        assert wire.decode_request(fields, max_body=1 << 20) == request

    @given(requests, st.data())
    def test_any_changed_byte(self, request: Request, data: st.DataObject) -> None:
        fields = entry(request)
        place = data.draw(st.integers(0, len(fields) - 1).filter(lambda place: fields[place]))
        at = data.draw(st.integers(0, len(fields[place]) - 1))
        changed = bytearray(fields[place])
        changed[at] ^= data.draw(st.integers(1, 255))
        with pytest.raises(SignatureError):
            SEAL.check_request([*fields[:place], bytes(changed), *fields[place + 1 :]], NOW)

    @given(requests, st.data())
    def test_bytes_moved_from_one_field_to_the_next(self, request: Request, data: st.DataObject) -> None:
        fields = entry(request)
        place = data.draw(st.integers(0, len(fields) - 4))
        both = fields[place] + fields[place + 1]
        cut = data.draw(st.integers(0, len(both)))
        assume(cut != len(fields[place]))
        with pytest.raises(SignatureError):
            SEAL.check_request([*fields[:place], both[:cut], both[cut:], *fields[place + 2 :]], NOW)

    @given(requests, st.data())
    def test_fields_added_and_left_out(self, request: Request, data: st.DataObject) -> None:
        fields = entry(request)
        place = 2 * data.draw(st.integers(0, len(fields) // 2 - 1))
        with pytest.raises(SignatureError):
            SEAL.check_request([*fields[:place], *fields[place + 2 :]], NOW)
        with pytest.raises(SignatureError):
            SEAL.check_request([*fields[:place], b"method", b"GET", *fields[place:]], NOW)
        with pytest.raises(SignatureError):
            SEAL.check_request([*fields, b"method", b"GET"], NOW)

    @pytest.mark.parametrize("attempt", [1, 3])
    def test_an_attempt_is_signed_by_itself(self, attempt: int) -> None:
        fields = entry(replace(REQUEST, attempt=2))
        fields[fields.index(b"attempt") + 1] = str(attempt).encode()
        with pytest.raises(SignatureError, match="wrong"):
            SEAL.check_request(fields, NOW)

    @pytest.mark.parametrize(
        "other", [Seal("/shop", b"x" * 32), Seal("/shop2", SEAL.key), Seal("/", SEAL.key)]
    )
    def test_another_key_and_another_mount(self, other: Seal) -> None:
        with pytest.raises(SignatureError, match="wrong"):
            SEAL.check_request(entry(REQUEST, other), NOW)

    @pytest.mark.parametrize("fields", [[], [b"signature"], [b"id", b"x"]])
    def test_unsigned(self, fields: list[bytes]) -> None:
        assert signature_of(fields) is None
        with pytest.raises(SignatureError, match="not signed"):
            SEAL.check_request(fields, NOW)

    def test_a_frame_is_no_request(self) -> None:
        signature = SEAL.frames("id1").sign(b"")
        with pytest.raises(SignatureError, match="wrong"):
            SEAL.check_request([b"signature", signature], NOW)

    def test_a_signature_without_expiry_is_not_enough(self) -> None:
        fields = [b"id", b"x"]
        with pytest.raises(SignatureError, match="no expiry"):
            SEAL.check_request([*fields, b"signature", SEAL._of_request(fields)], NOW)

    @pytest.mark.parametrize("jump", [-7200, -3600, 0, 3600, 7200])
    def test_clocks_may_jump_by_an_hour_on_either_host(self, jump: int) -> None:
        SEAL.check_request(entry(REQUEST), NOW + jump)

    def test_too_late(self) -> None:
        with pytest.raises(SignatureError, match="expired"):
            SEAL.check_request(entry(REQUEST), NOW + CLOCK_DOUBT + 1)

    def test_two_keys_while_a_secret_is_replaced(self) -> None:
        old, new = SEAL, Seal("/shop", b"n" * 32)
        for seal in (old, new):
            fields = entry(REQUEST, seal)
            assert opener((old, new), fields, NOW) == (seal, fields[-1])
        with pytest.raises(SignatureError, match="wrong"):
            opener((old, new), entry(REQUEST, Seal("/shop", b"?" * 32)), NOW)
        with pytest.raises(SignatureError, match="no key"):
            opener((), entry(REQUEST), NOW)


class TestFrames:
    @given(frames)
    def test_signed_right(self, frame: Frame) -> None:
        element = wire.encode_frame(frame, SEAL.frames("id1").sign)
        assert SEAL.frames("id1").is_signed(element)
        # A reader without a key sees the frame, and one member more.
        assert wire.decode_frame(element, max_size=1 << 20) == frame
        assert element[-SIGNATURE_SIZE - 2 : -SIGNATURE_SIZE] == b"\xc4\x20"

    @given(frames, st.data())
    def test_any_changed_byte(self, frame: Frame, data: st.DataObject) -> None:
        element = bytearray(wire.encode_frame(frame, SEAL.frames("id1").sign))
        element[data.draw(st.integers(0, len(element) - 1))] ^= data.draw(st.integers(1, 255))
        assert not SEAL.frames("id1").is_signed(bytes(element))

    @given(frames, st.data())
    def test_a_cut_one(self, frame: Frame, data: st.DataObject) -> None:
        element = wire.encode_frame(frame, SEAL.frames("id1").sign)
        assert not SEAL.frames("id1").is_signed(element[: data.draw(st.integers(0, len(element) - 1))])

    @given(frames, st.binary(min_size=SIGNATURE_SIZE, max_size=SIGNATURE_SIZE))
    def test_an_unsigned_one(self, frame: Frame, guess: bytes) -> None:
        assert not SEAL.frames("id1").is_signed(wire.encode_frame(frame))
        assert not SEAL.frames("id1").is_signed(wire.encode_frame(frame, lambda content: guess))

    def test_of_another_request_another_mount_and_another_key(self) -> None:
        element = wire.encode_frame(Reply(1, 0, 200, (), b"ok"), SEAL.frames("id1").sign)
        assert not SEAL.frames("id2").is_signed(element)
        assert not SEAL.frames("id1", "record").is_signed(element)
        assert not Seal("/", SEAL.key).frames("id1").is_signed(element)
        assert not Seal("/shop", b"x" * 32).frames("id1").is_signed(element)

    def test_an_answer_that_is_kept_for_one_key_is_none_for_another(self) -> None:
        element = wire.encode_frame(Reply(1, 0, 200, (), b"ok"), SEAL.frames("id1", "a" * 64).sign)
        assert SEAL.frames("id1", "a" * 64).is_signed(element)
        assert not SEAL.frames("id1", "b" * 64).is_signed(element)
        assert not SEAL.frames("id1").is_signed(element)

    def test_a_large_one(self) -> None:
        frame = Chunk(1, 0, b"x" * wire.MAX_CHUNK)
        element = wire.encode_frame(frame, SEAL.frames("id1").sign)
        assert SEAL.frames("id1").is_signed(element)
        assert wire.decode_frame(element, max_size=wire.max_frame(0)) == frame


class TestReplays:
    def test_a_second_time(self) -> None:
        replays = Replays()
        replays.admit(b"one")
        replays.admit(b"two")
        with pytest.raises(SignatureError, match="before"):
            replays.admit(b"one")

    def test_it_remembers_no_more_than_it_is_told(self) -> None:
        replays = Replays(2)
        for signature in (b"one", b"two", b"three"):
            replays.admit(signature)
        with pytest.raises(SignatureError):
            replays.admit(b"two")
        replays.admit(b"one")

    def test_one_that_was_not_run_may_come_again(self) -> None:
        replays = Replays(2)
        for _ in range(3):
            replays.admit(b"one")
            replays.forgive(b"one")
        replays.forgive(b"never")
        replays.admit(b"one")
        replays.admit(b"two")
        with pytest.raises(SignatureError):
            replays.admit(b"one")


class TestKeys:
    def test_each_mount_of_each_namespace_has_its_own(self) -> None:
        made = {
            make_key(SECRET, namespace, mount)
            for namespace in ("a", "b")
            for mount in ("/", "/a", "b/", "/b")
        }
        assert len(made) == 8
        assert all(len(key) == 64 for key in made)
        assert make_key(SECRET[::-1], "a", "/") not in made

    def test_it_stays_what_it_is(self) -> None:
        known = "dc3369425b9a77ffe960c696b0c42552bde8eb4b1021fc3b52a9ef1afe08c3e5"
        assert make_key(SECRET, "flaskbus", "/shop") == known

    def test_a_gateway_and_an_agent_have_the_same(self) -> None:
        seal = make_seal(SECRET, "flaskbus", "/shop")
        assert seal is not None
        keys = parse_keys(make_key(SECRET, "flaskbus", "/shop"))
        assert seals_of(keys, ["/shop"]) == {"/shop": (seal,)}
        assert seal.fingerprint != Seal("/shop", b"x" * 32).fingerprint
        assert seal.key.hex() not in f"{seal!r} {seal.fingerprint}"

    def test_none_without_a_secret(self) -> None:
        assert make_seal("", "flaskbus", "/shop") is None
        assert seals_of(parse_keys(""), ["/shop"]) == {}

    @pytest.mark.parametrize("secret", ["", "short", "@/run/secrets/bus/that/was/never/read"])
    def test_no_key_is_made_from_what_is_no_secret(self, secret: str) -> None:
        with pytest.raises(UsageError, match="not a secret"):
            make_key(secret, "flaskbus", "/shop")

    def test_a_secret_is_long(self) -> None:
        for fine in ("", "@file", SECRET):
            check_secret(fine)
        with pytest.raises(UsageError, match="7 characters can be guessed"):
            check_secret("hunter2")

    def test_keys_of_several_mounts(self) -> None:
        one, two, three = (f"{digit}" * 64 for digit in "123")
        text = f"# keys of the shop\n/shop={one}\n  *.example.com/={two} /a=b={three}\n/shop={three}\n"
        keys = parse_keys(text)
        assert keys == {"/shop": (one, three), ".example.com/": (two,), "/a=b": (three,)}
        assert [seal.key.hex() for seal in seals_of(keys, ["/shop", "/a=b"])["/shop"]] == [one, three]

    @pytest.mark.parametrize("text", ["x", "/shop=", "A" * 64, f"shop={'1' * 64}", f"/a=/b={'1' * 63}"])
    def test_what_is_no_key(self, text: str) -> None:
        with pytest.raises(UsageError, match=r"flaskbus key /PREFIX|did you mean /shop"):
            check_keys(text)

    def test_a_file_is_read_elsewhere(self) -> None:
        check_keys("@/run/secrets/bus")

    def test_which_is_whose_must_be_clear(self) -> None:
        with pytest.raises(UsageError, match="say which"):
            seals_of({"": ("1" * 64,)}, ["/a", "/b"])
        with pytest.raises(UsageError, match="no signing key for /b among those of /a"):
            seals_of({"/a": ("1" * 64,)}, ["/a", "/b"])


def test_a_flood_of_refusals_fills_no_log() -> None:
    assert [count for count in range(1, 1000) if worth_saying(count)] == [2**power for power in range(10)]


def test_fingerprints_of_secrets() -> None:
    assert secret_fingerprint("") == ""
    assert secret_fingerprint(SECRET) != secret_fingerprint(SECRET[::-1])
    assert secret_fingerprint(SECRET) not in SECRET
