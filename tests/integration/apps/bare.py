"""A bare WSGI callable that tells what it was asked."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING
from wsgiref.validate import validator

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment


def tell(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    body = environ["wsgi.input"].read(-1)
    told = {
        "environ": {key: value for key, value in environ.items() if isinstance(value, str)},
        "length": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    text = json.dumps(told, indent=1).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(text)))])
    return [text]


app = validator(tell)
