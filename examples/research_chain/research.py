"""A researcher and a coordinator work through each other's answers, within limits, and their chain is drawn at the end.

Needs a running daemon: `ksi start`. Run it with `.venv/bin/python examples/research_chain/research.py`. The local model
is small: look at who answers whom, not at what they say.
"""

import asyncio
from typing import Any

import ksi

FINAL = {"completed", "failed", "cancelled", "blocked", "expired"}


async def main() -> None:
    """Begin the chain, wait for its end, draw it."""
    async with ksi.Client() as client:
        question = await client.submit(
            "In one sentence: why do leaves change their colour in autumn?",
            session_id="researcher",
            agent_id="researcher",
            max_tokens=60,
            injection_config={
                "trigger_type": "research",
                "target_sessions": ["coordinator"],  # the answer becomes a request of this conversation ...
                "inherit": "reply",  # ... and the answer to that comes back, and so on
                "follow_up_guidance": "In one sentence: what should be found out next?",
            },
            circuit_breaker_config={"max_depth": 3, "token_budget": 20_000},  # until one of these says no
        )
        print((await question.result()).result)
        status = await ended(client, question.request_id)
        draw(status["requests"])
        chain = status["chain"]
        print(f"{chain['members']} requests, {chain['tokens_used']:,} of {chain['token_budget']:,} tokens")


async def ended(client: ksi.Client, chain_id: str) -> dict[str, Any]:
    """The chain, when all of it has ended. A request's follow-ups are there the moment it ends: none can be missed."""
    while True:
        status = await client.send_event("circuit_breaker:status", {"chain_id": chain_id, "members": True})
        waiting = [request for request in status["requests"] if request["status"] not in FINAL]
        if not waiting:
            return dict(status)
        for request in waiting:
            await client.send_event("completion:wait", {"request_id": request["request_id"]})


def draw(requests: list[dict[str, Any]]) -> None:
    """One line a request, further in for each hop. `ksi chain ID` draws it with more."""
    for request in requests:
        print(f"{'   ' * request['depth']}└─ {request['session_id']}: {request['status']}, {request['tokens']} tokens")


asyncio.run(main())
