"""Failed turns of Claude Code, their statuses and words read as failure classes. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import tzinfo

import msgspec

from ksi.errors import FailureClass, ProviderError
from ksi.providers.claude_cli.limits import says_no_money, says_spent, spent
from ksi.providers.claude_cli.stream import Finished, Limited, Retrying
from ksi.providers.faults import ErrorReport, failure_class
from ksi.providers.masking import masked

LOG_IN = (
    "run `claude` as the daemon's user and log in, and KSI continues by itself; or give the daemon ANTHROPIC_API_KEY "
    "or CLAUDE_CODE_OAUTH_TOKEN, and restart it"
)

_OWN_BACKOFF = 0.7
"""Seconds that the program waits by itself before it asks again; a longer wait was asked for by the API."""

_WORDS = {
    "authentication_failed": FailureClass.AUTHENTICATION,
    "oauth_org_not_allowed": FailureClass.AUTHENTICATION,
    "account_on_hold": FailureClass.AUTHENTICATION,
    "verification_required": FailureClass.AUTHENTICATION,
    "cloud_credential_error": FailureClass.AUTHENTICATION,
    "billing_error": FailureClass.BILLING,
    "rate_limit": FailureClass.RATE_LIMITED,
    "overloaded": FailureClass.OVERLOADED,
    "server_error": FailureClass.PROVIDER_ERROR,
    "model_not_found": FailureClass.MODEL_NOT_FOUND,
    "invalid_request": FailureClass.INVALID_REQUEST,
    "max_output_tokens": FailureClass.LIMIT_REACHED,
}
"""The program's words for faults. Some say nothing, as `unknown`."""
_VAGUE = frozenset({FailureClass.INVALID_REQUEST, FailureClass.PROVIDER_ERROR, FailureClass.AUTHENTICATION})
"""Classes of statuses behind which a word can mean something more exact."""

_LIMIT = "error_max_"
_OWN_LIMITS = {"max_turns": "max_turns", "budget_exhausted": "max_budget_usd"}
_FULL = frozenset({"prompt_too_long", "blocking_limit", "rapid_refill_breaker"})
_HOOKS = frozenset({"hook_stopped", "stop_hook_prevented"})
_REFUSED = re.compile(
    r"\AAPI Error: (?:Claude Code is unable to respond to this request|.{1,80} can't (?:help with|respond to) this)|"
    r"\A(?:API Error: )?.{1,80} safeguards flagged this message|appears to violate our Usage Policy",
    re.DOTALL,
)
_FULL_WORDS = re.compile(r"prompt is too long|context window limit|context limit", re.IGNORECASE)
_LOGGED_OUT = re.compile(
    r"/login\b|not logged in|login (?:has )?expired|oauth (?:token|session)|invalid api key|failed to authenticate",
    re.IGNORECASE,
)
_NETWORK = re.compile(r"connect|ECONN|ENOTFOUND|network|socket|getaddrinfo", re.IGNORECASE)
_LOST = ("No conversation found", "No message found with")


def is_lost(finished: Finished) -> bool:
    """Return True if the session or message that was to be resumed is gone."""
    return any(says_lost(error) for error in finished.errors)


def says_lost(message: str) -> bool:
    """Return True if a message of the program says that its session or message is gone."""
    return any(word in message for word in _LOST)


def is_refusal(said: str) -> bool:
    """Return True if a text is the program's own word that the request was declined."""
    return _REFUSED.search(said) is not None and said.startswith("API Error: ")


def is_torso(finished: Finished) -> bool:
    """Return True if a turn that is no error ended with a call of a tool, and so without an answer. The tool by which
    the model gives a structured answer does not count."""
    return finished.stop_reason == "tool_use" and not finished.structured and not finished.is_error


def attributed(error: ProviderError, name: str, tools: Sequence[str], secrets: Sequence[str] = ()) -> ProviderError:
    """The same failure as the provider `name` tells it, without `secrets`, with the tools that ran before it."""
    return ProviderError(
        error.failure,
        f"{name}: {masked(error.message, secrets)}",
        retry_after=error.retry_after,
        status=error.status,
        provider=name,
        limited_models=error.limited_models,
        limit_window=error.limit_window,
        unserved=error.unserved,
        tools_used=tuple(tools),
    )


