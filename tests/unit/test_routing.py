"""Mounts, and which of them a request belongs to."""

from __future__ import annotations

import contextlib
import posixpath
import re
from collections.abc import Callable
from urllib.parse import quote, unquote, unquote_to_bytes

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flaskbus.errors import AmbiguousTarget, InvalidRequest, UsageError
from flaskbus.routing import Mount, Table, origin_form, split_target

unhurried = settings(deadline=None)  # a busy machine is no failure

# ---------------------------------------------------------------------------------------------- Mount


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("/", "/"),
        ("/api", "/api"),
        ("/api/", "/api"),
        ("/a/b/c", "/a/b/c"),
        ("/münchen", "/m%C3%BCnchen"),
        ("/m%c3%bcnchen/", "/m%C3%BCnchen"),
        ("/%61pi", "/api"),
        ("/my app", "/my%20app"),
        ("/c#", "/c%23"),
        ("/a|b", "/a%7Cb"),
        ("/100%25", "/100%25"),
        ("/%FF", "/%FF"),
        ("/.well-known", "/.well-known"),
        ("/...", "/..."),
        ("/!$&'()+,=:@-._~", "/!$&'()+,=:@-._~"),
        ("/%21%40", "/!@"),
    ],
)
def test_a_prefix_becomes_canonical(written: str, canonical: str) -> None:
    assert Mount.parse(written).prefix == canonical


@pytest.mark.parametrize(
    ("prefix", "mend"),
    [
        ("", "say / to mount"),
        ("api", "did you mean /api?"),
        ("api/", "did you mean /api?"),
        ("/a/../b", "'..'"),
        ("/a/%2e%2E", "'..'"),
        ("/./a", "'.'"),
        ("//", "empty segment"),
        ("/a//b", "empty segment"),
        ("/a//", "empty segment"),
        ("/a\nb", "control character"),
        ("/a%00", "control character"),
        ("/a%7f", "control character"),
        ("/a\x85", "control character"),
        ("/a%2Fb", "encoded slash"),
        ("/a%2fb", "encoded slash"),
        ("/%2561", "encoded twice"),
        ("/100%", "say %25"),
        ("/%zz", "say %25"),
        ("/a;b", "';'"),
        ("/a%3Bb", "';'"),
        ("/caf\udce9", "not valid text"),
        *(("/a" + character, repr(character)) for character in "{}*?[]\\"),
        *((f"/a%{ord(character):02x}", repr(character)) for character in "{}*?[]\\"),
    ],
)
def test_a_bad_prefix_is_refused_with_its_mend(prefix: str, mend: str) -> None:
    with pytest.raises(UsageError, match=re.escape(mend)):
        Mount.parse(prefix)


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("", ""),
        ("Shop.Example.COM", "shop.example.com"),
        ("shop.example.com.", "shop.example.com"),
        ("*.Example.com", "*.example.com"),
        ("localhost", "localhost"),
        ("my_app-1", "my_app-1"),
        ("127.0.0.1", "127.0.0.1"),
        ("MÜNCHEN.example", "xn--mnchen-3ya.example"),
        ("*.münchen.example", "*.xn--mnchen-3ya.example"),
    ],
)
def test_a_host_becomes_canonical(written: str, canonical: str) -> None:
    assert Mount.parse("/", written).host == canonical


@pytest.mark.parametrize(
    ("host", "mend"),
    [
        ("shop.example.com:5000", "say 'shop.example.com'"),
        ("*.example.com:80", "say '*.example.com'"),
        ("http://shop.example.com", "give the name alone"),
        ("http://shop.example.com:80/", "give the name alone"),
        ("shop.example.com/api", "give the name alone"),
        ("[::1]", "IPv6"),
        ("::1", "IPv6"),
        ("*", "say shop.example.com"),
        ("*.", "say shop.example.com"),
        (".", "say shop.example.com"),
        ("*.*.example.com", "say shop.example.com"),
        ("a.*.example.com", "say shop.example.com"),
        ("*example.com", "say shop.example.com"),
        (".example.com", "say shop.example.com"),
        ("a..b", "say shop.example.com"),
        ("shop.example.com..", "say shop.example.com"),
        ("a b", "say shop.example.com"),
        ("user@shop", "say shop.example.com"),
        ("\u2100.example", "say shop.example.com"),  # becomes "a/c.example"
        ("\udce9", "say shop.example.com"),
        ("a" * 64 + ".example", "say shop.example.com"),
        (".".join(["a" * 50] * 5), "say shop.example.com"),
    ],
)
def test_a_bad_host_is_refused_with_its_mend(host: str, mend: str) -> None:
    with pytest.raises(UsageError, match=re.escape(mend)):
        Mount.parse("/", host)


