"""Renaming and deletion of conversations in SQL, with all that they contain."""

from __future__ import annotations

from collections.abc import Sequence

import apsw
import msgspec

from ksi.clock import Moment
from ksi.store.admission import Routing
from ksi.store.rules import refusals
from ksi.store.sqlite.chains import Chains
from ksi.store.sqlite.ledger import Ledger
from ksi.store.sqlite.rows import Row
from ksi.store.sqlite.statements import load_statements
from ksi.store.values import Deleted


class Holding(msgspec.Struct, frozen=True):
    """The contents of a conversation at a moment, found by scanning whole tables."""

    conversation: int
    last_key: int
    """The highest key at that time: later rows are searched again."""
    requests: tuple[Row, ...]
    attempts: frozenset[int]
    deliveries: tuple[tuple[int, str], ...]


class Finder:
    """Searches the contents of a conversation, on a connection that delays no other call."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._sql = load_statements("conversations.sql", "statements.sql")
        self._cursor = connection.cursor()

    def _all(self, name: str, *values: object) -> list[Row]:
        rows: list[Row] = self._cursor.execute(self._sql[name], values).fetchall()
        return rows

    def holding(self, name: str) -> Holding:
        """The contents of the conversation with this name.

        Raises:
            NotFound: there is none.
        """
        found = self._all("own_conversation", name)
        if not found:
            raise refusals.unknown_conversation(name)
        identity, own_name, _ = found[0]
        last_key = int(self._all("last_key")[0][0])
        requests = tuple(row for row in self._all("requests_of", identity, 0) if row[0] <= last_key)
        names = [own_name, *(alias for (alias,) in self._all("aliases_of", identity))]
        keys = _json([row[0] for row in requests])
        deliveries = tuple(self._all("deliveries_of", keys, _json(names), identity))
        attempts = frozenset(attempt for (attempt,) in self._all("other_attempts_of", identity))
        return Holding(identity, last_key, requests, attempts, deliveries)


class Conversations:
    """The verbs, in a transaction that the caller holds."""

    def __init__(self, ledger: Ledger, chains: Chains) -> None:
        self._ledger = ledger
        self._chains = chains

    def rename(self, conversation: str, name: str) -> str:
        """See `Store.rename`."""
        found = self._ledger.one("own_conversation", conversation)
        if found is None:
            raise refusals.unknown_conversation(conversation)
        identity, before, _ = found
        meant = self._ledger.scalar("meant_by", name)
        if meant not in (None, identity):
            raise refusals.name_taken(name)
        if name != before:
            self._ledger.run("drop_alias", name)
            self._ledger.run("rename", identity, name)
            self._ledger.run("add_alias", before, identity)
            self._ledger.run("rename_in_forks", identity, before, name)
        return str(before)

    def delete(self, conversation: str, holding: Holding, now: Moment) -> Deleted:
        """See `Store.delete`; `holding` was found before."""
        identity = holding.conversation
        found = self._ledger.one("own_conversation", conversation)
        if found is None or found[0] != identity:
            raise refusals.unknown_conversation(conversation)
        _, own_name, created_at = found
        came_since = self._ledger.all("requests_of", identity, holding.last_key)
        requests = [*holding.requests, *came_since]
        self._check(own_name, identity, requests)
        aliases = tuple(alias for (alias,) in self._ledger.all("aliases_of", identity))
        attempts = set(holding.attempts)
        turns = self._ledger.all("turns_of", identity)
        attempts.update(turn for turn, _ in turns)
        for key, _, last_attempt, chain in requests:
            if last_attempt is not None:
                attempts.update(attempt for (attempt,) in self._ledger.all("attempts_back", last_attempt))
            if chain is not None:
                self._chains.forget(key, chain)
            self._ledger.run("drop_request", key)
            self._ledger.run("drop_body", key)
        for _, request in turns:
            self._ledger.run("drop_body", request)
        for attempt in attempts:
            self._ledger.run("forget_attempt", attempt)
        for delivery, _ in holding.deliveries:
            self._ledger.run("drop_delivery", delivery)
        for statement in ("drop_agents", "drop_aliases", "drop_forks", "drop_conversation"):
            self._ledger.run(statement, identity)
        self._ledger.count("conversations", -1)
        self._ledger.count("deleted", 1)
        self._ledger.forget_conversation(identity)
        names = {own_name, *aliases}
        return Deleted(
            conversation=own_name,
            created_at=created_at,
            requests=len(requests),
            turns=len(turns),
            deliveries=len(holding.deliveries),
            aliases=aliases,
            reached=tuple(sorted({target for _, target in holding.deliveries} - names)),
        )

    def _check(self, name: str, identity: int, requests: Sequence[Row]) -> None:
        member = self._ledger.scalar("not_ended", identity)
        if member is not None:
            raise refusals.not_ended(name, member)
        for key, request_id, _, chain in requests:
            if chain is not None and self._ledger.scalar("routing_of", key) == Routing.UNROUTED:
                raise refusals.not_ended(name, request_id)
        forks = [fork for (fork,) in self._ledger.all("living_forks", identity)]
        if forks:
            raise refusals.has_forks(name, forks)


def _json(values: Sequence[object]) -> str:
    return msgspec.json.encode(values).decode()
