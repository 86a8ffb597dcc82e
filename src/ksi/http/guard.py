"""Checks before every request by HTTP: the address it was sent to, the page it comes from, and its token."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import structlog
from aiohttp import web
from aiohttp.typedefs import Middleware

from ksi.errors import KsiError
from ksi.http.clients import is_claude_code
from ksi.http.errors import Refusal, Shape, shape_of
from ksi.http.tokens import Identity, Scope, Tokens

IDENTITY: web.RequestKey[Identity] = web.RequestKey("identity", Identity)
BEGUN: web.RequestKey[web.StreamResponse] = web.RequestKey("begun", web.StreamResponse)
"""The answer whose head is on its way: after that there can be no other one."""

CheckOwn = Callable[[web.Request, Identity], Awaitable[None]]
"""Raises a KsiError if a request's path or headers name something that is not its sender's."""

Find = Callable[[str], Identity | None]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_OPEN = frozenset({"/api/hello", "/"})
"""Paths that a client asks to see whether anybody is there; they tell nothing."""

FOR_ALL = frozenset({"page", "page-file", "page-session"})
"""Routes, by name, that need no token: the page's files, which are the same for everybody and tell nothing of this
daemon, and the way in with a one-time code."""
_FOR_THE_PAGE = ("/v1/events", "/v1/requests/")
"""Paths that a session of the page may ask."""
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


def token_of(request: web.Request) -> str:
    """The token in either of the usual headers."""
    kind, _, token = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() == "bearer" and token.strip():
        return token.strip()
    return request.headers.get("x-api-key", "").strip()


def host_name(host: str) -> str:
    """The name in a `Host` header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


async def note_begun(request: web.Request, response: web.StreamResponse) -> None:
    """Note that an answer begins; a signal of the application."""
    request[BEGUN] = response


def guard(tokens: Tokens, hosts: frozenset[str], check_own: CheckOwn, find: Find) -> Middleware:
    """A middleware that lets in who may come in, and words every refusal in the shape of the door that was asked.

    `hosts` are the names besides those of this machine under which the daemon is reached. `find` says who a token or a
    session stands for.
    """
    known = _LOCAL | hosts
    log = structlog.get_logger("ksi.http")

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            _check_address(request, known)
            if request.method == "HEAD" and request.path in _OPEN:
                return web.Response()
            if request.match_info.route.name in FOR_ALL:
                return await handler(request)
            identity = request[IDENTITY] = _identity(request, find)
            await check_own(request, identity)
            return await _until_revoked(request, handler, tokens, identity)
        except Refusal as error:
            refusal = error
        except KsiError as error:
            refusal = Refusal.of(error)
        except web.HTTPRequestEntityTooLarge as error:
            refusal = Refusal(413, "payload_too_large", f"the body is too large: {error.text}")
        except web.HTTPException as error:
            refusal = _of_framework(request, error)
        except web.RequestPayloadError:
            refusal = Refusal(400, "invalid_request", "the body cannot be read: it contradicts its headers")
        except ConnectionError:
            raise  # the client is gone
        except Exception:
            log.exception("handler failed", path=request.path[:200])
            refusal = Refusal(500, "internal_error", "a defect of the daemon; its log has the trace")
        return _refused(request, refusal)

    return check


async def _until_revoked(
    request: web.Request, handler: Handler, tokens: Tokens, identity: Identity
) -> web.StreamResponse:
    """Serve a request as long as its token is valid."""
    loop = asyncio.get_running_loop()
    limit = asyncio.timeout(None)
    try:
        async with limit:
            with tokens.holding(identity, lambda: limit.reschedule(loop.time())):
                return await handler(request)
    except TimeoutError:
        if not limit.expired():
            raise
        raise _not_known() from None


def _refused(request: web.Request, refusal: Refusal) -> web.StreamResponse:
    """The refusal; an answer that has begun can only be ended."""
    begun: web.StreamResponse | None = request.get(BEGUN)
    if begun is None:
        if refusal.code == "unknown_model" and is_claude_code(request.headers):
            refusal.status = 400  # it shows a sentence of its own in the place of the message of every 404
        answer = shape_of(request).refusal(refusal)
        if not request.content.is_eof():  # the rest of the body would be taken for the next request
            answer.force_close()
        return answer
    if request.transport is not None:
        request.transport.abort()
    return begun


def _not_known() -> Refusal:
    return Refusal(
        401,
        "unauthenticated",
        "this token is not known, or was revoked; `ksi env` prints the owner's, `ksi token create` makes more",
    )


def _of_framework(request: web.Request, error: web.HTTPException) -> Refusal:
    if error.status == 404:
        return Refusal(404, "not_found", f"there is no {request.path[:200]}; `GET /v1/schema` lists the events")
    if error.status == 405:
        return Refusal(405, "method_not_allowed", f"{request.method[:20]} is not possible at {request.path[:200]}")
    return Refusal(error.status, "invalid_request", error.reason)


def _check_address(request: web.Request, known: frozenset[str]) -> None:
    """A page in a browser can make any name lead here, and send requests to any address: neither may reach us."""
    host = request.headers.get("Host", "")
    if host_name(host) not in known:
        raise Refusal(
            403, "forbidden_host", f"this daemon is not reached under the name {host[:100]!r}; [http] hosts adds names"
        )
    origin = request.headers.get("Origin")
    if origin is not None and _origin_host(origin) != host.lower():
        raise Refusal(403, "forbidden_origin", f"pages of {origin[:100]!r} may not use this daemon")


def _origin_host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _identity(request: web.Request, find: Find) -> Identity:
    token = token_of(request)
    if not token:
        raise Refusal(
            401, "unauthenticated", "a token is needed; `ksi env` prints the owner's, `ksi token create` makes more"
        )
    found = find(token)
    if found is None:
        raise _not_known()
    if found.page and not request.path.startswith(_FOR_THE_PAGE):
        raise Refusal(403, "forbidden", "a session of the page is for the page alone; programs use a token")
    return found


def require(request: web.Request, scope: Scope) -> Identity:
    """The sender, if it is allowed.

    Raises:
        Refusal: its token does not allow it.
    """
    identity = request[IDENTITY]
    if identity.scope < scope:
        raise Refusal(
            403,
            "forbidden",
            f"the token {identity.name!r} has the scope {identity.scope.name.lower()}; this needs {scope.name.lower()}",
        )
    return identity


__all__ = ["IDENTITY", "Shape", "guard", "host_name", "require", "token_of"]
