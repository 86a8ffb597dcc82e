"""Ask a question, go on in the same conversation, and see what it took.

Needs a running daemon: `ksi start`. Run it with `.venv/bin/python examples/ask.py`.
"""

import asyncio

import ksi


async def main() -> None:
    """Two turns of one conversation."""
    async with ksi.Client() as client:
        first = await client.complete("Name three colours.")
        print(first.result)
        # The reply names the conversation: send that to go on.
        second = await client.complete("And which of them is the warmest?", session_id=first.session_id)
        print(second.result)
        if second.usage is not None:
            print(f"{second.model}: {second.usage.input_tokens} tokens in, {second.usage.output_tokens} out")


asyncio.run(main())
