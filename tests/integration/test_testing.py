"""``flaskbus.testing`` as another project meets it: found by pytest, in a directory with settings of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

APP = """
from wsgiref.validate import validator

from flask import Flask, request

app = Flask(__name__)
app.wsgi_app = validator(app.wsgi_app)


@app.get("/hello")
def hello():
    return f"hello from {request.script_root}"
"""

TEST = """
from urllib.request import urlopen

from shop import app


def test_hello(flaskbus_mount):
    url = flaskbus_mount(app, prefix="/shop")
    assert urlopen(f"{url}/hello").read() == b"hello from /shop"
"""

SETTINGS = """
namespace = "production"

[gateway]
host = "unix:/no/such/directory/socket"
"""


def test_the_settings_of_the_tested_project_are_left_aside(tmp_path: Path) -> None:
    for name, text in (("shop.py", APP), ("test_shop.py", TEST), ("flaskbus.toml", SETTINGS)):
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shop.py"],
        cwd=tmp_path,
        env={**os.environ, "FLASKBUS_CERTFILE": "/no/such.pem", "FLASKBUS_NAMESPACE": "staging"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