def test_the_longest_host_name_of_dns_is_a_host() -> None:
    longest = ".".join(["a" * 62] * 4)[:253]
    mount = Mount.parse("/", longest)
    assert Table([mount]).match(longest + ".:65535", "/") is mount
    with pytest.raises(UsageError):
        Mount.parse("/", "*." + longest + "aaa")


@pytest.mark.parametrize(
    ("mount", "name", "key", "script_name"),
    [
        (Mount("", "/"), "/", "/", ""),
        (Mount("", "/myapp"), "/myapp", "/myapp", "/myapp"),
        (Mount("shop.example.com", "/api"), "shop.example.com/api", "shop.example.com/api", "/api"),
        (Mount("*.example.com", "/"), "*.example.com/", ".example.com/", ""),
    ],
)
def test_the_names_of_a_mount(mount: Mount, name: str, key: str, script_name: str) -> None:
    assert (mount.name, mount.key, mount.script_name, str(mount)) == (name, key, script_name, name)
    assert Mount.from_name(name) == mount
    assert Mount.from_key(key) == mount


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("", "say / for the root"),
        ("api", "did you mean /api, or api/ for a host?"),
        ("shop.example.com:80/api", "say 'shop.example.com'"),
        ("/a//b", "empty segment"),
    ],
)
def test_a_bad_name_is_refused_with_its_mend(name: str, mend: str) -> None:
    with pytest.raises(UsageError, match=re.escape(mend)):
        Mount.from_name(name)


@pytest.mark.parametrize(
    "key",
    ["", "api", "*.example.com/", "/api/", "/%61pi", "Shop.example.com/", "/a//b", "/a*", "..a/", "x.:1/"],
)
def test_a_key_that_is_not_canonical_is_not_ours(key: str) -> None:
    with pytest.raises(UsageError):
        Mount.from_key(key)


prefixes = st.lists(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6), max_size=4
).map(lambda segments: "/" + "/".join(segments))


@unhurried
@given(prefixes)
@example("/ä/%41")
def test_a_mount_is_refused_or_comes_back_from_its_key_and_name(prefix: str) -> None:
    try:
        mount = Mount.parse(prefix, "*.example.com")
    except UsageError:
        assert re.search(r"[{}*?\[\]\\;%]|//|/\.\.?(/|\Z)", prefix)
        return
    assert Mount.from_key(mount.key) == Mount.from_name(mount.name) == mount
    assert Mount.parse(mount.prefix, mount.host) == mount
    assert re.fullmatch(r"[A-Za-z0-9/%!$&'()+,=:@._~-]+", mount.key)
    assert unquote(mount.prefix) == (unquote(prefix).rstrip("/") or "/")


@unhurried
@given(st.text(), st.text())
def test_whatever_is_written_gives_a_mount_or_a_usage_error(prefix: str, host: str) -> None:
    try:
        mount = Mount.parse(prefix, host)
    except UsageError:
        return
    assert Mount.from_key(mount.key) == mount


# ------------------------------------------------------------------------------------- Table: prefixes

PREFIXES = Table(map(Mount.parse, ["/", "/a", "/a/b", "/a/b/c/d", "/api", "/münchen", "/a|b", "/c:d@e"]))


@pytest.mark.parametrize(
    ("path", "prefix"),
    [
        ("/", "/"),
        ("/x", "/"),
        ("/a", "/a"),
        ("/a/", "/a"),
        ("/ab", "/"),
        ("/A", "/"),
        ("/a/bc", "/a"),
        ("/a/b", "/a/b"),
        ("/a/b/c", "/a/b"),
        ("/a/b/c/d", "/a/b/c/d"),
        ("/a/b/c/d/", "/a/b/c/d"),
        ("/a/b/c/de", "/a/b"),
        ("/a/b/c/d/e/f/g/h/i/j", "/a/b/c/d"),
        ("/x" * 2000, "/"),
        ("/%61", "/a"),
        ("/m%C3%BCnchen/x", "/m%C3%BCnchen"),
        ("/m%c3%bCnchen", "/m%C3%BCnchen"),
        ("/m%FCnchen", "/"),
        ("/a|b/x", "/a%7Cb"),
        ("/a%7cb/x", "/a%7Cb"),
        ("/c%3Ad%40e", "/c:d@e"),
        ("/a/*/x", "/a"),
    ],
)
def test_the_longest_prefix_on_whole_segments_wins(path: str, prefix: str) -> None:
    mount = PREFIXES.match("", path)
    assert mount is not None
    assert mount.prefix == prefix


