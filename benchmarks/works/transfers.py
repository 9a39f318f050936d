"""Large bodies, down and up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks import measure, transfer
from benchmarks.model import Figure, Metric
from benchmarks.systems.base import Running
from benchmarks.watch import Watch, acquaint
from benchmarks.works.base import SERVERS, Scale, Work, check

SPEED = Metric("speed", "MB/s", higher=True)
CPU = Metric("CPU of all processes", "s/GiB", higher=False)
_SIZES = {"64 MiB": 64 << 20, "128 MiB": 128 << 20, "1 GiB": 1 << 30, "2 GiB": 2 << 30}


class Transfer(Work):
    """One large body at a time, whose every byte counts: both ends make a checksum of it."""

    main = SPEED

    def __init__(
        self,
        name: str,
        move: Callable[[int, int], float],
        size: str = "1 GiB",
        quick: str = "64 MiB",
        once: bool = False,
        systems: tuple[str, ...] = SERVERS,
    ) -> None:
        self.name = name
        self.title = f"{name.partition('-')[0]} of one large body"
        self.systems = systems
        self.note = (
            "Both ends make a CRC-32 of it, some tenths of a second for a GiB, which is in the figures."
        )
        self._move, self._size, self._quick, self._once = move, size, quick, once

    def rounds(self, scale: Scale) -> int:
        return 1 if self._once else scale.few

    def variants(self, scale: Scale) -> Sequence[str]:
        return (self._quick if scale.quick else self._size,)

    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        size = _SIZES[variant]
        check(running.port, "/hello")
        acquaint(running)
        with Watch(running) as watch:
            used = measure.cpu(running)
            seconds = self._move(running.port, size)
            used = measure.cpu(running) - used
        yield Figure(SPEED, size / seconds / 1e6)
        yield Figure(CPU, used / size * 2**30)
        yield from watch.figures()


DOWNLOAD = Transfer("download", transfer.download)
UPLOAD = Transfer("upload", transfer.upload)
LARGE_UPLOAD = Transfer(
    "upload-large", transfer.upload, "2 GiB", "128 MiB", once=True, systems=("flaskbus", "nginx-gthread")
)
