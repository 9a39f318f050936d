"""Is each mount served: its queue, its agents, and whether they are the same?"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from flaskbus.diagnosis.facts import (
    CLOCK,
    Facts,
    Finding,
    MountFacts,
    Severity,
    count,
    listed,
    serving,
    shell,
)
from flaskbus.keys import GROUP, MountKeys
from flaskbus.registry import AgentRecord
from flaskbus.survey import MountView
from flaskbus.units import show_seconds

LONG_WAIT = 5.0
"""Seconds that a request may wait for a free agent before it is a finding."""


def of_mount(mount: MountFacts, facts: Facts) -> list[Finding]:
    """What there is to say of a mount; at least that it is well."""
    view = mount.view
    what = f"{count(len(serving(mount)), 'agent')}, {view.waiting} waiting, {view.running} running"
    return list(_findings(mount, facts)) or [Finding("ok", view.mount.name, what)]


def _findings(mount: MountFacts, facts: Facts) -> Iterator[Finding]:
    view = mount.view
    keys = facts.keys.of(view.mount.key)
    if view.owner is None:
        yield _unmounted(view, keys)
        return
    yield from _queue(mount, keys)
    yield from _agents(mount, keys, facts)
    yield from _signing(mount, facts)
    yield from _differences(mount)


def _unmounted(view: MountView, keys: MountKeys) -> Finding:
    name = view.mount.name
    if view.length:
        return Finding(
            "info",
            name,
            f"it is no longer mounted; {count(view.length, 'request')} left, for gateways to answer at the deadline",
            f"if that is long ago, their gateways are gone: {shell('DEL', keys.requests)}",
        )
    return Finding(
        "info",
        name,
        "it is no longer mounted, and a gateway forgets it",
        f"flaskbus unmount {shlex.quote(name)}",
    )


def _queue(mount: MountFacts, keys: MountKeys) -> Iterator[Finding]:
    view, name = mount.view, mount.view.mount.name
    if view.length is None:
        yield Finding(
            "warning", name, "it has no queue", "an agent makes it with its next heartbeat; is one alive?"
        )
    elif view.pending is None:
        yield Finding(
            "error",
            name,
            f"its queue has lost the consumer group {GROUP!r}: {count(view.length, 'request')} may have run or not",
            "a gateway answers them 502 and makes the group anew within a second; is one alive?",
        )
    if view.waiting and view.oldest is not None and view.oldest > LONG_WAIT and serving(mount):
        yield Finding(
            "warning",
            name,
            f"{count(view.waiting, 'request')} waiting, the oldest request is {view.oldest:.0f} s old",
            "start more agents, or give them more --threads",
        )
    if mount.stuck:
        oldest = max(mount.stuck, key=lambda one: one.idle)
        holders = listed({one.agent for one in mount.stuck})
        ids = [one.entry_id for one in mount.stuck[:5]]
        yield Finding(
            "warning",
            name,
            f"{count(len(mount.stuck), 'request')} stuck for up to {oldest.idle:.0f} s with {holders}, which is gone",
            f"they may have run; to drop them: {shell('XACK', keys.requests, GROUP, *ids)} "
            f"and {shell('XDEL', keys.requests, *ids)}",
        )
    if mount.dead:
        yield Finding(
            "warning",
            name,
            f"{count(mount.dead, 'dead letter')}, the newest because: {mount.reason or 'unknown'}",
            f"look at them: flaskbus dead list {shlex.quote(name)}",
        )


def _agents(mount: MountFacts, keys: MountKeys, facts: Facts) -> Iterator[Finding]:
    view, name = mount.view, mount.view.mount.name
    failed = [record for record in view.agents if record.state == "failed"]
    lost = [record for record in view.agents if record.id not in mount.alive]
    for record in failed:
        yield Finding(
            "error",
            name,
            f"agent {record.id} could not start: {record.reason}",
            "its log says where; mend the app",
        )
    if not serving(mount):
        yield Finding(
            "warning",
            name,
            f"no agent of {view.owner!r} is alive; {count(view.waiting, 'request')} waiting",
            f"flaskbus-agent MODULE:APP={shlex.quote(name)} --name {shlex.quote(view.owner or '')}, "
            f"or flaskbus unmount {shlex.quote(name)}",
        )
    for record in lost:
        yield Finding(
            "warning",
            name,
            f"agent {record.id} is listed and sends no heartbeat",
            "gateways take it off the list within a lease; without one: "
            + shell("HDEL", keys.agents, record.id),
        )
    for record in serving(mount):
        if abs(facts.now - record.at) > max(CLOCK, facts.lease):
            yield Finding(
                "warning",
                name,
                f"the clock of {record.host} seems {show_seconds(round(abs(facts.now - record.at)))} off",
                "keep its clock by NTP (chrony, systemd-timesyncd)",
            )


def _signing(mount: MountFacts, facts: Facts) -> Iterator[Finding]:
    """Agents and gateways that do not sign alike refuse each other's word."""
    name = mount.view.mount.name
    if not facts.alive_gateways:
        return
    gateways_sign = any(facts.gateways[gateway].get("signing") for gateway in facts.alive_gateways)
    for record in serving(mount):
        if gateways_sign and not record.signing:
            yield Finding(
                "error",
                name,
                f"agent {record.id} has no signing key, and the gateways sign: it refuses every request",
                f"flaskbus key {shlex.quote(mount.view.mount.whole.name)}, for FLASKBUS_SIGNING_KEY of its agents",
            )
        elif record.signing and not gateways_sign:
            yield Finding(
                "error",
                name,
                f"agent {record.id} takes signed requests only, and no gateway signs",
                "give the gateways FLASKBUS_SIGNING_SECRET, or take FLASKBUS_SIGNING_KEY from the agent",
            )


def _differences(mount: MountFacts) -> Iterator[Finding]:
    """Agents of one mount share its requests, so a client meets any of them."""
    running = serving(mount)
    for attribute, severity, what, mend in _SAME:
        groups: dict[str, list[AgentRecord]] = {}
        for record in running:
            groups.setdefault(getattr(record, attribute), []).append(record)
        if len(groups) > 1:
            who = "; ".join(
                f"{value or 'none'}: {', '.join(record.id for record in group)}"
                for value, group in sorted(groups.items())
            )
            yield Finding(severity, mount.view.mount.name, f"its agents {what} ({who})", mend)


_SAME: tuple[tuple[str, Severity, str, str], ...] = (
    (
        "key_fingerprint",
        "error",
        "have different SECRET_KEYs: a session of one is no session for the other",
        "give all of them the same SECRET_KEY, and restart them",
    ),
    (
        "signing",
        "warning",
        "have different signing keys: some of them refuse what others take",
        "give all of them the same FLASKBUS_SIGNING_KEY, and restart them",
    ),
    ("code", "warning", "run different code", "restart those that run the old one (HUP loads it anew)"),
    ("python", "warning", "run on different versions of Python", "use the same in every place"),
    ("name", "warning", "have different names", "stop those of the app that gave the mount up"),
)