def of_retry(retry: Retrying, limited: Limited | None, *, now: float) -> ProviderError:
    """The program was about to ask again by itself; `now` in Unix seconds."""
    if retry.status is None:
        failure = _WORDS.get(retry.error, FailureClass.NETWORK_ERROR)
        said = "no whole answer came from its API"
    else:
        failure = _of_status(retry.status, retry.error, "")
        said = f"its API answered {retry.status}"
    wait = retry.delay if failure in _WAITING and retry.delay > _OWN_BACKOFF else None
    fault = _Fault(failure, f"{said} ({retry.error})", retry.status, wait)
    return _error(fault, limited, now, None)


def of_result(
    finished: Finished, word: str | None, limited: Limited | None, *, now: float, zone: tzinfo | None = None
) -> ProviderError:
    """The turn ended in a `result` that is no answer.

    `word` is the program's word for the fault, if it said one; `zone` is the program's time zone (None: the
    system's).
    """
    said = "; ".join(finished.errors) or finished.text or finished.subtype or "it gave no reason"
    limit = _own_limit(finished)
    if limit is not None:
        said = f"it stopped at its limit {limit}" + (f": {said}" if said != finished.subtype else "")
        fault = _Fault(FailureClass.LIMIT_REACHED, said, finished.status)
    elif finished.stop_reason == "refusal" or _REFUSED.search(said):
        fault = _Fault(FailureClass.REFUSED, said, finished.status)
    elif finished.terminal_reason in _FULL or (finished.status is None and _FULL_WORDS.search(said)):
        fault = _Fault(FailureClass.CONTEXT_TOO_LONG, said, finished.status)
    elif finished.terminal_reason in _HOOKS:
        fault = _Fault(FailureClass.LIMIT_REACHED, f"a hook of its configuration stopped it: {said}", finished.status)
    elif is_torso(finished):
        why = f" ({finished.terminal_reason})" if finished.terminal_reason else ""
        said = f"the turn ended in the middle of its tools, without an answer{why}"
        fault = _Fault(FailureClass.PROVIDER_ERROR, said, finished.status)
    elif finished.status is not None:
        fault = _Fault(_of_status(finished.status, word, said), said, finished.status)
    else:
        fault = _Fault(_WORDS.get(word or "") or _of_words(said), said, None)
    return _error(fault, limited, now, zone)


def _own_limit(finished: Finished) -> str | None:
    """The limit of its user that ended a turn, by its name; None if none did."""
    if finished.subtype.startswith(_LIMIT):
        return finished.subtype.removeprefix("error_")
    return _OWN_LIMITS.get(finished.terminal_reason or "")


class _Fault(msgspec.Struct, frozen=True):
    failure: FailureClass
    said: str
    status: int | None
    wait: float | None = None


_WAITING = frozenset({FailureClass.RATE_LIMITED, FailureClass.OVERLOADED})


def _of_status(status: int, word: str | None, said: str) -> FailureClass:
    failure = failure_class(status, ErrorReport(message=said))
    return _WORDS.get(word or "", failure) if failure in _VAGUE else failure


def _of_words(said: str) -> FailureClass:
    """The class of a fault that has neither a status nor a word."""
    if says_spent(said):
        return FailureClass.RATE_LIMITED
    if _LOGGED_OUT.search(said):
        return FailureClass.AUTHENTICATION
    failure = failure_class(None, ErrorReport(message=said))
    if failure is FailureClass.PROVIDER_ERROR and _NETWORK.search(said):
        return FailureClass.NETWORK_ERROR
    return failure


def _error(fault: _Fault, limited: Limited | None, now: float, zone: tzinfo | None) -> ProviderError:
    failure, said = fault.failure, fault.said
    if failure is FailureClass.AUTHENTICATION:
        return ProviderError(failure, f"{said}: {LOG_IN}", status=fault.status)
    if failure is not FailureClass.RATE_LIMITED:
        return ProviderError(failure, said, retry_after=fault.wait, status=fault.status)
    limit = spent(said, limited, now=now, zone=zone)
    if limit.wait is None and says_no_money(said):
        return ProviderError(FailureClass.BILLING, said, status=fault.status)
    return ProviderError(
        failure,
        said,
        retry_after=fault.wait if limit.wait is None else limit.wait,
        status=fault.status,
        limited_models=limit.models,
        limit_window=limit.window,
    )
