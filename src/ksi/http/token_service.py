"""`token:create`, `token:list`, `token:revoke`, `token:renew`: tokens for HTTP, of which the store keeps hashes."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import structlog

from ksi.clock import MICROSECONDS, Clock
from ksi.completion.budget.service import BudgetService
from ksi.errors import InvalidData, KsiError, NotFound
from ksi.events.budget import BudgetNameData, BudgetSetData
from ksi.events.tokens import (
    OwnerTokenReply,
    Scope,
    TokenBody,
    TokenBudget,
    TokenCreateData,
    TokenCreateReply,
    TokenNameData,
    TokensReply,
)
from ksi.http.tokens import Identity, Tokens, digest, new_token, write_owner_token
from ksi.store.base import Store
from ksi.store.provider_records import KeptRecord, KeptRecords

RECORD = ":tokens"
"""The name of the record in the store; no provider can be called that."""

OWNER = "owner"

MOST = 1_000

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Without a slash, because its holder's own names follow one."""


class KeptToken(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A token as it is kept, by its digest."""

    name: str
    scope: int
    priority: str | None = None
    created: int
    """Wall time in microseconds."""

    def identity(self, key: str) -> Identity:
        """The agent that it stands for."""
        return Identity(name=self.name, scope=Scope(self.scope), priority=self.priority, key=key)

    def shown(self) -> TokenBody:
        """The part that others may see."""
        return TokenBody(
            name=self.name,
            scope=Scope(self.scope).word,  # type: ignore[arg-type]
            priority=self.priority,
            created_at=self.created / MICROSECONDS,
        )


def budget_name(token: str) -> str:
    """The name of a token's own budget, which is its scope as well."""
    return f"token:{token}"


def _budget(token: str, wanted: TokenBudget) -> BudgetSetData:
    return BudgetSetData(
        budget=budget_name(token),
        scope=budget_name(token),
        usd=wanted.usd,
        tokens=wanted.tokens,
        requests=wanted.requests,
        per=wanted.per,
        on_exceed=wanted.on_exceed,
    )


_Kept = dict[str, KeptToken]
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Kept).decode


class TokenService:
    """Tokens hold at all daemons of a store and over restarts; the owner's is one daemon's, in a file of its own."""

    def __init__(self, store: Store, budgets: BudgetService, owner_path: Path, clock: Clock) -> None:
        self._store = store
        self._budgets = budgets
        self.tokens = Tokens()
        """Those that are valid now."""
        self._owner_path = owner_path
        self._clock = clock
        self._record = KeptRecord()
        self._kept: Mapping[str, KeptToken] = {}
        self._one = asyncio.Lock()
        self._log = structlog.get_logger("ksi.tokens")

    async def create(self, data: TokenCreateData) -> TokenCreateReply:
        """`token:create`: a new one, whose secret is in this reply and nowhere else.

        Raises:
            InvalidData: the name is taken, there are too many, or its budget is none.
            StoreError: it could not be kept, and is not valid.
        """
        if data.name == OWNER:
            raise InvalidData("name: 'owner' is the owner's; `token:renew` replaces that token", path="name")
        if _NAME.fullmatch(data.name) is None:
            raise InvalidData(
                f"name: {data.name!r} is not a valid name; use letters, digits, '.', '_' and '-', beginning with a "
                "letter or digit",
                path="name",
            )
        if data.budget is not None and data.scope == "operate":
            raise InvalidData(
                "budget: a token with the scope operate names the agents of its requests and can raise every budget; "
                "give it the scope submit or read",
                path="budget",
            )
        secret = new_token()
        token = KeptToken(
            name=data.name,
            scope=Scope[data.scope.upper()],
            priority=data.priority,
            created=self._clock.now().wall,
        )

        def add(kept: Mapping[str, KeptToken]) -> _Kept:
            if any(one.name == data.name for one in kept.values()):
                raise InvalidData(
                    f"name: there is a token {data.name!r} already, and its secret is not kept; revoke it first",
                    path="name",
                )
            if len(kept) >= MOST:
                raise InvalidData(f"there are {MOST} tokens; revoke some that are not used any more")
            return {**kept, digest(secret): token}

        add(self._kept)  # A taken name says so before its budget is touched.
        if data.budget is not None:
            # Before the token is valid: no request of its comes without the limit.
            await self._budgets.set(_budget(data.name, data.budget))
        try:
            await self._change(add)
        except KsiError:
            await self._drop_budget(data.name)
            raise
        self._log.warning("token created", name=data.name, scope=data.scope)
        return TokenCreateReply(token=secret, **msgspec.structs.asdict(token.shown()))

    async def list(self) -> TokensReply:
        """`token:list`: all besides the owner's, without their secrets."""
        return TokensReply(tokens=sorted((one.shown() for one in self._kept.values()), key=lambda one: one.name))

    async def revoke(self, data: TokenNameData) -> TokensReply:
        """`token:revoke`: valid no more, here at once and at other daemons of the store as soon as they hear of it.

        Raises:
            NotFound: there is none of this name.
            InvalidData: it is the owner's.
            StoreError: it could not be kept, and the token is still valid.
        """
        if data.name == OWNER:
            raise InvalidData("name: the owner's token is replaced by `token:renew`, and never missing", path="name")

        def remove(kept: Mapping[str, KeptToken]) -> _Kept:
            left = {key: one for key, one in kept.items() if one.name != data.name}
            if len(left) == len(kept):
                raise NotFound(f"there is no token {data.name!r}; `ksi token list` shows those that there are")
            return left

        await self._change(remove)
        await self._drop_budget(data.name)
        self._log.warning("token revoked", name=data.name)
        return await self.list()

    async def renew(self) -> OwnerTokenReply:
        """`token:renew`: a new token of the owner of this daemon; the old one is valid no more."""
        self.tokens.take_owner(await asyncio.to_thread(write_owner_token, self._owner_path))
        self._log.warning("the owner's token was replaced", path=str(self._owner_path))
        return OwnerTokenReply(path=str(self._owner_path))

    async def _drop_budget(self, name: str) -> None:
        """Forget a token's own budget, if it has one."""
        with contextlib.suppress(NotFound):
            await self._budgets.drop(BudgetNameData(budget=budget_name(name)))

    def hear(self, found: KeptRecords) -> None:
        """Use the stored tokens; called with all records when they were read."""
        record = found.records.get(RECORD, KeptRecord())
        if record.version > self._record.version:  # an older one was read before a change of ours, and would undo it
            self._take(record)

    async def _change(self, step: Callable[[Mapping[str, KeptToken]], _Kept]) -> None:
        """Change the stored tokens; again from another daemon's version if that was faster."""
        async with self._one:
            written = False
            while not written:
                value = _encode(step(self._kept))
                put = await self._store.put_provider_record(
                    RECORD, self._record.version, value, self._clock.now(), tell=True
                )
                written = put.written
                self._take(put.kept)

    def _take(self, record: KeptRecord) -> None:
        if record == self._record:
            return
        self._record = record
        self._kept = self._decoded(record)
        self.tokens.take_agents({key: one.identity(key) for key, one in self._kept.items()})

    def _decoded(self, record: KeptRecord) -> _Kept:
        if not record.version:
            return {}
        try:
            return _decode(record.value)
        except msgspec.MsgspecError as error:
            self._log.error("the tokens cannot be read; only the owner's is valid", error=str(error))
            return {}
