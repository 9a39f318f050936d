"""Protocols built on HTTP, spoken by programs that other people wrote: the same through the bus as without it."""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import re
import xmlrpc.client
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.integration.fleet import eventually
from tests.integration.protocols import Both, CuttingLine, Served, attempt, both, needs, run, same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MIB = 1024 * 1024
numbers = itertools.count(1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    with both(tmp_path_factory.mktemp("protocols")) as found:
        yield found


@pytest.fixture
def place(tmp_path: Path) -> Callable[[], Path]:
    """Makes an empty folder at each call."""

    def make() -> Path:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return folder

    return make


Place = Callable[[], Path]


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


# Git

AUTHOR = [
    word
    for setting in ("user.name=tester", "user.email=tester@bus.example", "commit.gpgsign=false", "gc.auto=0")
    for word in ("-c", setting)
]
DATE = "2020-01-01T00:00:00Z"


def git(folder: Path, *words: str) -> str:
    return run("git", *AUTHOR, *words, cwd=folder, GIT_AUTHOR_DATE=DATE, GIT_COMMITTER_DATE=DATE)


def commit(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", f"--message={name}")


def working_tree(folder: Path) -> Path:
    git(folder, "init", "--quiet", "--initial-branch=main")
    commit(folder, "readme", b"a small file\n")
    return folder


def bare(served: Served, name: str) -> str:
    """An empty repository on a server; its name."""
    repository = f"{name}-{next(numbers)}.git"
    git(served.root, "init", "--quiet", "--bare", "--initial-branch=main", f"git/{repository}")
    git(served.root / "git" / repository, "config", "http.receivepack", "true")
    return repository


@pytest.mark.parametrize("version", ["0", "2"])
def test_git(pair: Both, place: Place, version: str) -> None:
    """Bodies whole and in chunks, requests that are compressed, and packs that are larger than any window."""

    def verdict(served: Served) -> Any:
        repository = bare(served, "plain")
        url, setting = f"{served.url}/git/{repository}", ["-c", f"protocol.version={version}"]
        ours, theirs = working_tree(place()), place()
        found: list[Any] = [git(ours, *setting, "ls-remote", url)]
        git(ours, *setting, "push", "--quiet", url, "main")
        git(theirs, *setting, "clone", "--quiet", url, ".")
        # Many commits that the server does not have: git compresses what it says of them.
        for number in range(60):
            git(theirs, "commit", "--quiet", "--allow-empty", f"--message=theirs {number}")
        commit(ours, "large", noise(1, 5 * MIB))
        git(ours, *setting, "-c", "http.postBuffer=65536", "push", "--quiet", url, "main", "main:other")
        git(theirs, *setting, "fetch", "--quiet", "origin")
        found += [git(theirs, "rev-parse", "origin/main", "origin/other"), git(theirs, "fsck", "--full")]
        refused = attempt("git", *AUTHOR, *setting, "push", "--quiet", url, "main", cwd=theirs)
        found += [refused.returncode, b"rejected" in refused.stdout]
        shallow = place()
        git(shallow, *setting, "clone", "--quiet", "--depth=1", url, ".")
        found += [git(shallow, "rev-list", "--count", "HEAD"), (shallow / "large").stat().st_size]
        git(ours, *setting, "push", "--quiet", url, ":other")
        found += [git(ours, *setting, "ls-remote", url)]
        missing = attempt("git", *AUTHOR, "ls-remote", f"{served.url}/git/none.git", cwd=ours)
        return [*found, missing.returncode, b"not found" in missing.stdout]

    *_, count, size, refs, _, said = same(pair, verdict)
    assert (count, size, said) == ("1\n", 5 * MIB, True)
    assert "refs/heads/main" in refs
    assert "refs/heads/other" not in refs


def test_git_and_dulwich_on_either_end(pair: Both, place: Place) -> None:
    from dulwich import porcelain

    def verdict(served: Served) -> Any:
        ours = working_tree(place())
        commit(ours, "large", noise(2, 3 * MIB))
        # dulwich's server takes chunks apart that its server took apart already, so it gets none.
        url = f"{served.url}/dulwich/both.git"
        git(ours, "-c", "http.postBuffer=50m", "push", "--quiet", "--force", url, "main")
        cloned = place() / "clone"
        porcelain.clone(url, str(cloned), errstream=io.BytesIO()).close()
        found: list[Any] = [git(cloned, "rev-parse", "HEAD"), (cloned / "large").stat().st_size]
        commit(cloned, "more", noise(3, 2 * MIB))
        url = f"{served.url}/git/{bare(served, 'dulwich')}"
        porcelain.push(str(cloned), url, "main", outstream=io.BytesIO(), errstream=io.BytesIO())
        back = place() / "back"
        porcelain.clone(url, str(back), errstream=io.BytesIO()).close()
        return [*found, git(back, "rev-parse", "HEAD"), git(back, "fsck", "--full")]

    assert same(pair, verdict)[1] == 3 * MIB


CUTS = [40, 800, 300_000, 700_000, -1, -900, -300_000]
"""Bytes; positive ones cut a push, negative ones a clone."""


def test_git_over_a_line_that_breaks(pair: Both, place: Place) -> None:
    """However far a push or a fetch came, the repository is whole, and the next one succeeds."""

    def verdict(served: Served) -> Any:
        repository = bare(served, "broken")
        ours, found = working_tree(place()), []
        for number, cut in enumerate(CUTS):
            commit(ours, "large", noise(100 + number, 1 * MIB))
            with CuttingLine(served.url, [cut]) as line:
                url, chunked = f"{line.url}/git/{repository}", ("-c", "http.postBuffer=65536")
                words = ["git", *AUTHOR, *chunked]
                if cut > 0:
                    first = attempt(*words, "push", "--quiet", url, "main", cwd=ours)
                    git(ours, *chunked, "push", "--quiet", url, "main")
                else:
                    git(ours, "push", "--quiet", f"{served.url}/git/{repository}", "main")
                    first = attempt(*words, "clone", "--quiet", url, ".", cwd=place())
                    git(place(), "clone", "--quiet", url, ".")
                # A line that breaks after all was said harms nobody.
                assert line.left == 0 or first.returncode == 0
            there = served.root / "git" / repository
            found += [git(there, "rev-parse", "main")]
        git(there, "fsck", "--full")
        return found

    assert len(set(same(pair, verdict))) == len(CUTS)


# WebDAV


def test_litmus(pair: Both, place: Place) -> None:
    """All suites of litmus: basic, copymove, props, locks and http."""
    needs("litmus")

    def verdict(served: Served) -> Any:
        said = attempt("litmus", "-k", f"{served.url}/dav/", cwd=place()).stdout.decode()
        return dict(
            re.findall(r"^ *(?:[0-9]+\. [a-z0-9_.]+ +)*[0-9]+\. ([a-z0-9_]+)\.+ (\w+.*)$", said, re.M)
        ), [line for line in said.splitlines() if line.startswith("<-")]

    found = same(pair, verdict)
    assert len(found[1]) == 5
    assert all(line.endswith("0 failed. 100.0%") for line in found[1])


def test_cadaver(pair: Both, place: Place) -> None:
    needs("cadaver")

    def verdict(served: Served) -> Any:
        folder = place()
        (folder / "large").write_bytes(noise(4, 5 * MIB))
        (folder / "small").write_text("a few words")
        script = (
            f"open {served.url}/dav/\nmkcol cadaver\ncd cadaver\nput large\nput small\nls\n"
            "copy small 'other one'\nmove 'other one' moved\nlock small\npropset small shade blue\n"
            "propget small shade\ndiscover small\nunlock small\nget large back\ncat moved\ndelete moved\nls\n"
            "cd ..\nrmcol cadaver\nls\nquit\n"
        )
        said = run("cadaver", cwd=folder, input=script.encode(), HOME=str(folder))
        assert (folder / "back").read_bytes() == noise(4, 5 * MIB)
        return re.sub(
            rf"{served.url}|opaquelocktoken:\w+|\w+ +\d+ +\d\d:\d\d|Progress:.*\r|\[\.*|\d+ seconds",
            "?",
            said,
        )

    assert "blue" in same(pair, verdict)


def test_webdavclient(pair: Both, place: Place) -> None:
    from webdav3.client import Client

    def verdict(served: Served) -> Any:
        folder = place()
        (folder / "deep").mkdir()
        for number in range(5):
            (folder / "deep" / f"grün {number}").write_bytes(noise(number, number * 400_000))
        client = Client({"webdav_hostname": served.url, "webdav_root": "/dav/"})
        client.mkdir("tree")
        client.push(remote_directory="tree", local_directory=str(folder / "deep"))
        client.copy(remote_path_from="tree/grün 4", remote_path_to="tree/copy")
        (folder / "back").mkdir()
        client.pull(remote_directory="tree", local_directory=str(folder / "back"))
        digests = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((folder / "back").iterdir())
        }
        found = [digests, sorted(client.list("tree")), client.info("tree/copy")["size"]]
        client.clean("tree")
        return [*found, client.check("tree")]

    assert len(same(pair, verdict)[0]) == 6


@pytest.mark.parametrize(
    "options",
    [
        ["--header", "Expect: 100-continue"],
        ["--header", "Transfer-Encoding: chunked"],
        ["--limit-rate", "2M"],
    ],
    ids=["expect", "chunked", "slow"],
)
def test_curl_puts_and_gets(pair: Both, place: Place, options: list[str]) -> None:
    needs("curl")

    def verdict(served: Served) -> Any:
        folder, url = place(), f"{served.url}/dav/by-curl"
        code = ["-sS", "-w", "%{http_code}", "-o"]
        (folder / "sent").write_bytes(noise(5, 3 * MIB))
        put = run("curl", *code, "said", "-T", "sent", *options, url, cwd=folder)
        part = run("curl", *code, "part", "-r", "1000000-", url, cwd=folder)
        run("curl", "-sS", "-C", "-", "-o", "got", *options[-2:], url, cwd=folder)
        run("curl", "-sS", "-X", "DELETE", url, cwd=folder)
        assert (folder / "got").read_bytes() == noise(5, 3 * MIB)
        return put, part, hashlib.sha256((folder / "part").read_bytes()).hexdigest()

    assert same(pair, verdict)[:2] == ("201", "206")


# S3


def s3(url: str, attempts: int = 1) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="somebody",
        aws_secret_access_key="secret",
        config=Config(
            retries={"total_max_attempts": attempts, "mode": "standard"}, s3={"addressing_style": "path"}
        ),
    )


