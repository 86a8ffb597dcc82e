"""Chains as the store would tell of them, for the tests of what is decided on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ksi.config.schema import Chain, Patterns
from ksi.injection.circuit_breakers import ChainBreaker
from ksi.injection.fingerprint import mark_failure, mark_text
from ksi.injection.injection_router import Ended, InjectionRouter
from ksi.injection.reminders import Templates
from ksi.request import Attempt, ChainConfig, HeadStarts, InjectionConfig, Outcome, RequestBody, State
from ksi.store.chains import ChainView, Hop, Spending, Trail

SECOND = 1_000_000
NOW = 1_700_000_000 * SECOND
HEAD_STARTS = HeadStarts(high=6, normal=3, low=1, background=0)


def breaker(chain: Chain | None = None, patterns: Patterns | None = None) -> ChainBreaker:
    return ChainBreaker(chain or Chain(), patterns or Patterns())


def router(templates: Templates | None = None) -> InjectionRouter:
    return InjectionRouter(templates or Templates(), breaker(), HEAD_STARTS)


def body(injection: InjectionConfig | None = None, **fields: Any) -> RequestBody:
    return RequestBody(**{"prompt": "Look into it.", "session_id": "alpha", "injection_config": injection, **fields})


def ended(injection: InjectionConfig | None, **fields: Any) -> Ended:
    """A request of conversation `alpha` that completed, but for what is given."""
    plain: dict[str, Any] = {
        "request_id": "req_1",
        "conversation": "alpha",
        "body": body(injection),
        "state": State.COMPLETED,
        "model": "stub/echo",
        "route": "stub",
        "agent_id": "ann",
        "text": "The answer.",
    }
    return Ended(**(plain | fields))


def attempt(text: str | None, message: str | None = None) -> Attempt:
    outcome = Outcome.COMPLETED if text is not None else Outcome.FAILED
    return Attempt(number=1, provider="stub", outcome=outcome, started_at=0, finished_at=1, text=text, message=message)


def trail(said: Sequence[tuple[str, str | None]], **view: Any) -> Trail:
    """A chain whose hops are (conversation, result), the oldest first; None failed with a timeout. The last hop is the
    one that ends now: its result is not kept yet."""
    limits = breaker().limits(ChainConfig(max_depth=1000))
    hops = [
        Hop(
            request_id=f"req_{depth}",
            depth=depth,
            conversation=speaker,
            agent_id=None,
            state=State.COMPLETED if text is not None else State.FAILED,
            error=None if text is not None else "timeout",
            mark=None,
            result=mark_text(text) if text is not None else mark_failure("timeout", "no answer within 600 s"),
        )
        for depth, (speaker, text) in enumerate(said)
    ]
    hops[-1] = msgspec.structs.replace(hops[-1], result=None)
    plain: dict[str, Any] = {
        "chain": "req_0",
        "created_at": NOW - 60 * SECOND,
        "limits": limits,
        "spending": Spending(started_at=NOW - 60 * SECOND),
        "members": len(hops),
        "depth": len(hops) - 1,
        "estimated": 0,
        "unfinished": 1,
        "guard_messages": 0,
        "resets": 0,
    }
    return Trail(view=ChainView(**(plain | view)), hops=tuple(reversed(hops)))