def test_without_a_default_the_rest_is_nobodys() -> None:
    table = Table([Mount.parse("/api")])
    assert table.match("", "/x") is None
    assert table.match("", "/") is None
    assert table.match("", "/apis") is None
    assert Table().match("localhost", "/") is None


# ---------------------------------------------------------------------------------------- Table: hosts

HOSTS = Table(
    map(
        Mount.from_name,
        [
            "/",
            "/any",
            "shop.example.com/api",
            "*.example.com/",
            "*.example.com/wild",
            "*.b.example.com/deep",
            "localhost/local",
        ],
    )
)


@pytest.mark.parametrize(
    ("host", "path", "name"),
    [
        ("shop.example.com", "/api/x", "shop.example.com/api"),
        ("SHOP.Example.com", "/api", "shop.example.com/api"),
        ("shop.example.com.", "/api", "shop.example.com/api"),
        ("shop.example.com:5000", "/api", "shop.example.com/api"),
        ("shop.example.com.:", "/api", "shop.example.com/api"),
        ("shop.example.com", "/wild", "*.example.com/wild"),
        ("shop.example.com", "/x", "*.example.com/"),
        ("shop.example.com", "/any", "*.example.com/"),  # the host decides before the prefix
        ("a.b.example.com", "/deep", "*.b.example.com/deep"),
        ("a.b.example.com", "/wild", "*.example.com/wild"),
        ("b.example.com", "/deep", "*.example.com/"),
        ("example.com", "/wild", "/"),
        ("notexample.com", "/wild", "/"),
        ("shop.example.com.evil", "/api", "/"),
        ("localhost:8080", "/local", "localhost/local"),
        ("localhost", "/any", "/any"),
        ("", "/local", "/"),
        ("", "/any", "/any"),
        ("127.0.0.1:80", "/any", "/any"),
        ("[::1]", "/any", "/any"),
        ("[2001:DB8::1]:65535", "/any", "/any"),
        ("[::ffff:1.2.3.4]:1", "/any", "/any"),
    ],
)
def test_the_most_specific_host_that_has_a_prefix_wins(host: str, path: str, name: str) -> None:
    mount = HOSTS.match(host, path)
    assert mount is not None
    assert mount.name == name


def test_a_host_of_its_own_is_no_default_for_others() -> None:
    table = Table([Mount.parse("/", "shop.example.com")])
    assert table.match("", "/") is None
    assert table.match("www.example.com", "/") is None


@pytest.mark.parametrize("table", [HOSTS, PREFIXES], ids=["with hosts", "without hosts"])
@pytest.mark.parametrize(
    "host",
    [
        "user@shop.example.com",
        "a/b@c",
        "shop.example.com/x",
        " shop.example.com",
        "shop.example.com\n",
        "shop example.com",
        "shop\x00.example.com",
        "a..b",
        ".example.com",
        "shop.example.com..",
        ".",
        ":80",
        "shop:x",
        "shop:-1",
        "shop:65536",
        "shop:80:80",
        "shop:٨٠",
        "*.example.com",
        "shop,www",
        "sh%6Fp",
        "münchen.example",
        "\u212aelvin",  # KELVIN SIGN, whose lower case is "k"
        "::1",
        "[::1",
        "[]",
        "[:]",
        "[1.2.3.4]",
        "[fe80::1%eth0]",
        "[::1]x",
        "a" * 300,
    ],
)
def test_a_bad_host_header_is_refused(table: Table, host: str) -> None:
    with pytest.raises(InvalidRequest):
        table.match(host, "/")


# ------------------------------------------------------------------------------------- Table: readings


@pytest.mark.parametrize(
    "path",
    [
        "",
        "a",
        "*",
        "a/b",
        "\\a",
        " /",
        "/a b",
        "/a\t",
        "/a\n",
        "/a\x7f",
        "/ä",
        "/a\x00",
        "/%00",
        "/a/%00/b",
        "/a#b",
    ],
)
def test_a_malformed_path_is_refused(path: str) -> None:
    with pytest.raises(InvalidRequest):
        PREFIXES.match("", path)


