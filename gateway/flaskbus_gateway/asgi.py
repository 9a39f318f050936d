"""The gateway for another ASGI server: ``uvicorn flaskbus_gateway.asgi:app``.

Settings come from the environment and the configuration file, as for ``flaskbus-gateway``. What is about
connections (host, port, TLS, keepalive, header_timeout …) is then that server's to know; it should run with
lifespan on, and must leave ``X-Forwarded-*`` to the gateway (uvicorn: ``--no-proxy-headers``).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flaskbus.config import find_file, resolve
from flaskbus.errors import OperatorError
from flaskbus.settings import GatewaySettings
from flaskbus_gateway.app import Gateway


def _settings() -> GatewaySettings:
    try:
        file = find_file(None, os.environ, Path())
        return resolve(GatewaySettings, flags={}, environ=os.environ, file=file).settings
    except OperatorError as error:
        print(f"flaskbus gateway: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


app = Gateway(_settings())
