"""The error tree: every error of KSI, with its wire code and whether a retry can help.

    KsiError                      code          retryable
    ├── ConfigError               config
    ├── MigrationError            migration
    ├── ProtocolError             the line or event was not valid
    │   ├── InvalidJson           invalid_json
    │   ├── InvalidEnvelope       invalid_envelope
    │   ├── InvalidData           invalid_data
    │   ├── PayloadTooLarge       payload_too_large
    │   ├── UnknownEvent          unknown_event
    │   └── InvalidDirection      invalid_direction
    ├── ServiceError              the request was valid and cannot be met
    │   ├── NotFound              not_found
    │   ├── AmbiguousId           ambiguous_id
    │   ├── RequestIdConflict     request_id_conflict
    │   ├── QueueFull             queue_full          yes
    │   ├── BudgetExceeded        budget_exceeded
    │   ├── ConversationBusy      conversation_busy   yes
    │   ├── HasForks              has_forks
    │   ├── NameTaken             name_taken
    │   ├── NotLockHolder         not_lock_holder
    │   ├── UnknownModel          unknown_model
    │   ├── UnknownParent         unknown_parent
    │   ├── Forbidden             forbidden
    │   ├── ShuttingDown          shutting_down       yes
    │   ├── DiskFull              disk_full           yes
    │   ├── WaitTimeout           wait_timeout        yes
    │   └── NotAvailableInV1      not_available_in_v1
    ├── StoreError                the disk or the database failed
    │   ├── StoreUnavailable      store_unavailable   yes
    │   ├── StoreFull             store_full          yes
    │   ├── StoreInUse            store_in_use
    │   ├── StoreVersion          store_version
    │   ├── StoreNotEmpty         store_not_empty
    │   └── CheckpointInvalid     checkpoint_invalid
    ├── ProviderError             one of FailureClass: timeout, rate_limited, ...
    ├── SlowConsumer              slow_consumer       yes
    ├── TooMuchInput              too_much_input      yes
    ├── TooManyConnections        too_many_connections yes
    ├── ConnectionFailed          connection_failed   yes
    ├── RemoteError               the daemon's error, in the client
    └── InternalError             internal_error

Every error keeps its facts as attributes; `details` has those that are sent over the wire.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class FailureClass(StrEnum):
    """Why an attempt failed. The first seven can be retried, the others not."""

    TIMEOUT = "timeout"
    """No complete answer within the attempt's time, or silence for too long."""
    NETWORK_ERROR = "network_error"
    """No connection, or it broke."""
    RATE_LIMITED = "rate_limited"
    """The provider asked to slow down; the request backs off and uses no attempt."""
    OVERLOADED = "overloaded"
    """The provider has no capacity at the moment; the request backs off and uses no attempt."""
    PROVIDER_ERROR = "provider_error"
    """The provider reported an internal error, or its answer cannot be read."""
    EMPTY_ANSWER = "empty_answer"
    """The answer held no text; the message says so if reasoning used up its limit."""
    DAEMON_RESTART = "daemon_restart"
    """The daemon died during the attempt; a request that failed with it was interrupted too often."""
    INVALID_REQUEST = "invalid_request"
    """The provider rejects the request, or its configuration is wrong: a `base_url`, a certificate, a proxy."""
    AUTHENTICATION = "authentication"
    """The key is missing or refused; if a login has expired, requests wait for the next one."""
    BILLING = "billing"
    """The account has no money left; another provider of the route is asked."""
    MODEL_NOT_FOUND = "model_not_found"
    """The provider does not have the model; the message names it."""
    CONTEXT_TOO_LONG = "context_too_long"
    """Prompt and history exceed the model's context, even with half the history."""
    REFUSED = "refused"
    """The model, or a filter before it, declined to answer; a fallback model is asked."""
    LIMIT_REACHED = "limit_reached"
    """A limit that the request or the configuration set ended the work, such as a number of turns."""
    UNSUPPORTED = "unsupported"
    """The answer contains something that a request cannot return, such as nothing but tool calls; the message names
    them."""
    CANCELLED = "cancelled"
    """It was stopped."""
    BUDGET_EXCEEDED = "budget_exceeded"
    """A budget that refuses was used up before the request's turn came; the message says which and until when."""
    REJECTED = "rejected"
    """A person said no, or did not say yes in time."""
    BLOCKED = "blocked"
    """For chains; nothing in this version fails with it."""

    @property
    def retryable(self) -> bool:
        """True if another attempt can help."""
        return self in _RETRYABLE


_RETRYABLE = frozenset(
    {
        FailureClass.TIMEOUT,
        FailureClass.NETWORK_ERROR,
        FailureClass.RATE_LIMITED,
        FailureClass.OVERLOADED,
        FailureClass.PROVIDER_ERROR,
        FailureClass.EMPTY_ANSWER,
        FailureClass.DAEMON_RESTART,
    }
)


