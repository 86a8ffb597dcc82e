"""What a failed turn of Claude Code means: its statuses and words read as a failure class (F1). Pure."""

from __future__ import annotations

import re

from ksi.errors import FailureClass, ProviderError
from ksi.providers.claude_stream import Finished, Limited, Retrying
from ksi.providers.faults import Report, failure_class

LOG_IN = (
    "run `claude` once as the daemon's user and log in, or give the daemon ANTHROPIC_API_KEY or "
    "CLAUDE_CODE_OAUTH_TOKEN, and restart it"
)

_OWN_BACKOFF = 0.7
"""Seconds that the program waits by itself before it asks again; what is longer was asked for by the API."""

_WORDS = {
    "authentication_failed": FailureClass.AUTHENTICATION,
    "oauth_org_not_allowed": FailureClass.AUTHENTICATION,
    "billing_error": FailureClass.AUTHENTICATION,
    "rate_limit": FailureClass.RATE_LIMITED,
    "overloaded": FailureClass.OVERLOADED,
    "server_error": FailureClass.PROVIDER_ERROR,
    "model_not_found": FailureClass.INVALID_REQUEST,
    "invalid_request": FailureClass.INVALID_REQUEST,
    "max_output_tokens": FailureClass.INVALID_REQUEST,
}
_NETWORK = re.compile(r"connect|ECONN|ENOTFOUND|network|socket|getaddrinfo", re.IGNORECASE)
_LOST = ("No conversation found", "No message found with")


def is_lost(finished: Finished) -> bool:
    """Whether the session or message that was to be resumed is not there any more."""
    return any(says_lost(error) for error in finished.errors)


def says_lost(message: str) -> bool:
    """Whether a message of the program says so."""
    return any(word in message for word in _LOST)


def of_retry(retry: Retrying, limited: Limited | None, *, now: float) -> ProviderError:
    """The program was about to ask again by itself; `now` in Unix seconds."""
    if retry.status is None:
        failure = _WORDS.get(retry.error, FailureClass.NETWORK_ERROR)
        said = "no whole answer came from its API"
    else:
        failure = _of_status(retry.status, retry.error, "")
        said = f"its API answered {retry.status}"
    wait = retry.delay if failure in _WAITING and retry.delay > _OWN_BACKOFF else None
    return _error(failure, f"{said} ({retry.error})", retry.status, wait, limited, now)


def of_result(finished: Finished, word: str | None, limited: Limited | None, *, now: float) -> ProviderError:
    """The turn ended in a `result` that is an error; `word` is what the program's own message calls it."""
    said = "; ".join(finished.errors) or finished.text or finished.subtype or "it gave no reason"
    if finished.terminal_reason == "prompt_too_long":
        failure = FailureClass.CONTEXT_TOO_LONG
    elif finished.stop_reason == "refusal":
        failure = FailureClass.INVALID_REQUEST
    elif finished.status is not None:
        failure = _of_status(finished.status, word, said)
    elif word in _WORDS:
        failure = _WORDS[word]
    else:
        failure = failure_class(None, Report(message=said))
        if failure is FailureClass.PROVIDER_ERROR and _NETWORK.search(said):
            failure = FailureClass.NETWORK_ERROR
    return _error(failure, said, finished.status, None, limited, now)


_WAITING = frozenset({FailureClass.RATE_LIMITED, FailureClass.OVERLOADED})


def _of_status(status: int, word: str | None, said: str) -> FailureClass:
    failure = failure_class(status, Report(message=said))
    if failure in (FailureClass.INVALID_REQUEST, FailureClass.PROVIDER_ERROR) and word is not None:
        return _WORDS.get(word, failure)
    return failure


def _error(
    failure: FailureClass, said: str, status: int | None, wait: float | None, limited: Limited | None, now: float
) -> ProviderError:
    spent = limited is not None and limited.status == "rejected" and limited.resets_at is not None
    if failure is FailureClass.RATE_LIMITED and spent and limited is not None and limited.resets_at is not None:
        wait = max(0.0, limited.resets_at - now)
    if failure is FailureClass.AUTHENTICATION:
        said = f"{said}: {LOG_IN}"
    return ProviderError(failure, said, retry_after=wait, status=status)
