"""Checks that version 2 is complete and works: its parts are imported, and a daemon of its own answers."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ksi.client import Client
from ksi.clock import Chance, SystemClock
from ksi.config.reader import load
from ksi.daemon.daemon import Daemon
from ksi.errors import KsiError, MigrationError
from ksi.request import State

PARTS: Mapping[str, str] = {
    "ksi.completion.queue_manager": "QueueManager",
    "ksi.completion.provider_manager": "ProviderManager",
    "ksi.completion.session_manager": "SessionManager",
    "ksi.completion.token_tracker": "TokenTracker",
    "ksi.completion.retry_manager": "decide",
    "ksi.injection.injection_router": "",
    "ksi.injection.circuit_breakers": "",
    "ksi.conversation.conversation_lock": "ConversationLocks",
    "ksi.store.sqlite.store": "SqliteStore",
}
"""The modules that version 2 depends on, and the names each must have."""

PATIENCE = 30.0
"""Seconds that the test daemon gets for an answer."""


def check_parts() -> None:
    """Import every part.

    Raises:
        MigrationError: one is missing or broken; the message names it.
    """
    for module, name in PARTS.items():
        try:
            part = import_module(module)
        except ImportError as error:
            raise MigrationError(f"version 2 is not complete: {module} cannot be imported ({error})") from None
        if name and not hasattr(part, name):
            raise MigrationError(f"version 2 is not complete: {module} has no {name}")


def self_test() -> None:
    """Let a daemon on a home of its own answer a completion, hold a lock, count its queue and find all again.

    Raises:
        MigrationError: a part of it does not work; the message names it.
    """
    with tempfile.TemporaryDirectory(prefix="ksi-migrate-") as folder:
        try:
            asyncio.run(_self_test(Path(folder)))
        except (KsiError, OSError, TimeoutError) as error:
            raise MigrationError(f"version 2 does not work here: {type(error).__name__} {error}") from None


async def _self_test(home: Path) -> None:
    stub = {"kind": "stub", "models": ["stub/*"]}
    flags: dict[str, dict[str, Any]] = {
        "service": {"default_model": "stub/echo"},
        "providers": {"local": {"enabled": False}, "stub": stub},
    }
    config = load(home, {}, flags)
    for run in (1, 2):
        daemon = Daemon(config, SystemClock(), Chance(), {})
        await daemon.start()
        try:
            async with asyncio.timeout(PATIENCE), Client(config.socket_path) as client:
                await _exercise(client, run)
        finally:
            await daemon.stop()


async def _exercise(client: Client, run: int) -> None:
    asked = {"prompt": "Hello", "session_id": "self-test", "request_id": f"self-test-{run}"}
    reply = await client.send_event("completion:request", asked)
    if reply.get("status") != State.COMPLETED.value:
        raise MigrationError(f"the test completion is {reply.get('status')}")
    name = {"request_id": f"self-test-lock-{run}"}
    lock = await client.send_event("conversation:acquire_lock", {**name, "conversation_id": "self-test"})
    if not lock.get("acquired"):
        raise MigrationError("the test lock was not given")
    await client.send_event("conversation:release_lock", name)
    status = await client.send_event("completion:queue_status", {})
    if (status.get("completed"), status.get("locked_conversations")) != (run, 0):
        raise MigrationError(f"the test queue counts wrong: {status}")
