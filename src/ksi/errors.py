"""The error tree: everything KSI can say no with, its wire code, and whether trying again can help.

    KsiError                      code          retryable
    ├── ConfigError               config
    ├── MigrationError            migration
    ├── ProtocolError             what came over the wire could not be taken
    │   ├── InvalidJson           invalid_json
    │   ├── InvalidEnvelope       invalid_envelope
    │   ├── InvalidData           invalid_data
    │   ├── PayloadTooLarge       payload_too_large
    │   ├── UnknownEvent          unknown_event
    │   └── InvalidDirection      invalid_direction
    ├── ServiceError              the request was understood and cannot be met
    │   ├── NotFound              not_found
    │   ├── AmbiguousId           ambiguous_id
    │   ├── RequestIdConflict     request_id_conflict
    │   ├── QueueFull             queue_full          yes
    │   ├── ConversationBusy      conversation_busy   yes
    │   ├── NotLockHolder         not_lock_holder
    │   ├── UnknownModel          unknown_model
    │   ├── UnknownParent         unknown_parent
    │   ├── ShuttingDown          shutting_down       yes
    │   ├── WaitTimeout           wait_timeout        yes
    │   └── NotAvailableInV1      not_available_in_v1
    ├── StoreError                the disk or the database said no
    │   ├── StoreUnavailable      store_unavailable   yes
    │   ├── StoreFull             store_full          yes
    │   ├── StoreInUse            store_in_use
    │   ├── StoreVersion          store_version
    │   ├── StoreNotEmpty         store_not_empty
    │   └── CheckpointInvalid     checkpoint_invalid
    ├── ProviderError             one of FailureClass (F1): timeout, rate_limited, ...
    ├── SlowConsumer              slow_consumer       yes
    ├── TooManyConnections        too_many_connections yes
    ├── ConnectionFailed          connection_failed   yes
    ├── RemoteError               as the daemon said it, in the client
    └── InternalError             internal_error

Every error keeps its facts as attributes; `details` is what of them goes over the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class FailureClass(StrEnum):
    """Why an attempt failed (promise F1). The first seven can be tried again, the others not."""

    TIMEOUT = "timeout"
    NETWORK_ERROR = "network_error"
    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"
    PROVIDER_ERROR = "provider_error"
    EMPTY_ANSWER = "empty_answer"
    """The answer was well formed and held no text."""
    DAEMON_RESTART = "daemon_restart"
    INVALID_REQUEST = "invalid_request"
    AUTHENTICATION = "authentication"
    BILLING = "billing"
    """The account has no money left; waiting does not bring it back."""
    MODEL_NOT_FOUND = "model_not_found"
    """The provider does not have this model, or has it no more."""
    CONTEXT_TOO_LONG = "context_too_long"
    REFUSED = "refused"
    """The model, or a filter before it, declined to answer."""
    LIMIT_REACHED = "limit_reached"
    """A limit that the request or the configuration set ended the work, such as a number of turns."""
    UNSUPPORTED = "unsupported"
    """The answer holds something that a request cannot carry, such as calls of tools that it never named."""
    CANCELLED = "cancelled"
    BLOCKED = "blocked"

    @property
    def retryable(self) -> bool:
        """Whether another attempt can help."""
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


class KsiError(Exception):
    """Root of the tree. `code` is the wire code, `details` the facts that go with it."""

    code: str = "internal_error"
    retryable: bool = False

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        for name, value in facts.items():
            setattr(self, name, value)
        self.facts: dict[str, Any] = facts

    @property
    def details(self) -> Mapping[str, Any]:
        """The facts that are known, as they go over the wire."""
        return {name: value for name, value in self.facts.items() if value is not None}


class ConfigError(KsiError):
    """A configuration that cannot be used; `place` says where it stands."""

    code = "config"
    place: str | None = None


class MigrationError(KsiError):
    """A migration or its rollback that cannot be made; everything is as it was, unless the message says otherwise."""

    code = "migration"


class ProtocolError(KsiError):
    """What came over the wire could not be taken; the connection lives on (promise S1)."""


class InvalidJson(ProtocolError):
    """The line is not one JSON value; `offset` is the byte where reading stopped, where known."""

    code = "invalid_json"


class InvalidEnvelope(ProtocolError):
    """The line is JSON but no event: `event` is missing or `data` is no object."""

    code = "invalid_envelope"


class InvalidData(ProtocolError):
    """The event's `data` has a wrong or missing field; `path` names it."""

    code = "invalid_data"
    path: str = ""


class PayloadTooLarge(ProtocolError):
    """A line longer than the limit; `limit` in bytes."""

    code = "payload_too_large"