LONGEST_QUOTE = 200
"""Maximum length of a client's text that an error quotes, in characters."""
LONGEST_MESSAGE = 4_000
"""Maximum length of a whole message, in characters."""
_END_KEPT = 500
# Atomic, so that no text is read twice; early releases of Python 3.11 mistake a possessive `+` behind a group.
_LONG_QUOTE = re.compile(rf"""(['"`])((?>(?:(?!\1)[^\\]|\\.){{{LONGEST_QUOTE + 1},}}))\1""", re.DOTALL)


def shortened(message: str) -> str:
    """A message with long quotes cut. If it is still too long, its middle is cut, because the advice is at its end."""
    if len(message) <= LONGEST_QUOTE:
        return message
    message = _LONG_QUOTE.sub(lambda found: f"{found[1]}{found[2][:LONGEST_QUOTE]}…{found[1]}", message)
    if len(message) <= LONGEST_MESSAGE:
        return message
    return f"{message[: LONGEST_MESSAGE - _END_KEPT]} … {message[-_END_KEPT:]}"


def _cut(value: Any) -> Any:
    """A fact with long texts cut."""
    if isinstance(value, str) and len(value) > LONGEST_QUOTE:
        return value[:LONGEST_QUOTE] + "…"
    return [_cut(one) for one in value] if isinstance(value, list | tuple) else value


class KsiError(Exception):
    """Root of the tree. `code` is the wire code, `details` the facts that go with it.

    Quotes in a message are cut by `shortened`, and so are the texts of `details`; `facts` has them in full.
    """

    code: str = "internal_error"
    retryable: bool = False

    def __init__(self, message: str, **facts: Any) -> None:
        self.message = shortened(message)
        super().__init__(self.message)
        for name, value in facts.items():
            setattr(self, name, value)
        self.facts: dict[str, Any] = facts

    @property
    def details(self) -> Mapping[str, Any]:
        """The known facts, as sent over the wire."""
        return {name: _cut(value) for name, value in self.facts.items() if value is not None}


class ConfigError(KsiError):
    """The configuration cannot be used; the daemon does not start. Details: `place`."""

    code = "config"
    place: str | None = None


class MigrationError(KsiError):
    """`ksi migrate` cannot continue; nothing was changed, unless the message says otherwise."""

    code = "migration"


class ProtocolError(KsiError):
    """The line or event was not valid; the connection stays open."""


class InvalidJson(ProtocolError):
    """The line is not JSON: broken, not UTF-8, nested too deeply, or a number out of range. Details: `path`."""

    code = "invalid_json"


class InvalidEnvelope(ProtocolError):
    """The line is JSON and no event: `event` is missing, or `data` is no object. Details: `path`."""

    code = "invalid_envelope"


class InvalidData(ProtocolError):
    """A field of `data` is missing or wrong. Details: `path`."""

    code = "invalid_data"
    path: str = ""


class PayloadTooLarge(ProtocolError):
    """The line is longer than `socket.max_line`; it was skipped. Details: `limit`."""

    code = "payload_too_large"


class UnknownEvent(ProtocolError):
    """No event has this name. Details: `nearest`."""

    code = "unknown_event"


class InvalidDirection(ProtocolError):
    """Only the daemon sends this event; subscribe to it."""

    code = "invalid_direction"


class ServiceError(KsiError):
    """The request was valid and cannot be met."""


class NotFound(ServiceError):
    """No request, conversation or session has this name, or it is not kept any more. Details: the name."""

    code = "not_found"


class AmbiguousId(ServiceError):
    """The command got a prefix that several ids share; the daemon itself accepts only whole ids. Details:
    `candidates`."""

    code = "ambiguous_id"


class RequestIdConflict(ServiceError):
    """The id names a request with other content, or a lock. Details: `request_id`."""

    code = "request_id_conflict"


class QueueFull(ServiceError):
    """The queue has `queue.max_queued` waiting requests; nothing was enqueued. Details: `limit`."""

    code = "queue_full"
    retryable = True


class BudgetExceeded(ServiceError):
    """A budget has no room for the request, and refuses it, or no window will ever have room. Details: `budget`,
    `scope`, `unit`, `limit`, `used`, `reserved`, `since`, `resets_at` (Unix time), `retry_after` (seconds),
    `raised_by`."""

    code = "budget_exceeded"


class ConversationBusy(ServiceError):
    """The conversation is taken, and the request asked not to wait or could not interrupt. Details: `conversation_id`,
    `holder`, `since`, `age`, `position`."""

    code = "conversation_busy"
    retryable = True


class HasForks(ServiceError):
    """The conversation is not deleted, as others that were forked from it have its turns in common. Details:
    `conversation_id`, `forks`."""

    code = "has_forks"


class NameTaken(ServiceError):
    """The name means another conversation. Details: `conversation_id`."""

    code = "name_taken"


class NotLockHolder(ServiceError):
    """The caller does not hold the lock, or the fencing token is out of date; nothing was changed. Details:
    `request_id`."""

    code = "not_lock_holder"


class UnknownModel(ServiceError):
    """No configured provider serves the model. Details: `model`."""

    code = "unknown_model"


class Unsupported(ServiceError):
    """No provider of the model supports a feature of the request; `drop_unsupported` leaves it out. Details: `fields`,
    `providers`."""

    code = "unsupported"