@pytest.mark.parametrize(
    "path",
    [
        "//api",
        "/a//b",
        "/x/../api",
        "/api/..",
        "/api/../x",
        "/api/%2e%2E/x",
        "/api/.%2e/x",
        "/./api",
        "/%2e/api",
        "/../api",
        "/%2Fapi",
        "/a%2fb",
        "/a%2Fb/x",
        "/api%2fx",
        "/api/..%2fx",
        "/api%2f..%2fx",
        "/\\api",
        "/a\\b",
        "/a%5Cb",
        "/a%5cb/x",
        "/api/..\\x",
        "/api\\..\\..\\x",
        "/api/..%5Cx",
        "/api;x",
        "/api;x/y",
        "/api%3Bx",
        "/a;x/b",
        "/api/..;/x",
        "/api/..;v=1/x",
        "/api/.;/../x",
        "/;/api",
        "/%2561",
        "/%2561pi/x",
        "/api/%252e%252e/x",
        "/api/%252e%252e%252fx",
        "/api/..%252fx",
        "/%%361",
        "/%2%66api",
        "/api/x%2fy/%252e%252e/%252e%252e/x",
        "/a/b/x%5cy/..\\..\\c",
        "/api/q/..%2f..%2fx/..%2fapi%2fq/..",  # climbs out only where dots go before and after decoding
    ],
)
def test_a_path_that_leads_to_two_mounts_is_refused(path: str) -> None:
    with pytest.raises(AmbiguousTarget):
        PREFIXES.match("", path)


@pytest.mark.parametrize(
    ("path", "prefix"),
    [
        ("//", "/"),
        ("//x//y", "/"),
        ("/x/../y", "/"),
        ("/.well-known/acme", "/"),
        ("/api/.hidden", "/api"),
        ("/api/.", "/api"),
        ("/api/x/..", "/api"),
        ("/api/x/%2e%2e/y", "/api"),
        ("/api/...", "/api"),
        ("/api//", "/api"),
        ("/api/a%2Fb", "/api"),
        ("/api/x%2f..%2fy", "/api"),
        ("/api/a\\b", "/api"),
        ("/api/a%5Cb", "/api"),
        ("/api/x;v=1", "/api"),
        ("/x;v=1/y", "/"),
        ("/api/%253Cb%253E", "/api"),
        ("/api/100%25", "/api"),
        ("/api/100%", "/api"),
        ("/api/%zz", "/api"),
        ("/%zz", "/"),
        ("/api/http:%2F%2Fexample.com%2Fa", "/api"),
        ("/api/http://example.com/a;b//c", "/api"),
        ("/api/x%0Ay%20z", "/api"),
        ("/a/b/c/x%2fy", "/a/b"),
        ("/api/C%3A%5Cdocs%2Fa;v=1//b", "/api"),
    ],
)
def test_what_is_harmless_goes_through(path: str, prefix: str) -> None:
    mount = PREFIXES.match("", path)
    assert mount is not None
    assert mount.prefix == prefix


def test_a_path_that_may_lead_out_of_all_mounts_is_refused() -> None:
    table = Table([Mount.parse("/api")])
    with pytest.raises(AmbiguousTarget):
        table.match("", "/api/../x")
    with pytest.raises(AmbiguousTarget):
        table.match("", "/x/../api")
    assert table.match("", "/x/../y") is None


def test_the_mounts_of_one_host_do_not_make_paths_of_another_ambiguous() -> None:
    table = Table(map(Mount.from_name, ["/", "shop.example.com/", "shop.example.com/api"]))
    assert table.match("www.example.com", "/x/../api") == Mount("", "/")
    with pytest.raises(AmbiguousTarget):
        table.match("shop.example.com", "/x/../api")


def test_a_reading_may_not_change_the_host_pattern_either() -> None:
    table = Table(map(Mount.from_name, ["/", "shop.example.com/api"]))
    with pytest.raises(AmbiguousTarget):
        table.match("shop.example.com", "/api/../x")


def test_the_work_for_one_path_is_bounded() -> None:
    path = "/x%2f..\\y//%5c;z/%252f;%255c../a%253bb//c%2f%2f;/.%252e"
    with pytest.raises(AmbiguousTarget, match="too many"):
        Table([Mount.parse("/")]).match("", path)


# ----------------------------------------------------------------------------------- Table: properties

words = st.sampled_from(["a", "b", "ab", "ä", "x y", "a|b", "~", "..."])
word_paths = st.lists(words, max_size=5).map(lambda segments: "/" + "/".join(segments))


def slow_match(mounts: list[Mount], path: str) -> Mount | None:
    """The rule in its plainest words, for mounts of any host."""
    segments = [unquote_to_bytes(segment) for segment in path.split("/")[1:]]
    best: tuple[int, Mount | None] = (-1, None)
    for mount in mounts:
        wanted = [unquote_to_bytes(segment) for segment in mount.script_name.split("/")[1:]]
        if segments[: len(wanted)] == wanted and len(wanted) > best[0]:
            best = (len(wanted), mount)
    return best[1]