class UnknownEvent(ProtocolError):
    """No event of this name; `nearest` is a guess at what was meant."""

    code = "unknown_event"


class InvalidDirection(ProtocolError):
    """An event that only the daemon sends was sent to it."""

    code = "invalid_direction"


class ServiceError(KsiError):
    """The request was understood and cannot be met."""


class NotFound(ServiceError):
    """No request, conversation or provider of this name."""

    code = "not_found"


class AmbiguousId(ServiceError):
    """A shortened id that is the beginning of several; `candidates` lists some of them."""

    code = "ambiguous_id"


class RequestIdConflict(ServiceError):
    """The id names another request, or a lock, that is still kept (promises Q4, L5)."""

    code = "request_id_conflict"


class QueueFull(ServiceError):
    """The queue holds `limit` requests (promise Q5)."""

    code = "queue_full"
    retryable = True


class ConversationBusy(ServiceError):
    """The conversation has a holder or a line, and the request asked not to wait (promise L3)."""

    code = "conversation_busy"
    retryable = True


class NotLockHolder(ServiceError):
    """Who is not the holder can neither release nor renew (promise L5)."""

    code = "not_lock_holder"


class UnknownModel(ServiceError):
    """No configured provider serves this model."""

    code = "unknown_model"


class UnknownParent(ServiceError):
    """The named parent request is not kept (promise C5)."""

    code = "unknown_parent"


class ShuttingDown(ServiceError):
    """The daemon takes no more work; ask again when it is back."""

    code = "shutting_down"
    retryable = True


class WaitTimeout(ServiceError):
    """The time given to `completion:wait` ended before the request did."""

    code = "wait_timeout"
    retryable = True


class NotAvailableInV1(ServiceError):
    """Service version 1 does not have this event; `event` names it."""

    code = "not_available_in_v1"


class StoreError(KsiError):
    """The store could not do its work; nothing was changed."""

    code = "store_unavailable"


class StoreUnavailable(StoreError):
    """The store cannot be read or written at the moment."""

    code = "store_unavailable"
    retryable = True


class StoreFull(StoreError):
    """No room left where the store lives."""

    code = "store_full"
    retryable = True


class StoreInUse(StoreError):
    """Another daemon has this database; `holder` is its pid where known."""

    code = "store_in_use"


class StoreVersion(StoreError):
    """The database was written by another version; `found` and `known` are layout versions."""

    code = "store_version"


class StoreNotEmpty(StoreError):
    """A checkpoint is only loaded into an empty store; `requests` and `conversations` are what is there."""

    code = "store_not_empty"


class CheckpointInvalid(StoreError):
    """A checkpoint that cannot be loaded: damaged, not KSI's, or of a newer version. `reason` says which."""

    code = "checkpoint_invalid"


class ProviderError(KsiError):
    """One failed attempt at a provider. `failure` is its class, and the code on the wire too.

    `retry_after` is when the provider can be asked again by its own word, in seconds from now. The other facts say what
    the failure means for others: `limited_models` and `limit_window` tell what a limit holds for, `unserved` that the
    request was never taken up, and `tools_used` what the turn has already done.
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
        `limit_window` is the provider's name for a limit of the account, such as `five_hour`. `unserved` says that
        nothing was asked: no connection was made, or the model is still loading. `tools_used` names the tools with
        effects that ran before the failure."""
        super().__init__(message, retry_after=retry_after, status=status, provider=provider)
        self.failure = failure
        self.limited_models = limited_models
        self.limit_window = limit_window
        self.unserved = unserved
        self.tools_used = tools_used

    @property
    def code(self) -> str:  # type: ignore[override]
        """The failure class's word."""
        return self.failure.value

    @property
    def retryable(self) -> bool:  # type: ignore[override]
        """Whether another attempt can help."""
        return self.failure.retryable


class SlowConsumer(KsiError):
    """A client that does not read fast enough is let go; results stay fetchable (promise S4)."""

    code = "slow_consumer"
    retryable = True


class TooManyConnections(KsiError):
    """`limit` clients are connected already."""

    code = "too_many_connections"
    retryable = True


class ConnectionFailed(KsiError):
    """The client could not reach the daemon, or lost it."""

    code = "connection_failed"
    retryable = True


class InternalError(KsiError):
    """A defect of KSI; the log has the trace."""

    code = "internal_error"


class RemoteError(KsiError):
    """What the client raises for an error answer: its `code`, message and details as sent."""

    def __init__(self, code: str, message: str, details: Mapping[str, Any], *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable
        self._details = dict(details)

    @property
    def details(self) -> Mapping[str, Any]:
        """The facts as the daemon sent them."""
        return self._details
