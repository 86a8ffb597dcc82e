"""`GET /v1/models`: the models that can be named, in either vendor's form."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from ksi.config.schema import Config
from ksi.http.errors import Refusal
from ksi.http.guard import require
from ksi.http.tokens import Scope
from ksi.request import full_model

_CLAUDE = ("opus", "sonnet", "haiku")
_EPOCH = "1970-01-01T00:00:00Z"


def names(config: Config) -> list[str]:
    """The models with known names: of patterns only the literal ones can be listed."""
    found = [full_model(None, config.service.default_model)]
    for name, entry in config.providers.items():
        if not entry.enabled:
            continue
        found += [pattern for pattern in entry.models if not any(sign in pattern for sign in "*?[")]
        if entry.kind == "claude-cli":
            found += [f"{name}/{model}" for model in _CLAUDE]
    found += [*config.models, *config.http.models.values()]
    found += [name for name in config.http.models if not any(sign in name for sign in "*?[")]
    return list(dict.fromkeys(found))


class ModelsDoor:
    """The list, and one of it."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def routes(self) -> list[web.RouteDef]:
        """The paths that this door serves."""
        return [web.get("/v1/models", self.list), web.get("/v1/models/{name:.+}", self.get)]

    async def list(self, request: web.Request) -> web.Response:
        """All models."""
        require(request, Scope.SUBMIT)
        anthropic = "anthropic-version" in request.headers
        items = [_body(name, anthropic=anthropic) for name in names(self._config)]
        if not anthropic:
            return web.json_response({"object": "list", "data": items})
        first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
        return web.json_response({"data": items, "has_more": False, "first_id": first, "last_id": last})

    async def get(self, request: web.Request) -> web.Response:
        """One model by its name."""
        require(request, Scope.SUBMIT)
        name = request.match_info["name"]
        if name not in names(self._config):
            raise Refusal(404, "unknown_model", f"no model {name[:100]!r}; `GET /v1/models` lists those with names")
        return web.json_response(_body(name, anthropic="anthropic-version" in request.headers))


def _body(name: str, *, anthropic: bool) -> dict[str, Any]:
    if anthropic:
        return {"type": "model", "id": name, "display_name": name, "created_at": _EPOCH}
    return {"id": name, "object": "model", "created": 0, "owned_by": name.partition("/")[0]}
