"""The gateway as processes: gunicorn's arbiter keeps workers alive, each of which runs the ASGI app.

Signals are gunicorn's: TERM lets requests finish, INT and QUIT do not, HUP reads the configuration again and
replaces the workers, TTIN and TTOU change their number, USR1 opens the log files anew.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from gunicorn import sock, systemd
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger as GunicornLogger

from flaskbus.broker import mask
from flaskbus.errors import OperatorError, StartError
from flaskbus.forking import signals_held
from flaskbus.rlimit import raise_file_limit
from flaskbus.settings import GatewaySettings
from flaskbus_gateway.listening import bind_address, check_tls, listen, turn_away, url
from flaskbus_gateway.worker import Worker

AppFactory = Callable[[GatewaySettings], Any]
"""Settings -> ASGI application that supports lifespan; called in each worker."""

log = logging.getLogger("flaskbus.gateway")

HANDSHAKES = 0.05
"""Seconds for connections that clients have begun to make when we stop."""

QUICK = 5.0
"""Seconds that workers have to put themselves in order, if they are not to let requests finish."""


def gateway(settings: GatewaySettings) -> Any:
    """The :class:`~flaskbus_gateway.app.Gateway`."""
    # Imported in the workers, so that replacing them is enough to run new code.
    from flaskbus_gateway.app import Gateway

    return Gateway(settings)


def serve(
    settings: GatewaySettings,
    *,
    factory: AppFactory = gateway,
    reread: Callable[[], GatewaySettings] | None = None,
    watch: Iterable[Path] = (),
) -> NoReturn:
    """Listen and serve until a signal ends it; raises SystemExit with the exit code.

    ``reread`` gives the settings at HUP. With ``settings.reload``, a change of one of ``watch`` or of our own code
    is a HUP. Raises :class:`~flaskbus.errors.StartError` (the address, the certificate, a file) and
    :class:`~flaskbus.errors.UsageError`.
    """
    check_tls(settings)
    application = Application(settings, factory, reread or (lambda: settings))
    raise_file_limit(settings.open_limit)
    try:
        arbiter = GatewayArbiter(application, Files([*watch, *_own_code()]) if settings.reload else None)
        arbiter.run()
    except (RuntimeError, OSError) as error:  # the pid file, the log file
        raise StartError(f"{error}") from None
    raise SystemExit(0)


# gunicorn's application and its configuration


class Application(BaseApplication):
    """What gunicorn calls an application: its configuration, and how the ASGI app is made."""

    def __init__(
        self, settings: GatewaySettings, factory: AppFactory, reread: Callable[[], GatewaySettings]
    ) -> None:
        self.settings = settings
        self.reread = reread
        self._factory = factory
        super().__init__()

    def load_config(self) -> None:
        for name, value in gunicorn_config(self.settings).items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        return self._factory(self.settings)


def gunicorn_config(settings: GatewaySettings) -> dict[str, Any]:
    """Settings of gunicorn for ours, and the reason where it is not plain."""
    return {
        "bind": [bind_address(settings)],
        "workers": settings.workers,
        "worker_class": Worker,
        "logger_class": Logger,
        "loglevel": settings.log_level,
        "accesslog": settings.access_log or None,
        "pidfile": settings.pid or None,
        "proc_name": "flaskbus-gateway",
        "certfile": settings.certfile or None,
        "keyfile": settings.keyfile or None,
        "http_protocols": "h2,h1" if settings.http2 else "h1",
        # The worker's own limit comes first; then apps and lifespan have some time before SIGKILL.
        "graceful_timeout": math.ceil(settings.graceful_timeout) + 5,
        # Whole seconds, and only asked whether it is zero: the worker keeps the time itself.
        "keepalive": math.ceil(settings.keepalive),
        # Heartbeats, but also how long gunicorn waits for a piece of a body: the gateway is to say 408 first.
        "timeout": max(30, math.ceil(settings.body_timeout) + 10),
        # As nginx and Apache have them.
        "limit_request_line": 8190,
        "limit_request_field_size": 8190,
        "limit_request_fields": 100,
        # Who may say where a request came from is for the gateway to decide: it sees what came.
        "forwarded_allow_ips": "",
        "secure_scheme_headers": {},
        "forwarder_headers": "",
        # Its cancelling is switched off; this is how long a lost connection is held in memory.
        "asgi_disconnect_grace_period": 1,
        # The parser that the tests know, also where another one is installed.
        "http_parser": "python",
        "control_socket_disable": True,
    }


# The arbiter


class GatewayArbiter(Arbiter):
    """gunicorn's arbiter, that tries an address once and says in one line what is wrong."""

    app: Application

    def __init__(self, app: Application, files: Files | None) -> None:
        self._files = files
        super().__init__(app)

    def start(self) -> None:
        if "GUNICORN_FD" not in os.environ and not systemd.listen_fds(unset_environment=False):
            self.LISTENERS = [listen(self.app.settings, self.cfg, self.log)]  # type: ignore[misc]
        try:
            super().start()
        except Exception:
            sock.close_sockets(self.LISTENERS)  # type: ignore[arg-type]
            raise
        log.info(
            "flaskbus gateway %s listening on %s (pid %d), broker %s",
            metadata.version("flaskbus"),
            ", ".join(url(listener, self.app.settings) for listener in self.LISTENERS),
            self.pid,
            mask(self.app.settings.redis),
        )

    def spawn_worker(self) -> int:
        with signals_held():
            pid: int = super().spawn_worker()
        return pid

    def wait_for_signals(self, timeout: float | None = 1.0) -> list[int]:
        signals = super().wait_for_signals(timeout)
        if self._files is not None and self._files.changed():
            signals.append(signal.SIGHUP)
        return signals

    def handle_hup(self) -> None:
        """New workers with the configuration as it is now; the old ones stay if it is not valid."""
        before = self.app.settings
        try:
            after = self.app.reread()
            check_tls(after)
        except OperatorError as error:
            log.error("not reloaded: %s", error)
            return
        if bind_address(after) != bind_address(before):
            log.warning("another address is listened on after the next start only")
        self.app.settings = replace(after, host=before.host, port=before.port)
        log.info("reloading")
        super().handle_hup()

    def stop(self, graceful: bool = True) -> None:
        """Like gunicorn's, which goes by the time of day: a clock that jumped would kill what still runs."""
        if self.LISTENERS:
            log.info("stopping")
        first = not self.reexec_pid and not self.master_pid and not self.systemd
        if first and graceful and self.LISTENERS:
            for listener in self.LISTENERS:
                turn_away(listener)
            time.sleep(HANDSHAKES)
        sock.close_sockets(self.LISTENERS, unlink=first)  # type: ignore[arg-type]
        self.LISTENERS = []  # type: ignore[misc]
        limit = time.monotonic() + self.cfg.graceful_timeout
        self.kill_workers(signal.SIGTERM if graceful else signal.SIGQUIT)
        while self.WORKERS and time.monotonic() < limit:
            if {signal.SIGINT, signal.SIGQUIT} & {*self.wait_for_signals(0.1)} and graceful:
                log.info("stopping at once")
                graceful, limit = False, time.monotonic() + QUICK
                self.kill_workers(signal.SIGQUIT)
            self.reap_workers()
        self.kill_workers(signal.SIGKILL)
        self.reap_workers()


