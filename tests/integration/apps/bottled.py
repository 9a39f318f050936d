"""A Bottle app: routes, forms, uploads, signed cookies, redirects, files, generators and errors."""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import bottle

HERE = Path(__file__).parent
SECRET = "not much of one"

site = bottle.Bottle()


@site.get("/")
def index() -> str:
    bottle.response.set_cookie("seen", "yes", secret=SECRET, path="/")
    bottle.response.set_cookie("theme", "dark")
    page: str = bottle.template("<p>{{name}} at {{url}}", name="Größe & <b>", url=bottle.request.url)
    return page


@site.get("/who")
def who() -> dict[str, Any]:
    request = bottle.request
    return {
        "seen": request.get_cookie("seen", secret=SECRET),
        "url": request.url,
        "script_name": request.script_name,
        "path": request.path,
        "query": sorted(request.query.allitems()),
        "remote": request.remote_addr,
    }


@site.post("/upload")
def upload() -> dict[str, Any]:
    sent = bottle.request.files["file"]
    return {"name": sent.raw_filename, "size": len(sent.file.read()), "note": bottle.request.forms.note}


@site.post("/sums")
def sums() -> dict[str, Any]:
    request = bottle.request
    return {
        "form": {key: request.forms.getunicode(key) for key in request.forms},
        "files": {
            each.raw_filename: hashlib.file_digest(each.file, "sha256").hexdigest()
            for each in request.files.values()
        },
    }


@site.route("/any", method="ANY")
def echo() -> bytes:
    bottle.response.set_header("X-Method", bottle.request.method)
    body: bytes = bottle.request.body.read()
    return body


@site.get("/away")
def away() -> None:
    bottle.redirect("who?from=away")


@site.get("/file/<name:path>")
def file(name: str) -> Any:
    return bottle.static_file(name, root=HERE / "static")


@site.get("/lines")
def lines() -> Iterator[str]:
    for number in range(5):
        yield f"line {number}\n"


@site.get("/teapot")
def teapot() -> None:
    bottle.abort(418, "short and stout")


@site.get("/crash")
def crash() -> None:
    raise RuntimeError("as it should")


app = validator(site)
