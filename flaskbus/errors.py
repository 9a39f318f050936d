"""Every error that flaskbus makes, as one tree.

Two branches, because two kinds of people read them. A :class:`BusError` answers an HTTP client: it
knows its status, and whether the app can have run. An :class:`OperatorError` answers the person at
the keyboard: it knows the exit code of the command, and says what to do next.
"""

from __future__ import annotations

from typing import ClassVar, Literal

Executed = Literal["no", "unknown"]
"""Whether the app ran: surely not, or nobody can tell. ``"no"`` is a promise and never false."""

Fault = Literal["client", "app", "bus", "broker"]


class FlaskbusError(Exception):
    """Root of the tree."""


class BusError(FlaskbusError):
    """An exchange that the bus itself ends, answered as ``application/problem+json`` (RFC 9457).

    ``retry_after`` is in seconds, and becomes the ``Retry-After`` header.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error of the bus"
    fault: ClassVar[Fault] = "bus"
    executed: Executed = "unknown"

    def __init__(self, detail: str, *, retry_after: int | None = None, executed: Executed | None = None):
        super().__init__(detail)
        self.detail = detail
        self.retry_after = retry_after
        if executed is not None:
            self.executed = executed

    def problem(self, request_id: str | None = None) -> dict[str, object]:
        """The members of the problem document."""
        document: dict[str, object] = {
            "type": f"urn:flaskbus:error:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "executed": self.executed,
            "fault": self.fault,
        }
        if request_id:
            document["request_id"] = request_id
        return document


class NotExecuted(BusError):
    """Ended before an agent can have taken the request: the app has not run, and will not."""

    code = "not-executed"
    executed: Executed = "no"


class AmbiguousTarget(NotExecuted):
    """The request target has two readings that lead to two mounts, or none at all."""

    status, code, title, fault = 400, "ambiguous-target", "Ambiguous request target", "client"


class InvalidRequest(NotExecuted):
    """The request breaks a rule of HTTP that the server in front did not enforce."""

    status, code, title, fault = 400, "invalid-request", "Invalid request", "client"


class ForeignOrigin(NotExecuted):
    """A page of another site wants to open a WebSocket; browsers allow that, and send their cookies along."""

    status, code, title, fault = 403, "foreign-origin", "WebSockets are for pages of this site", "client"


class UnknownMount(NotExecuted):
    status, code, title, fault = 404, "unknown-mount", "Nothing is mounted here", "client"


class BodyTimeout(NotExecuted):
    status, code, title, fault = 408, "body-timeout", "The request body did not arrive in time", "client"


class BodyTooLarge(NotExecuted):
    status, code, title, fault = 413, "body-too-large", "Request body too large", "client"


class KeyReused(NotExecuted):
    """The Idempotency-Key came before, with another body."""

    status, code, title, fault = 422, "key-reused", "Idempotency-Key of another body", "client"


class UnsupportedUpgrade(NotExecuted):
    status, code, title, fault = 501, "unsupported-upgrade", "Protocol not supported", "client"


class QueueFull(NotExecuted):
    status, code, title = 503, "queue-full", "Too many requests are waiting"


class NoAgent(NotExecuted):
    """Held for as long as allowed, and no agent took it."""

    status, code, title, fault = 503, "no-agent", "No agent is serving this mount", "app"


class StreamsFull(NotExecuted):
    """An agent process has as many streams and WebSockets as it takes; says so of a WebSocket."""

    status, code, title, fault = 503, "streams-full", "Too many WebSockets are open", "app"


class DeadlineBeforeStart(NotExecuted):
    """Agents are there, but none was free in time."""

    status, code, title, fault = 503, "not-started", "The request was not started in time", "app"


class BrokerUnavailable(NotExecuted):
    status, code, title, fault = 503, "broker-unavailable", "The broker cannot be reached", "broker"


class BrokerFull(NotExecuted):
    status, code, title, fault = 503, "broker-full", "The broker is out of memory", "broker"


class ShuttingDown(NotExecuted):
    status, code, title = 503, "shutting-down", "The gateway is shutting down"


class KeyInUse(BusError):
    """The first request with this Idempotency-Key waits or runs; this one does not."""

    status, code, title, fault = 409, "key-in-use", "Idempotency-Key of a running request", "client"


class AnswerNotKept(BusError):
    """The first request with this Idempotency-Key ran, so this one does not; what it answered was not kept."""

    status, code, title, fault = 409, "answer-not-kept", "The first answer was not kept", "client"


class AgentLost(BusError):
    """The agent that held the request is gone, or its frames make no sense."""

    status, code, title, fault = 502, "agent-lost", "The agent was lost while it held the request", "app"


class DeadlineAfterDelivery(BusError):
    status, code, title, fault = 504, "deadline", "The app did not answer in time", "app"


class WireError(FlaskbusError):
    """Bytes on the broker that are not ours, too large, or of a version that we cannot read."""


class OperatorError(FlaskbusError):
    """Something that the person at the keyboard can mend; shown as one line, without a traceback."""

    exit_code: ClassVar[int] = 3


class UsageError(OperatorError):
    """A flag, a setting or a prefix that makes no sense."""

    exit_code = 2


class StartError(OperatorError):
    """The process could not start: the broker is away or unfit, the port or the mount is taken."""

    exit_code = 3


class MountTaken(StartError):
    """Another app owns the mount."""


class AppImportError(OperatorError):
    """``MODULE:APP`` does not lead to a WSGI callable."""

    exit_code = 4
