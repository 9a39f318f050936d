"""``python -m tests.faults.lost_writes``: what a broker that forgets its last writes does to requests.

The broker is killed under load and comes back with the append-only file that it had some time before: a crash of
its host with ``appendfsync everysec``, a failover to a replica that was behind, a restored backup. Prints how many
requests were lost and how many ran twice, by how much was forgotten. These windows are not promised to be
empty; a reply that is another's is an error here too.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.injections import FAULTS, Inject, Scene
from tests.faults.oracle import Verdict
from tests.faults.soak import Soak


def forgetting(seconds: float) -> Inject:
    """Kill the broker, and bring it back as it was ``seconds`` before."""

    def inject(scene: Scene) -> float:
        files, old = scene.broker.directory / "appendonlydir", scene.broker.directory / "earlier"
        shutil.copytree(files, old)
        time.sleep(seconds)
        scene.broker.kill()
        shutil.rmtree(files)
        old.rename(files)
        scene.broker.start()
        return time.monotonic()

    return inject


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.lost_writes", description=__doc__)
    parser.add_argument("--forget", type=float, nargs="+", default=[0.0, 0.1, 1.0], help="seconds of writes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    names = {f"forgets {seconds:g} s": seconds for seconds in asked.forget}
    for name, seconds in names.items():
        FAULTS[name] = forgetting(seconds)
    with tempfile.TemporaryDirectory() as directory, Soak(Path(directory), asked.seed) as soak:
        for _ in range(asked.rounds):
            for name in names:
                done = soak.round(name)
                print(f"{name}: served again {done.ended - done.since:.2f} s later", flush=True)
        report = soak.finish()
    print(report.table())
    wrong = report.total.tally.counts[Verdict.WRONG]
    for reason, count in report.total.tally.reasons.most_common(10):
        print(f"{count:6}  {reason}")
    for verdict, seen, runs in report.total.tally.bad[:10]:
        print(verdict, seen, runs)
    if report.left:
        print(f"left behind: {report.left}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
