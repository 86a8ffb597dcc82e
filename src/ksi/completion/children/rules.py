"""What holds for the requests of a run, whichever way it sends them: its tools, or its own programs."""

from __future__ import annotations

import msgspec

from ksi.completion.completion_service import CompletionService
from ksi.config.schema import Chain
from ksi.errors import BudgetExceeded
from ksi.events.completions import GetData
from ksi.request import ChainConfig, Priority, RequestBody, State
from ksi.store.base import Store

FIRST_LOOK = 1.0
"""Seconds after which a run looks at what the request that it waits for waits for itself."""

NEXT_LOOK = 15.0
"""Seconds between two later looks."""


def chain_below(request_id: str, body: RequestBody, config: Chain) -> ChainConfig:
    """The chain of a run's requests: the run is their parent, and its limits are theirs."""
    limits = body.circuit_breaker_config or ChainConfig(
        max_depth=config.max_depth, token_budget=config.token_budget, time_window=config.time_window
    )
    return msgspec.structs.replace(limits, parent_request_id=request_id)


def urgency(asked: Priority, own: Priority) -> str:
    """The priority of a run's request: the asked one, but at most the run's own."""
    return max(asked, own).word


async def refuse_wait_for_budget(store: Store, completions: CompletionService, request_id: str) -> None:
    """See that a run does not wait for a budget: what is set aside in it may be its own.

    Raises:
        BudgetExceeded: it would.
    """
    view = await store.get(request_id)
    if view is not None and view.budget is not None and view.state is State.QUEUED:
        why = (await completions.get(GetData(request_id=request_id))).paused or "it waits for a budget"
        raise BudgetExceeded(
            f"{why}. A run does not wait for a budget, as it may itself hold what is missing; go on without this answer"
        )
