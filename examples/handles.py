"""Put several requests into the queue at once, read one as it comes, cancel one, and wait for the rest.

Needs a running daemon: `ksi start`. Run it with `.venv/bin/python examples/handles.py`.
"""

import asyncio

import ksi


async def main() -> None:
    """Submit, stream, cancel, wait."""
    async with ksi.Client() as client:
        streamed = await client.submit("Tell me about the sea.", stream=True, priority="high")
        others = [await client.submit(f"Say the number {number}.", priority="low") for number in range(3)]
        later = await client.submit("Nobody needs this any more.", delay=3600)

        print((await later.cancel()).status, later.request_id)

        async for text in streamed.stream():
            print(text, end="", flush=True)
        print()

        for handle in others:
            try:
                reply = await handle.result(timeout=120)
            except ksi.RemoteError as error:
                print(f"{handle.request_id} failed: {error.code}: {error.message}")
            else:
                print(f"{handle.request_id}: {reply.result}")


asyncio.run(main())
