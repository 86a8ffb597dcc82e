"""See what happens to requests while it happens: subscribe to events by pattern.

Needs a running daemon: `ksi start`. Run it with `.venv/bin/python examples/watch.py`.
"""

import asyncio

import ksi


async def main() -> None:
    """Watch two requests to their ends."""
    async with ksi.Client() as client, client.subscribe("completion:result", "conversation:*") as events:
        # Two turns of one conversation: the second waits for the first.
        waiting = {(await client.submit(f"Turn {turn}", session_id="watched")).request_id for turn in (1, 2)}
        async for event in events:
            print(event.event, event.data.get("request_id"), event.data.get("status", ""))
            if event.event == "completion:result":
                waiting.discard(event.data["request_id"])
            if not waiting:
                return


asyncio.run(main())
