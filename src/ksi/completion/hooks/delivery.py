"""One delivery: a command with the event on its stdin, or a webhook signed as Standard Webhooks has it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import os
import signal
from collections.abc import Mapping, Sequence

import aiohttp

from ksi.clock import MICROSECONDS

PREFIX = "whsec_"
"""The prefix of a secret in Base64."""

SAID = 300
"""Characters that are kept of what a command said on stderr."""


class HookFailed(Exception):
    """A delivery did not arrive; it is tried again."""


def key_of(secret: str) -> bytes:
    """A webhook secret's bytes.

    Raises:
        ValueError: it begins as Base64 and is none.
    """
    if not secret.startswith(PREFIX):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except binascii.Error as error:
        raise ValueError(f"a secret that begins with {PREFIX} is Base64: {error}") from None


def signed(key: bytes | None, identity: str, at: int, body: bytes) -> dict[str, str]:
    """A webhook's headers; `at` is wall time in microseconds. Without a key it is not signed."""
    seconds = str(at // MICROSECONDS)
    headers = {"content-type": "application/json", "webhook-id": identity, "webhook-timestamp": seconds}
    if key is not None:
        digest = hmac.new(key, f"{identity}.{seconds}.".encode() + body, hashlib.sha256).digest()
        headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
    return headers


async def post(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], body: bytes) -> None:
    """Send a webhook. Every 2xx is an arrival, as the standard has it.

    Raises:
        HookFailed: another status, or none.
    """
    try:
        async with session.post(url, data=body, headers=headers, allow_redirects=False) as answer:
            if not 200 <= answer.status < 300:
                raise HookFailed(f"status {answer.status}")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise HookFailed(str(error) or type(error).__name__) from None


async def run(command: Sequence[str], event: str, body: bytes, timeout: float) -> None:
    """Run a command with the event on its stdin. Exit code 0 is an arrival; what outlives its time is killed.

    Raises:
        HookFailed: it cannot be started, ends with another code, or takes too long.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "KSI_HOOK": event},
            start_new_session=True,
        )
    except OSError as error:
        raise HookFailed(str(error)) from None
    try:
        async with asyncio.timeout(timeout):
            _, said = await process.communicate(body)
    except TimeoutError:
        raise HookFailed(f"no end within {timeout:g} s") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode:
        raise HookFailed(f"exit code {process.returncode}: {said.decode('utf-8', 'replace').strip()[-SAID:]}")
