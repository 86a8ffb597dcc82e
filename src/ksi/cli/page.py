"""`ksi open`: the daemon's page, in the browser."""

from __future__ import annotations

import asyncio
import html
import os
import sys
import tempfile
import webbrowser
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksi.cli.env import daemon_way
from ksi.cli.render import json_line, note, say
from ksi.cli.settings import Settings, json_option, pass_settings
from ksi.host.private_files import write_whole

if TYPE_CHECKING:
    import aiohttp

    from ksi.client.ways import HttpWay

PATIENCE = 10.0
"""Seconds that a browser gets to connect, before the address is printed for another one."""

ANSWER = 10.0
"""Timeout of the daemon's answer in seconds."""

LEAD = """<!doctype html>
<meta charset="utf-8">
<title>KSI</title>
<meta http-equiv="refresh" content="0; url={address}">
<p><a href="{address}">To the daemon's page</a></p>
"""


@click.command(
    "open",
    epilog="""\b
Examples:
  ksi open
  ksi open --print
""",
)
@click.option("--print", "printed", is_flag=True, help="Only print the address, which admits one browser, once.")
@json_option
@pass_settings
def open_page(settings: Settings, printed: bool, as_json: bool) -> None:
    """Open the daemon's page in the browser.

    The browser is admitted by a one-time code, which expires after two minutes. It gets the code from a file that only
    you can read, because other users can read the arguments of programs. Over ssh, forward the daemon's port (`ssh
    -L`), use --print, and open the printed address.
    """
    way = daemon_way(settings, start=True)
    run_dir = settings.places.run_dir
    with ExitStack() as stack:
        if not run_dir.is_dir():  # the daemon is on another machine
            run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ksi-")))
        asyncio.run(_open(way, run_dir / "open.html", printed=printed, as_json=as_json))


async def _open(way: HttpWay, path: Path, *, printed: bool, as_json: bool) -> None:
    async with _calls(way) as session:
        code = str((await _post(session, way, "codes", {}))["code"])
        address = f"{way.url.rstrip('/')}/#code={code}"
        if as_json:
            json_line({"url": address})
        elif printed:
            say(address)
        else:
            used = asyncio.create_task(_post(session, way, "codes/wait", {"code": code}))
            await _lead_browser(address, path, used)


async def _lead_browser(address: str, path: Path, used: asyncio.Task[dict[str, Any]]) -> None:
    """Start a browser and wait until it has connected, or until the code has expired."""
    with ExitStack() as stack:
        stack.callback(path.unlink, missing_ok=True)
        write_whole(path, LEAD.format(address=html.escape(address)).encode())
        started = _has_screen() and await asyncio.to_thread(webbrowser.open, path.as_uri())
        if started:
            await asyncio.wait([used], timeout=PATIENCE)
        if not used.done():
            note(
                f"ksi: {'no browser has connected' if started else 'no browser could be started'}; open this address "
                "in one, within two minutes:"
            )
            say(address)
        if not (await used)["used"]:
            note("ksi: no browser connected, and the address has expired")


def _has_screen(platform: str = sys.platform) -> bool:
    """True if a browser with windows can be started: one in the terminal could not show the page."""
    if os.environ.get("BROWSER") or platform == "darwin":
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


@asynccontextmanager
async def _calls(way: HttpWay) -> AsyncIterator[aiohttp.ClientSession]:
    import aiohttp

    async with aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {way.token}"}, timeout=aiohttp.ClientTimeout(total=None, connect=ANSWER)
    ) as session:
        yield session


async def _post(session: aiohttp.ClientSession, way: HttpWay, path: str, body: dict[str, str]) -> dict[str, Any]:
    """The reply of the page's interface.

    Raises:
        ConnectionFailed: the daemon does not answer, or does not know the token.
    """
    import aiohttp

    from ksi.errors import ConnectionFailed

    try:
        async with session.post(f"{way.url.rstrip('/')}/page/{path}", json=body) as answer:
            reply = await answer.json()
    except (aiohttp.ClientError, ValueError) as error:
        raise ConnectionFailed(f"{way.url} (from {way.source}): {error}") from None
    if answer.status != 200:
        message = "it serves no page"
        with suppress(KeyError, TypeError):
            message = str(reply["error"]["message"])
        raise ConnectionFailed(f"{way.url} (from {way.source}): {message}")
    return dict(reply)