class UnknownParent(ServiceError):
    """The named parent request does not exist, or is not kept any more."""

    code = "unknown_parent"


class Forbidden(ServiceError):
    """The client's [HTTP](http.md) token does not allow this."""

    code = "forbidden"


class ShuttingDown(ServiceError):
    """The daemon is stopping and accepts no more work; send the request again when it is back."""

    code = "shutting_down"
    retryable = True


class Draining(ServiceError):
    """An operator drains the daemon. Another daemon of its store can take the request, or this one after
    `queue:undrain`."""

    code = "draining"
    retryable = True


class DiskFull(ServiceError):
    """The disk has less room than `store.min_free_bytes`; new work is refused, and running requests can finish.
    Details: `free_bytes`, `needed_bytes`."""

    code = "disk_full"
    retryable = True


class WaitTimeout(ServiceError):
    """The wait's timeout passed first; the request continues. Details: `request_id`."""

    code = "wait_timeout"
    retryable = True


class NotAvailableInV1(ServiceError):
    """`[service] version = 1` does not have this event; [upgrade](../how-to/upgrade-from-v1.md). Details: `event`."""

    code = "not_available_in_v1"


class StoreError(KsiError):
    """The store could not do its work; nothing was changed."""

    code = "store_unavailable"


class StoreUnavailable(StoreError):
    """The database or the server cannot be used at the moment. Nothing was changed, except perhaps by a call that was
    on its way to a server when the daemon stopped. Details: `reason`; `passes` is false if only an operator can repair
    it."""

    code = "store_unavailable"
    retryable = True
    passes: bool = True


class StoreFull(StoreError):
    """The disk or server of the database is full; nothing was changed."""

    code = "store_full"
    retryable = True


class StoreInUse(StoreError):
    """Another daemon has this database or home; this one does not start. Details: `holder`."""

    code = "store_in_use"


class StoreVersion(StoreError):
    """A newer version wrote the database; this one does not start. Details: `found`, `known`."""

    code = "store_version"


class StoreNotEmpty(StoreError):
    """A checkpoint can only be loaded into an empty store; nothing was changed. Details: `requests`,
    `conversations`."""

    code = "store_not_empty"


class CheckpointInvalid(StoreError):
    """The checkpoint cannot be loaded: damaged, not KSI's, or of a newer version; nothing was changed. Details:
    `reason`."""

    code = "checkpoint_invalid"


class ProviderError(KsiError):
    """One failed attempt at a provider. `failure` is its class, and the code on the wire too.

    `retry_after` is the provider's own delay until it can be asked again, in seconds. The other facts say how the
    failure affects other requests: `limited_models` and `limit_window` give the extent of a limit, `unserved` says that
    the request was never accepted, and `tools_used` lists the side effects of the turn.
    """

    failure: FailureClass
    retry_after: float | None = None
    status: int | None = None

    def __init__(
        self,
        failure: FailureClass,
        message: str,
        *,
        retry_after: float | None = None,
        status: int | None = None,
        provider: str | None = None,
        limited_models: str = "",
        limit_window: str | None = None,
        unserved: bool = False,
        tools_used: tuple[str, ...] = (),
    ) -> None:
        """`limited_models` is a pattern of the provider's own model names that the limit holds for; empty: all of them.
        `limit_window` is the provider's name for a limit of the account, such as `five_hour`. `unserved` says that the
        provider got no request: no connection was made, or the model is still loading. `tools_used` names the tools
        with effects that ran before the failure."""
        super().__init__(message, retry_after=retry_after, status=status, provider=provider)
        self.failure = failure
        self.limited_models = limited_models
        self.limit_window = limit_window
        self.unserved = unserved
        self.tools_used = tools_used

    @property
    def code(self) -> str:  # type: ignore[override]
        """The failure class's name."""
        return self.failure.value

    @property
    def retryable(self) -> bool:  # type: ignore[override]
        """True if another attempt can help."""
        return self.failure.retryable


class SlowConsumer(KsiError):
    """More than `socket.max_backlog` was left unread; the connection is closed, results stay fetchable."""

    code = "slow_consumer"
    retryable = True


class TooMuchInput(KsiError):
    """All clients together held more than `socket.max_input` in unfinished lines, and this one held much of it for the
    longest time; the connection is closed. Details: `limit`."""

    code = "too_much_input"
    retryable = True


class TooManyConnections(KsiError):
    """`socket.max_connections` clients are connected already; this connection is closed. Details: `limit`."""

    code = "too_many_connections"
    retryable = True


class ConnectionFailed(KsiError):
    """In the client: the daemon could not be reached, or was lost."""

    code = "connection_failed"
    retryable = True


class InternalError(KsiError):
    """A defect of KSI; the daemon's log has the trace."""

    code = "internal_error"


class RemoteError(KsiError):
    """The client raises this for an error reply, with its `code`, message and details as sent."""

    def __init__(self, code: str, message: str, details: Mapping[str, Any], *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable
        self._details = dict(details)

    @property
    def details(self) -> Mapping[str, Any]:
        """The facts as the daemon sent them."""
        return self._details