class Logger(GunicornLogger):
    """gunicorn's log format under our name; what it says of its own workings is for ``debug``."""

    def setup(self, cfg: Any) -> None:
        self.error_log = logging.getLogger("flaskbus.gateway")
        self.access_log = logging.getLogger("flaskbus.gateway.access")
        self.error_log.propagate = self.access_log.propagate = False
        super().setup(cfg)

    def info(self, msg: object, *args: object, **kwargs: Any) -> None:
        self.debug(msg, *args, **kwargs)

    def error(self, msg: object, *args: object, **kwargs: Any) -> None:
        # A worker that could not start, or an app that broke its response off, has said why.
        repeated = msg in _AFTERMATH or (msg == _EXITED and args[1:] == (Arbiter.WORKER_BOOT_ERROR,))
        (self.debug if repeated else super().error)(msg, *args, **kwargs)


_AFTERMATH = (
    "Shutting down: %s",
    "Reason: %s",
    "ASGI application returned without completing the response; closing the connection",
)
_EXITED = "Worker (pid:%s) exited with code %s."


# Reloading


class Files:
    """Tells when one of some files was changed, made or removed; folders stand for the sources in them."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = list(paths)
        self._seen = self._times()

    def changed(self) -> bool:
        """Whether there was a change since the last call."""
        before, self._seen = self._seen, self._times()
        return before != self._seen

    def _times(self) -> dict[Path, int]:
        times = {}
        for path in self._paths:
            for file in (*path.rglob("*.py"), *path.rglob("*.lua")) if path.is_dir() else (path,):
                try:
                    times[file] = file.stat().st_mtime_ns
                except OSError:
                    continue
        return times


def _own_code() -> list[Path]:
    specs = [find_spec(name) for name in ("flaskbus", "flaskbus_gateway")]
    return [Path(place) for spec in specs if spec for place in spec.submodule_search_locations or ()]
