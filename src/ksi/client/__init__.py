"""The clients: `Client` for asyncio, `BlockingClient` for scripts, and the objects that they return."""

from ksi.client.blocking import BlockingClient, BlockingHandle
from ksi.client.channel import Event
from ksi.client.client import Client
from ksi.client.handle import Chunk, Handle
from ksi.client.lock import Lock
from ksi.client.subscription import Subscription

__all__ = ["BlockingClient", "BlockingHandle", "Chunk", "Client", "Event", "Handle", "Lock", "Subscription"]