@unhurried
@given(st.lists(word_paths.map(Mount.parse), max_size=8), word_paths, st.data())
def test_every_spelling_of_a_path_leads_where_the_rule_says(
    mounts: list[Mount], path: str, data: st.DataObject
) -> None:
    def spell(byte: int) -> str:
        raw = chr(byte)
        if raw == "/" or (byte < 128 and raw.isalnum() and data.draw(st.booleans())):
            return raw
        return f"%{byte:02X}" if data.draw(st.booleans()) else f"%{byte:02x}"

    spelled = "".join(spell(byte) for byte in path.encode())
    expected = slow_match(mounts, quote(path))
    mount = Table(mounts).match("", spelled)
    assert mount == expected


pieces = st.sampled_from(
    ["/", "/a", "/b", "a", "b", ".", "..", "/..", "\\", ";", ";a", "x"]
) | st.sampled_from(["%2e", "%2F", "%2f", "%5C", "%3b", "%61", "%25", "%252e", "%252f", "%255c", "%", "2f"])
odd_paths = st.lists(pieces, max_size=10).map(lambda parts: "/" + "".join(parts))


def nginx(path: str) -> str:
    return re.sub("//+", "/", unquote(path))


def browser(path: str) -> str:
    return posixpath.normpath(path.replace("\\", "/").replace("%2e", "."))


def windows(path: str) -> str:
    return unquote(path).replace("\\", "/")


def tomcat(path: str) -> str:
    return posixpath.normpath(unquote(re.sub(";[^/]*", "", path)))


def twice(path: str) -> str:
    return unquote(unquote(path))


def normalized(path: str) -> str:
    return re.sub("^//", "/", posixpath.normpath(unquote(path)))


AB = [Mount.parse(prefix) for prefix in ("/", "/a", "/a/b", "/b")]
AB_TABLE = Table(AB)


@pytest.mark.parametrize("server", [nginx, browser, windows, tomcat, twice, normalized])
@unhurried
@given(path=odd_paths)
def test_what_is_let_through_means_the_same_to_other_servers(server: Callable[[str], str], path: str) -> None:
    try:
        mount = AB_TABLE.match("", path)
    except AmbiguousTarget:
        return
    read = server(path)
    # What is left of escapes is text to a server that has decoded.
    escaped = read if server is browser else read.replace("%", "%25")
    assert slow_match(AB, re.sub("^//", "/", escaped) if server is not windows else escaped) == mount
    assert slow_match(AB, path) == mount


@unhurried
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30))
def test_only_what_has_two_readings_is_called_ambiguous(text: str) -> None:
    try:
        AB_TABLE.match("", "/" + text)
    except AmbiguousTarget:
        assert re.search(r"//|/\.|[\\;%]", "/" + text)
    except InvalidRequest:
        assert re.search(r"[ #]|%00", text)


@unhurried
@given(st.text(), st.text())
def test_whatever_a_client_sends_is_matched_or_refused(host: str, path: str) -> None:
    for table in (HOSTS, PREFIXES):
        with contextlib.suppress(InvalidRequest, AmbiguousTarget):
            assert table.match(host, path) is not None


# --------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/", "/", ""),
        ("/a?b=c", "/a", "b=c"),
        ("/a?", "/a", ""),
        ("/a?b?c", "/a", "b?c"),
        ("/?%2F", "/", "%2F"),
    ],
)
def test_a_target_is_a_path_and_a_query(target: str, path: str, query: str) -> None:
    assert split_target(target) == (path, query)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/a?b", ("/a?b", "www.example.com")),
        ("//a", ("//a", "www.example.com")),
        ("http://shop.example.com/a?b", ("/a?b", "shop.example.com")),
        ("HTTPS://Shop:8443/", ("/", "Shop:8443")),
        ("http://shop", ("/", "shop")),
        ("http://shop?b", ("/?b", "shop")),
    ],
)
def test_an_absolute_target_brings_its_host(target: str, expected: tuple[str, str]) -> None:
    assert origin_form(target, "www.example.com") == expected


@pytest.mark.parametrize("target", ["", "*", "a", "shop:443", "http:///a", "http:/a", "ftp://shop/a"])
def test_other_forms_of_a_target_are_refused(target: str) -> None:
    with pytest.raises(InvalidRequest):
        origin_form(target, "")


def test_the_user_in_an_absolute_target_is_refused_as_a_host() -> None:
    _, host = origin_form("http://user@shop/a", "")
    with pytest.raises(InvalidRequest):
        HOSTS.match(host, "/a")
