"""KSI's tools for an agent that runs under KSI: the run is the caller, and its requests are the run's children."""

from __future__ import annotations

from typing import Any

from ksi.completion.children.lending import Lending
from ksi.completion.children.rules import chain_below
from ksi.completion.completion_runner import Run
from ksi.http.doors import Doors
from ksi.http.mcp.protocol import Session
from ksi.http.mcp.tools import Caller, Tools, for_scope
from ksi.http.own import Ownership
from ksi.http.tokens import Identity, Scope
from ksi.providers.base import ToolServer

INSTRUCTIONS = (
    "KSI runs you, and these tools ask other agents and models through it. `ask` asks one and waits for the answer; "
    "`submit` and `result` do the same in two steps. What you ask counts against the limits of the request that you "
    "work on. Give the same session_id to go on in a conversation that you began."
)


class RunTools:
    """Makes a server of tools for each run that is to have one. It needs no token: the run's own pipe leads here."""

    def __init__(self, doors: Doors, own: Ownership, lending: Lending) -> None:
        self._doors = doors
        self._own = own
        self._lending = lending

    def server(self, run: Run) -> ToolServer:
        """The tools of one run."""
        claim = run.claim
        name = claim.agent_id or claim.request_id
        caller = Caller(
            identity=Identity(name=name, scope=Scope.SUBMIT, priority=claim.priority.word),
            agent_id=name,
            chain=chain_below(claim.request_id, run.body, self._doors.config.chain),
            run=run,
            lending=self._lending,
        )
        tools = Tools(self._doors, self._own, caller, for_scope(Scope.SUBMIT))
        session = Session(tools, self._doors.version, INSTRUCTIONS)

        async def answer(message: Any) -> dict[str, Any] | None:
            return await session.answer(message, lambda _: None)

        return answer
