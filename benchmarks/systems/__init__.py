"""The systems, in the order in which they are shown."""

from __future__ import annotations

from benchmarks.systems.base import System
from benchmarks.systems.flaskbus import Flaskbus
from benchmarks.systems.gunicorn import Gunicorn, GunicornAsgi, NginxGunicorn
from benchmarks.systems.inprocess import InProcess
from benchmarks.systems.nginx import NginxGranian
from benchmarks.systems.uwsgi import Uwsgi

SYSTEMS: tuple[System, ...] = (
    Flaskbus(),
    NginxGunicorn("gthread"),
    NginxGunicorn("gevent"),
    NginxGranian(),
    Uwsgi(),
    Gunicorn(),
    GunicornAsgi(),
    InProcess(),
)
