"""Finds out whether a run that begins to wait would wait for itself."""

from __future__ import annotations

from ksi.completion.children.lending import Lending
from ksi.errors import ConversationBusy
from ksi.store.base import Store

STEPS = 100
"""Runs that wait for each other and are looked at, at most; a longer row ends by the time limits of its waits."""


async def refuse_deadlock(store: Store, lending: Lending, waiter: str, conversation: str) -> None:
    """Check that a request for which a run begins to wait does not itself wait for that run.

    The conversation's holder may be the run itself, one that waits for it, or one whose own wait ends there: each wait
    is looked at when it begins, so that none closes a circle.

    Raises:
        ConversationBusy: it does; the message says by which request.
    """
    looked: set[str] = set()
    ahead = [conversation]
    while ahead and len(looked) < STEPS:
        lock = await store.lock(ahead.pop(), 0)
        holder = None if lock is None else lock.holder
        if lock is None or holder is None or holder in looked:
            continue
        if holder == waiter:
            raise ConversationBusy(
                f"conversation {conversation!r} waits for the request that asks, {waiter!r}: it holds it, or others "
                "that hold it wait for its end. Ask in another conversation, or submit and do not wait",
                conversation_id=conversation,
                holder=waiter,
            )
        looked.add(holder)
        for awaited in lending.awaited_by(holder):
            view = await store.get(awaited)
            if view is not None and not view.state.final:
                ahead.append(view.conversation)
