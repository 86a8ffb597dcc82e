"""KSI, the daemon between agents and models: the public names, loaded when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ksi.client import BlockingClient, BlockingHandle, Chunk, Client, Event, Handle, Lock, Subscription
    from ksi.errors import ConnectionFailed, KsiError, RemoteError, WaitTimeout

__all__ = [
    "BlockingClient",
    "BlockingHandle",
    "Chunk",
    "Client",
    "ConnectionFailed",
    "Event",
    "Handle",
    "KsiError",
    "Lock",
    "RemoteError",
    "Subscription",
    "WaitTimeout",
]

_ERRORS = frozenset({"ConnectionFailed", "KsiError", "RemoteError", "WaitTimeout"})


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ksi' has no attribute {name!r}")
    return getattr(import_module("ksi.errors" if name in _ERRORS else "ksi.client"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