def test_s3(pair: Both) -> None:
    """Objects in parts, sent and fetched by several threads; bodies in aws-chunked; answers as a stream."""
    from boto3.s3.transfer import TransferConfig

    data = noise(6, 17 * MIB)
    parts = TransferConfig(multipart_threshold=5 * MIB, multipart_chunksize=6 * MIB, max_concurrency=3)

    def verdict(served: Served) -> Any:
        client = s3(served.url)
        client.create_bucket(Bucket="bucket")
        client.upload_fileobj(io.BytesIO(data), "bucket", "large", Config=parts)
        back = io.BytesIO()
        client.download_fileobj("bucket", "large", back, Config=parts)
        streamed = hashlib.sha256()
        for part in client.get_object(Bucket="bucket", Key="large")["Body"].iter_chunks(100_000):
            streamed.update(part)
        tag = client.head_object(Bucket="bucket", Key="large")["ETag"]
        found = [back.getvalue() == data, streamed.hexdigest(), tag]
        for algorithm, size in itertools.product(("CRC32", "SHA256"), (0, 1000, 400_000, 3 * MIB)):
            client.put_object(
                Bucket="bucket", Key="sum", Body=io.BytesIO(data[:size]), ChecksumAlgorithm=algorithm
            )
            got = client.get_object(Bucket="bucket", Key="sum", ChecksumMode="ENABLED")
            found += [got["Body"].read() == data[:size], got.get(f"Checksum{algorithm}")]
        ranged = client.get_object(Bucket="bucket", Key="large", Range="bytes=5000000-5999999")
        found += [ranged["ContentRange"], ranged["Body"].read() == data[5_000_000:6_000_000]]
        client.copy({"Bucket": "bucket", "Key": "large"}, "bucket", "gr\xfcn/copy #1", Config=parts)
        found += [[item["Key"] for item in client.list_objects_v2(Bucket="bucket")["Contents"]]]
        with pytest.raises(client.exceptions.NoSuchKey):
            client.get_object(Bucket="bucket", Key="none")
        client.delete_objects(Bucket="bucket", Delete={"Objects": [{"Key": key} for key in found[-1]]})
        client.delete_bucket(Bucket="bucket")
        return found

    found = same(pair, verdict)
    assert found[0]
    assert found[1] == hashlib.sha256(data).hexdigest()
    assert found[-1] == ["gr\xfcn/copy #1", "large", "sum"]


