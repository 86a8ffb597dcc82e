"""The page's files, and how a browser is let in: a one-time code is exchanged for a session."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Mapping
from functools import cached_property
from importlib.resources import files

import msgspec
from aiohttp import web

from ksi.http.doors import read_object, text_field
from ksi.http.errors import Refusal
from ksi.http.guard import IDENTITY, Find
from ksi.http.page.sessions import CODE_LIFETIME, PREFIX, PageSessions
from ksi.http.tokens import Identity, Tokens

KINDS: Mapping[str, str] = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Nothing from elsewhere, nothing inline, and no text that becomes markup."""

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Asked for again each time, and answered with 304: a daemon of another version has another page.
    "Cache-Control": "no-cache",
}


class PageFile(msgspec.Struct, frozen=True):
    """One file of the page."""

    body: bytes
    kind: str
    tag: str
    """An entity tag: it changes with the file."""


class PageDoor:
    """Serves the page."""

    def __init__(self, sessions: PageSessions) -> None:
        self._sessions = sessions

    def routes(self) -> list[web.RouteDef]:
        """The paths that this door serves."""
        return [
            web.get("/", self.index, name="page", allow_head=False),
            web.get("/page/{file:.+}", self.file, name="page-file"),
            web.post("/page/codes", self.new_code),
            web.post("/page/codes/wait", self.wait_for_code),
            web.post("/page/sessions", self.new_session, name="page-session"),
        ]

    def find(self, tokens: Tokens) -> Find:
        """The identity of a token or a session."""

        def found(token: str) -> Identity | None:
            return self._sessions.find(token) if token.startswith(PREFIX) else tokens.find(token)

        return found

    # -- files --------------------------------------------------------------------------------------------------------

    @cached_property
    def _files(self) -> Mapping[str, PageFile]:
        """All files, read at the first use."""
        found = {}
        folders = [("", files("ksi.http.page").joinpath("files"))]
        while folders:
            path, folder = folders.pop()
            for entry in folder.iterdir():
                name = path + entry.name
                if entry.is_dir():
                    folders.append((f"{name}/", entry))
                elif kind := KINDS.get(name.rpartition(".")[2]):
                    body = entry.read_bytes()
                    found[name] = PageFile(body, kind, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
        return found

    async def index(self, request: web.Request) -> web.Response:
        """The page itself."""
        return self._answer(request, "index.html")

    async def file(self, request: web.Request) -> web.Response:
        """One of its files."""
        return self._answer(request, request.match_info["file"])

    def _answer(self, request: web.Request, name: str) -> web.Response:
        found = self._files.get(name)
        if found is None:
            raise Refusal(404, "not_found", f"the page has no file {name[:100]!r}")
        headers = {**HEADERS, "ETag": found.tag}
        if request.headers.get("If-None-Match") == found.tag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=found.body, content_type=found.kind, charset="utf-8", headers=headers)

    # -- the way in ---------------------------------------------------------------------------------------------------

    async def new_code(self, request: web.Request) -> web.Response:
        """A code that admits a browser once, with the permissions of this request's token."""
        code = secrets.token_urlsafe(24)
        self._sessions.offer(code, request[IDENTITY])
        return _json({"code": code, "seconds": CODE_LIFETIME})

    async def wait_for_code(self, request: web.Request) -> web.Response:
        """Answers when a code was used, or is too old."""
        used = self._sessions.used(text_field(await read_object(request), "code"), request[IDENTITY])
        if used is None:
            return _json({"used": False})
        done, _ = await asyncio.wait([used], timeout=CODE_LIFETIME)
        return _json({"used": bool(done)})

    async def new_session(self, request: web.Request) -> web.Response:
        """A session for a code."""
        made = self._sessions.redeem(text_field(await read_object(request), "code"))
        if made is None:
            raise Refusal(401, "unauthenticated", "this code was used before, or is too old; `ksi open` makes another")
        return _json({"session": made[0], "expires_at": made[1]})


def _json(body: Mapping[str, object]) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body), content_type="application/json", headers={"Cache-Control": "no-store"}
    )
