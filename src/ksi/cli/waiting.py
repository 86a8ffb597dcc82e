"""The reason for a request's wait, in a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ksi.cli.render import clock_time

Json = Mapping[str, Any]


def waits_for(reply: Json, providers: Mapping[str, Json]) -> str | None:
    """The reason for a request's wait; None if it runs or has ended.

    Args:
        reply: the answer to `completion:get`.
        providers: the reports of `completion:provider_status` by name.
    """
    match reply.get("status"):
        case "scheduled":
            return f"is to run at {clock_time(reply.get('due_at'))}"
        case "retrying":
            return f"failed ({_last_error(reply)}) and is retried at {clock_time(reply.get('due_at'))}"
        case "parked":
            return f"is parked until {clock_time(reply.get('due_at'))} ({_last_error(reply)})"
        case "held" | "waiting_input":
            return _for_a_person(reply)
        case "queued":
            return _in_line(reply) or _paused(reply) or _at_providers(reply, providers) or "waits for its turn"
    return None


def _for_a_person(reply: Json) -> str:
    question = reply.get("question") or {}
    until = f" until {clock_time(question['expires_at'])}" if question.get("expires_at") is not None else ""
    return f"waits{until} for a person's answer: {question.get('text')}; see `ksi approvals {reply.get('request_id')}`"


def _in_line(reply: Json) -> str | None:
    holder, before, node = reply.get("holder"), reply.get("position") or 0, reply.get("node")
    if holder is not None or before:
        words = "waits for its conversation" + (f", {before} in the queue before it" if before else "")
        return f"{words}; {holder} holds it now" if holder is not None else words
    return f"waits for the machine {node}, which has its dialogue" if node is not None else None


def _paused(reply: Json) -> str | None:
    return None if reply.get("paused") is None else f"waits: {reply['paused']}"


def _last_error(reply: Json) -> str:
    attempts = reply.get("attempts") or [{}]
    words = [str(word) for word in (attempts[-1].get("error"), attempts[-1].get("message")) if word]
    return ": ".join(words) or "no reason was given"


def _at_providers(reply: Json, providers: Mapping[str, Json]) -> str | None:
    """The reason why no provider of its model accepts it."""
    model = str(reply.get("requested_model") or "")
    serving = {name: report for name, report in providers.items() if serves(report, model)}
    # A pause of everything is a reason for every provider.
    reasons = list(
        dict.fromkeys(reason for name, report in serving.items() for reason in _reasons(name, report, model))
    )
    return f"waits: {'; '.join(reasons)}" if reasons else None


def serves(report: Json, model: str) -> bool:
    """True if a provider serves a model, by its report."""
    return any(fnmatchcase(model, pattern) for pattern in report.get("models", ()))


def _reasons(name: str, report: Json, model: str) -> Iterator[str]:
    own = model.partition("/")[2]
    limits = [limit for limit in report.get("limits") or () if fnmatchcase(own, limit.get("models") or "*")]
    if not report.get("enabled"):
        yield f"{report.get('disabled') or f'provider {name} is disabled'}; see `ksi providers enable {name}`"
    elif report.get("paused"):
        yield str(report["paused"])
    elif limits:
        yield from (f"provider {name}: {limit.get('sentence')}" for limit in limits)
    elif report.get("open_until") is not None:
        yield f"provider {name} has failed, and its circuit is open until {clock_time(report['open_until'])}"
    elif report.get("problem"):
        yield f"provider {name}: {report['problem']}"
    elif report.get("running", 0) >= report.get("max_concurrency", 1):
        yield f"provider {name} has no free slot, {report.get('running')} requests run there"