def test_s3_over_a_line_that_breaks(pair: Both) -> None:
    """boto3 tries again, and the object is whole."""
    from boto3.s3.transfer import TransferConfig

    data = noise(7, 12 * MIB)
    parts = TransferConfig(multipart_threshold=5 * MIB, multipart_chunksize=5 * MIB, max_concurrency=1)

    def verdict(served: Served) -> Any:
        with CuttingLine(served.url, [100_000, 3_000_000, 300, -10, 2_000_000, 600_000]) as line:
            client = s3(line.url, attempts=8)
            client.create_bucket(Bucket="broken")
            client.upload_fileobj(io.BytesIO(data), "broken", "large", Config=parts)
            assert line.left == 0
        with CuttingLine(served.url, [-5, -400_000, -4_000_000, -2_000_000]) as line:
            back = io.BytesIO()
            s3(line.url, attempts=8).download_fileobj("broken", "large", back, Config=parts)
            assert line.left == 0
        return back.getvalue() == data

    assert same(pair, verdict)


# Mercurial


def test_mercurial(pair: Both, place: Place) -> None:
    def verdict(served: Served) -> Any:
        url = f"{served.url}/hg"
        ours, theirs, streamed = place(), place(), place()
        hg = ["hg", "--config", "ui.username=tester"]
        run(*hg, "init", cwd=ours)
        for number, size in enumerate([10, 5 * MIB]):
            (ours / f"file {number}").write_bytes(noise(number, size))
            run(*hg, "commit", "--addremove", f"--message={number}", "--date=2020-01-01", cwd=ours)
        run(*hg, "push", url, cwd=ours)
        run(*hg, "clone", url, ".", cwd=theirs)
        run(*hg, "clone", "--stream", url, ".", cwd=streamed)
        (theirs / "more").write_bytes(noise(9, 1 * MIB))
        run(*hg, "commit", "--addremove", "--message=more", "--date=2020-01-02", cwd=theirs)
        run(*hg, "bookmark", "here", cwd=theirs)
        run(*hg, "push", "-B", "here", url, cwd=theirs)
        run(*hg, "pull", "--update", url, cwd=ours)
        run(*hg, "verify", "--quiet", cwd=streamed)
        run(*hg, "verify", "--quiet", cwd=served.root / "hg")
        return run(*hg, "log", "--template={node} {bookmarks}\n", cwd=ours)

    assert len(same(pair, verdict).splitlines()) == 3


