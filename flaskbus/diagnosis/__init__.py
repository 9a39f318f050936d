"""What is wrong with a bus, told from facts: each finding with its mend.

Nothing here asks the broker: ``flaskbus doctor`` gathers the facts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from flaskbus.diagnosis.broker import of_broker
from flaskbus.diagnosis.facts import (
    BrokerFacts,
    Facts,
    Finding,
    MountFacts,
    Severity,
    Stuck,
    listed,
    serving,
    shell,
)
from flaskbus.diagnosis.mounts import of_mount

__all__ = ["BrokerFacts", "Facts", "Finding", "MountFacts", "Severity", "Stuck", "diagnose"]


def diagnose(facts: Facts) -> list[Finding]:
    """All findings: the broker's, then the bus's, then each mount's."""
    found = [finding for broker in (facts.broker, *facts.others) for finding in _of_node(broker)]
    found += [*_gateways(facts), *_versions(facts), *_secrets(facts)]
    found += [*_foreign(facts), *_leaks(facts)]
    for mount in facts.mounts:
        found += of_mount(mount, facts)
    return found


def _of_node(broker: BrokerFacts) -> Iterator[Finding]:
    for finding in of_broker(broker):
        yield replace(finding, check=f"{finding.check} {broker.node}") if broker.node else finding


def _gateways(facts: Facts) -> Iterator[Finding]:
    alive = len(facts.alive_gateways)
    if alive:
        yield Finding("ok", "gateways", f"{alive} gateway process{'es are' if alive > 1 else ' is'} alive")
    else:
        yield Finding("warning", "gateways", "no gateway is alive", "flaskbus-gateway --port 5000")
    for name in sorted(facts.gateways.keys() - facts.alive_gateways):
        yield Finding(
            "info",
            "gateways",
            f"{name} is listed and sends no heartbeat",
            shell("HDEL", facts.keys.gateways, name),
        )


def _versions(facts: Facts) -> Iterator[Finding]:
    gateways = {str(facts.gateways[name].get("version", "?")) for name in facts.alive_gateways}
    agents = {record.version for mount in facts.mounts for record in serving(mount)}
    if len(gateways | agents) > 1:
        yield Finding(
            "warning",
            "versions",
            f"flaskbus differs: gateways {listed(gateways)}, agents {listed(agents)}",
            "neighbouring versions understand each other; finish the upgrade",
        )


def _secrets(facts: Facts) -> Iterator[Finding]:
    if len({str(facts.gateways[name].get("signing", "")) for name in facts.alive_gateways}) > 1:
        yield Finding(
            "error",
            "signing",
            "gateways have different signing secrets, or only some of them have one",
            "give all of them the same FLASKBUS_SIGNING_SECRET, and restart them",
        )


def _foreign(facts: Facts) -> Iterator[Finding]:
    for key, kind in sorted(facts.foreign.items()):
        yield Finding(
            "error",
            "keys",
            f"somebody wrote over {key}: it is a {kind} now, and whoever needs it is refused",
            f"{shell('DEL', key)} (gateways and agents make it anew)",
        )


def _leaks(facts: Facts) -> Iterator[Finding]:
    shown = facts.leaked[:5]
    more = f" and {len(facts.leaked) - 5} more" if len(facts.leaked) > 5 else ""
    if shown:
        yield Finding(
            "warning",
            "keys",
            f"keys that never expire and should: {', '.join(shown)}{more}",
            shell("DEL", *shown),
        )
    elif facts.whole:
        yield Finding("ok", "keys", "every key expires that should")
    else:
        yield Finding(
            "info", "keys", "there are too many keys to look at all; what was seen expires as it should"
        )