# A package index


def wheel(folder: Path, version: str) -> Path:
    """A wheel of a package that has nothing but a large file."""
    path, about = folder / f"carried-{version}-py3-none-any.whl", f"carried-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("carried/data", noise(8, 2 * MIB))
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: carried\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


def test_a_package_index(pair: Both, place: Place) -> None:
    def verdict(served: Served) -> Any:
        folder, got, index = place(), place(), f"{served.url}/index"
        wheels = [str(wheel(folder, version)) for version in ("1.0", "2.0")]
        upload = [
            "twine",
            "upload",
            "--non-interactive",
            "--disable-progress-bar",
            "--username=a",
            "--password=b",
        ]
        run(*upload, f"--repository-url={index}/", *wheels, cwd=folder)
        pip = ["pip", "download", "--isolated", "--no-cache-dir", "--no-deps", "--disable-pip-version-check"]
        run(*pip, f"--index-url={index}/simple/", "carried<2", cwd=got)
        return {path.name: path.read_bytes() == (folder / path.name).read_bytes() for path in got.iterdir()}

    assert same(pair, verdict) == {"carried-1.0-py3-none-any.whl": True}


# tus


TUS = {
    "in one request": (100 * MIB, []),
    "in several": (1 * MIB, []),
    "in several that break": (3 * MIB, [0, 1_500_000, 50, 0, 400_000, -20, 0, 2_000_000]),
    "in one that breaks": (100 * MIB, [0, 400, 0, 2_000_000, 60, 0, 300_000, 0, 1_000_000]),
}
"""Bytes of a request, and where the lines of the first connections break."""


@pytest.mark.parametrize(("chunk_size", "cuts"), TUS.values(), ids=TUS)
def test_tus(pair: Both, chunk_size: int, cuts: list[int]) -> None:
    """Uploads that the client goes on with where the server says that it has got to."""
    from tusclient.client import TusClient
    from tusclient.exceptions import TusCommunicationError

    data = noise(10, 6 * MIB)

    def verdict(served: Served) -> Any:
        with CuttingLine(served.url, cuts) as line:
            client = TusClient(f"{line.url}/small/files")
            uploader = client.uploader(file_stream=io.BytesIO(data), chunk_size=chunk_size)

            def whole() -> bool:
                with suppress(OSError, TusCommunicationError):
                    uploader.offset = uploader.get_offset() if uploader.url else 0
                    uploader.upload()
                return bool(uploader.offset == len(data))

            eventually(whole)
            stored = (served.root / "tus" / str(uploader.url).rpartition("/")[2]).read_bytes()
            return line.left, uploader.offset, stored == data

    assert same(pair, verdict) == (0, len(data), True)


# XML-RPC


def test_xml_rpc(pair: Both) -> None:
    def verdict(served: Served) -> Any:
        with xmlrpc.client.ServerProxy(f"{served.url}/small/rpc", allow_none=True) as server:
            many = xmlrpc.client.MultiCall(server)
            for number in range(2000):
                many.add(number, number)
            found = [server.system.listMethods(), server.add(1, 2), [*iter(many())]]
            found.append(
                server.same(xmlrpc.client.Binary(noise(11, MIB))) == xmlrpc.client.Binary(noise(11, MIB))
            )
            with pytest.raises(xmlrpc.client.Fault) as fault:
                server.none()
            return [*found, fault.value.faultString]

    assert same(pair, verdict)[3]
