"""The tools that KSI offers to agents by the Model Context Protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ksi.completion.children.deadlock import refuse_deadlock
from ksi.completion.children.lending import Lending
from ksi.completion.children.rules import FIRST_LOOK, refuse_wait_for_budget, urgency
from ksi.completion.completion_runner import Run
from ksi.completion.replies import HELD, WAITING_INPUT, is_final
from ksi.errors import WaitTimeout
from ksi.events.approval import AnswerData, ApprovalsData
from ksi.events.budget import BudgetStatusData
from ksi.events.bus import LOCK_EXPIRED, LOCKED, News
from ksi.events.completions import CancelData, CompletionData, GetData, JsonSchema, RequestReply, ResponseFormat
from ksi.events.conversations import AcquireLockData, LockHolderData
from ksi.events.service import TokenUsageData
from ksi.events.specs import SCOPES
from ksi.http.ask import Answer, asking, following
from ksi.http.doors import Doors, short_traceparent
from ksi.http.errors import Refusal
from ksi.http.mcp.protocol import Call, Task, Tool
from ksi.http.own import Ownership
from ksi.http.tokens import Identity, Scope
from ksi.protocol import Envelope
from ksi.request import PRIORITY_WORDS, ChainConfig, State

INSTRUCTIONS = (
    "KSI queues requests to language models for you, keeps conversations in order and accounts for every token. "
    "`ask` asks another agent or model and waits for the answer; `submit` and `result` do the same in two steps, so "
    "that you can go on meanwhile. Give the same session_id to go on in a conversation. `lock` keeps a conversation "
    "for you alone while you work on it."
)

TELL = 15.0
"""Seconds between two reports of progress: clients give a call up that says nothing for some minutes."""

Text = Annotated[str, Meta(min_length=1, max_length=4_000_000)]
Name = Annotated[str, Meta(min_length=1, max_length=1_000)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]


class Ask(msgspec.Struct, forbid_unknown_fields=True):
    """The prompt and the model."""

    prompt: Annotated[Text, Meta(description="The prompt for the model.")]
    model: Annotated[
        Name | None, Meta(description="provider/model, such as claude-cli/sonnet; the default is configured.")
    ] = None
    session_id: Annotated[
        Name | None, Meta(description="The conversation to continue; without it a new one begins.")
    ] = None
    system: Annotated[Text | None, Meta(description="Instructions for the model.")] = None
    priority: Literal["critical", "high", "normal", "low", "background"] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=10_000_000)] | None = None
    answer_schema: Annotated[dict[str, Any] | None, Meta(description="A JSON Schema that the answer must fit.")] = None
    timeout: Annotated[Seconds, Meta(description="Maximum wait in seconds; then the id is returned, for `result`.")] = (
        3_600.0
    )


class Result(msgspec.Struct, forbid_unknown_fields=True):
    """A request to look at."""

    request_id: Annotated[Name, Meta(description="As `ask` or `submit` gave it.")]
    timeout: Annotated[
        Annotated[float, Meta(ge=0, le=86_400)], Meta(description="Seconds to wait for its end; 0 looks at once.")
    ] = 0.0


class Cancel(msgspec.Struct, forbid_unknown_fields=True):
    """A request to end."""

    request_id: Name


class Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """Nothing."""


class Lock(msgspec.Struct, forbid_unknown_fields=True):
    """A conversation to keep for oneself."""

    session_id: Name
    timeout: Annotated[Seconds, Meta(description="Seconds to wait for it at most.")] = 60.0


class Unlock(msgspec.Struct, forbid_unknown_fields=True):
    """A lock to give back."""

    lock_id: Annotated[Name, Meta(description="As `lock` gave it.")]


class Usage(msgspec.Struct, forbid_unknown_fields=True):
    """The agent whose usage is wanted."""

    agent_id: Name | None = None
    session_id: Name | None = None
    hours: Annotated[float, Meta(gt=0, le=8_784)] = 24.0


class Budgets(msgspec.Struct, forbid_unknown_fields=True):
    """Whose budgets."""

    budget: Annotated[Name | None, Meta(description="One budget by its name; without it all.")] = None
    scope: Annotated[Name | None, Meta(description="Only those that count for this one, as agent:NAME.")] = None


class Approvals(msgspec.Struct, forbid_unknown_fields=True):
    """Which questions to list."""

    kind: Literal["hold", "approval", "permission"] | None = None


class Approve(msgspec.Struct, forbid_unknown_fields=True):
    """An answer for a request that waits for one."""

    request_id: Name
    approved: Annotated[bool, Meta(description="true lets it go on, false ends it or denies it the tool.")]
    why: Annotated[str, Meta(max_length=4_000, description="Why; with a no, the agent is told.")] = ""


class Answered(msgspec.Struct, omit_defaults=True):
    """A request as it stands. `text` is there once it completed; `error` says why it never will be."""

    request_id: str
    status: str
    session_id: str
    text: str | None = None
    error: str | None = None
    message: str | None = None
    model: str | None = None
    truncated: bool = False
    position: int | None = None
    due_at: float | None = None
    total_tokens: int | None = None
    cost_usd: float | None = None


class Cancelled(msgspec.Struct):
    """How a request stands after it was to be ended."""

    request_id: str
    status: str


class Status(msgspec.Struct):
    """The load and the problems."""

    queued: int
    running: int
    parked: int
    problems: list[str]


class Locked(msgspec.Struct, omit_defaults=True):
    """A lock that was given."""

    lock_id: str
    session_id: str
    fence: int | None = None
    expires_at: float | None = None


class Released(msgspec.Struct):
    """A lock that was given back."""

    released: bool
    session_id: str


class BudgetLeft(msgspec.Struct, omit_defaults=True):
    """How far one is with a budget."""

    budget: str
    scope: str
    unit: str
    used: float
    limit: float
    left: float
    resets_at: float
    on_exceed: str


class BudgetsLeft(msgspec.Struct):
    """All that have used something in the present window."""

    budgets: list[BudgetLeft]


class Asking(msgspec.Struct, omit_defaults=True):
    """A request that waits for a person's answer."""

    request_id: str
    kind: str
    text: str
    agent_id: str | None = None
    prompt: str | None = None
    tool: str | None = None
    input: str | None = None
    expires_at: float | None = None


class AskingAll(msgspec.Struct):
    """All that wait for a person's answer."""

    approvals: list[Asking]


class Approved(msgspec.Struct):
    """How a request stands behind an answer."""

    request_id: str
    status: str
    answer: str


class Used(msgspec.Struct, omit_defaults=True):
    """Tokens and cost."""

    requests: int
    input_tokens: int
    output_tokens: int
    total_tokens: int
    cost_usd: float | None = None


TOOLS = (
    Tool(
        name="ask",
        description="Ask a model or another agent, and wait for the answer. Waits in the queue as long as it takes.",
        takes=Ask,
        gives=Answered,
        read_only=True,
    ),
    Tool(
        name="submit",
        description="Ask without waiting: returns the request's id at once. `result` fetches the answer.",
        takes=Ask,
        gives=Answered,
    ),
    Tool(
        name="result",
        description="The state of a request, with its answer once it has one; with `timeout` waits for the answer.",
        takes=Result,
        gives=Answered,
        read_only=True,
    ),
    Tool(name="cancel", description="End a request that waits or runs.", takes=Cancel, gives=Cancelled),
    Tool(
        name="status",
        description="The number of waiting and running requests, and the daemon's problems.",
        takes=Nothing,
        gives=Status,
        read_only=True,
    ),
    Tool(
        name="lock",
        description="Keep a conversation for you alone: no request of others runs in it until you unlock it.",
        takes=Lock,
        gives=Locked,
    ),
    Tool(name="unlock", description="Give a lock back.", takes=Unlock, gives=Released),
    Tool(
        name="usage",
        description="Tokens and cost of the last hours, of all or of one agent or conversation.",
        takes=Usage,
        gives=Used,
        read_only=True,
    ),
    Tool(
        name="budgets",
        description="What budgets leave until they begin anew: when one is used up, requests wait or are refused.",
        takes=Budgets,
        gives=BudgetsLeft,
        read_only=True,
    ),
    Tool(
        name="approvals",
        description="Requests that wait for a person's answer.",
        takes=Approvals,
        gives=AskingAll,
        read_only=True,
    ),
    Tool(
        name="approve",
        description="Pass on a person's yes or no to a request that waits for it. Never answer in a person's place.",
        takes=Approve,
        gives=Approved,
    ),
)


EVENTS = {
    "ask": "completion:request",
    "submit": "completion:async",
    "result": "completion:get",
    "cancel": "completion:cancel",
    "status": "completion:status",
    "lock": "conversation:acquire_lock",
    "unlock": "conversation:release_lock",
    "usage": "completion:token_usage",
    "budgets": "budget:status",
    "approvals": "completion:approvals",
    "approve": "completion:approve",
}
"""The event that does the same as a tool: a token that allows one allows the other."""


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """The caller: the identity of a token, or a run."""

    identity: Identity
    agent_id: str | None
    run: Run | None = None
    """The caller runs here, and this is its run ..."""
    chain: ChainConfig | None = None
    """... the parent of its requests, with these limits ..."""
    lending: Lending | None = None
    """... and while it waits it needs no slot."""


def for_scope(scope: Scope) -> tuple[Tool, ...]:
    """The tools that a caller of this scope can use."""
    return tuple(tool for tool in TOOLS if SCOPES[EVENTS[tool.name]] <= scope)


class Tools:
    """Executes the tools for one caller."""

    def __init__(self, doors: Doors, own: Ownership, caller: Caller, tools: Sequence[Tool] = TOOLS) -> None:
        self._offered = tools
        self._own = own
        self._completions = doors.completions
        self._announcer = doors.announcer
        self._locks = doors.locks
        self._tracker = doors.tracker
        self._store = doors.store
        self._health = doors.health
        self._approvals = doors.approvals
        self._budgets = doors.budgets
        self._clock = doors.clock
        self._chance = doors.chance
        self._caller = caller

    @property
    def tools(self) -> Sequence[Tool]:
        """See `Handler`."""
        return self._offered

    async def call(self, call: Call) -> msgspec.Struct | Task:
        """See `Handler`."""
        if isinstance(call.data, Ask) and call.tool.name == "ask" and call.data.session_id is not None:
            await self._refuse_deadlock(call.data.session_id)
        await self._check(EVENTS[call.tool.name], call.data)
        match call.data:
            case Ask() if call.tool.name == "submit":
                return await self._submit(call)
            case Ask() if call.takes_task:
                return self._as_task(await self._submit(call))
            case Ask():
                return await self._ask(call)
            case Result():
                return await self._result(call)
            case Cancel(request_id):
                reply = await self._completions.cancel(CancelData(request_id=request_id))
                return Cancelled(request_id, reply.state or reply.status)
            case Nothing():
                return await self._status()
            case Lock():
                return await self._lock(call.data)
            case Unlock(lock_id):
                released = await self._locks.release(LockHolderData(request_id=lock_id), Answer(lock_id))
                return Released(released.released, released.conversation_id)
            case Budgets(budget, scope):
                return await self._budgets_left(BudgetStatusData(budget=budget, scope=scope))
            case Approvals(kind):
                return await self._asking(kind)
            case Approve():
                return await self._approve(call.data)
        return await self._usage(call.data)

    async def _check(self, event: str, data: msgspec.Struct) -> None:
        """Check that the caller's token allows a tool, by the event that does the same."""
        fields = {name: value for name, value in msgspec.to_builtins(data).items() if value is not None}
        await self._own.check_event(Envelope(event, fields), self._caller.identity)

    # -- asking -------------------------------------------------------------------------------------------------------

    def _data(self, call: Call) -> CompletionData:
        ask: Ask = call.data
        form = None
        if ask.answer_schema is not None:
            form = ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=ask.answer_schema))
        return CompletionData(
            prompt=ask.prompt,
            model=ask.model,
            session_id=ask.session_id,
            system=ask.system,
            priority=self._priority(ask),
            max_tokens=ask.max_tokens,
            agent_id=self._caller.agent_id,
            request_id=self._chance.identifier("mcp", self._clock.now()),
            circuit_breaker_config=self._caller.chain,
            response_format=form,
            metadata=_origin(call),
            traceparent=short_traceparent(call.meta.get("traceparent")),
        )

    def _priority(self, ask: Ask) -> str | None:
        """The requested priority; for a run at most its own."""
        own = self._caller.identity.priority
        if self._caller.run is None or own is None or ask.priority is None:
            return ask.priority or own
        return urgency(PRIORITY_WORDS[ask.priority], PRIORITY_WORDS[own])

    async def _submit(self, call: Call) -> Answered:
        data = self._data(call)
        await self._completions.submit(data, Answer(data.request_id or ""))
        return await self._look(data.request_id or "")

    async def _ask(self, call: Call) -> Answered:
        """Wait for the answer. A client that stops waiting has cancelled the request."""
        data = self._data(call)
        async with asking(self._completions, self._announcer, data, keep=False) as answer:
            done = await self._wait(call, answer, call.data.timeout)
            if done is not None:
                return done
            answer.kept = True
        return await self._look(answer.request_id)

    async def _result(self, call: Call) -> Answered:
        known = await self._look(call.data.request_id)
        if is_final(known.status) or not call.data.timeout:
            return known
        await self._refuse_deadlock(known.session_id)
        async with following(self._completions, self._announcer, call.data.request_id) as answer:
            return await self._wait(call, answer, call.data.timeout) or await self._look(call.data.request_id)

    async def _refuse_deadlock(self, conversation: str) -> None:
        """See that a run does not wait for a conversation that waits for the run.

        Raises:
            ConversationBusy: it would.
        """
        if self._caller.run is not None and self._caller.lending is not None:
            await refuse_deadlock(self._store, self._caller.lending, self._caller.run.claim.request_id, conversation)

    async def _wait(self, call: Call, answer: Answer, seconds: float) -> Answered | None:
        """The end of a request, as `_end`; a run that waits for it has no slot meanwhile."""
        if self._caller.run is None or self._caller.lending is None:
            return await self._end(call, answer, seconds)
        async with self._caller.lending.wait(self._caller.run, answer.request_id):
            return await self._end(call, answer, seconds)

    async def _end(self, call: Call, answer: Answer, seconds: float) -> Answered | None:
        """The end of a request, with progress meanwhile; None if it does not end in time."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        pause = TELL if self._caller.run is None else FIRST_LOOK
        while True:
            left = min(pause, until - loop.time())
            if left <= 0:
                return None
            try:
                async with asyncio.timeout(left):
                    done = await answer.end()
                return _answered(done.reply)
            except TimeoutError:
                pause = TELL
                if self._caller.run is not None:
                    await refuse_wait_for_budget(self._store, self._completions, answer.request_id)
                known = await self._look(answer.request_id)
                call.progress(0.0, _sentence(known))
            except Refusal:
                return await self._look(answer.request_id)

    async def _look(self, request_id: str) -> Answered:
        return _answered(await self._completions.get(GetData(request_id=request_id)))

    # -- tasks --------------------------------------------------------------------------------------------------------

    def _as_task(self, known: Answered) -> Task:
        final = is_final(known.status)
        return Task(
            task_id=known.request_id,
            created_at=datetime.fromtimestamp(self._clock.unix(), UTC).isoformat(),
            message=_sentence(known),
            result=known if final else None,
        )

    async def task(self, task_id: str) -> Task:
        """See `Handler`. A task is a request: it outlives its client and the daemon."""
        await self._check("completion:get", Result(task_id))
        return self._as_task(await self._look(task_id))

    async def cancel_task(self, task_id: str) -> None:
        """See `Handler`."""
        await self._check("completion:cancel", Cancel(task_id))
        await self._completions.cancel(CancelData(request_id=task_id))

    # -- the rest -----------------------------------------------------------------------------------------------------

    async def _status(self) -> Status:
        totals = await self._store.totals()
        return Status(totals.queued, totals.running, totals.parked, (await self._health()).problems)

    async def _lock(self, lock: Lock) -> Locked:
        data = AcquireLockData(
            request_id=self._chance.identifier("lock", self._clock.now()),
            conversation_id=lock.session_id,
            timeout=lock.timeout,
        )
        grant = _Grant()
        reply = await self._locks.acquire(data, grant)
        if not reply.acquired:
            try:
                told = await grant.given
            except asyncio.CancelledError:
                await asyncio.shield(self._completions.cancel(CancelData(request_id=reply.request_id)))
                raise
            fence, expires = told.get("fence"), told.get("expires_at")
        else:
            fence, expires = reply.fence, reply.expires_at
        return Locked(lock_id=data.request_id, session_id=reply.conversation_id, fence=fence, expires_at=expires)

    async def _budgets_left(self, asked: BudgetStatusData) -> BudgetsLeft:
        found = await self._budgets.status(asked)
        return BudgetsLeft(
            [
                BudgetLeft(
                    budget=one.budget,
                    scope=subject.scope,
                    unit=one.unit,
                    used=subject.used,
                    limit=subject.limit,
                    left=subject.left,
                    resets_at=one.resets_at,
                    on_exceed=one.on_exceed,
                )
                for one in found.budgets
                for subject in one.subjects
            ]
        )

    async def _asking(self, kind: Literal["hold", "approval", "permission"] | None) -> AskingAll:
        found = await self._approvals.list(ApprovalsData(kind=kind))
        return AskingAll(
            [
                Asking(
                    request_id=one.request_id,
                    kind=one.question.kind,
                    text=one.question.text,
                    agent_id=one.agent_id,
                    prompt=one.prompt,
                    tool=one.question.tool,
                    input=one.question.input,
                    expires_at=one.question.expires_at,
                )
                for one in found.approvals
            ]
        )

    async def _approve(self, answer: Approve) -> Approved:
        data = AnswerData(request_id=answer.request_id, by=self._caller.identity.name, why=answer.why)
        given = await (self._approvals.approve(data) if answer.approved else self._approvals.reject(data))
        return Approved(answer.request_id, given.status, given.question.answer or "")

    async def _usage(self, asked: Usage) -> Used:
        report = await self._tracker.report(
            TokenUsageData(agent_id=asked.agent_id, session_id=asked.session_id, hours=asked.hours, limit=1)
        )
        totals = report.totals
        return Used(
            requests=totals.requests,
            input_tokens=totals.input_tokens,
            output_tokens=totals.output_tokens,
            total_tokens=totals.total_tokens,
            cost_usd=totals.cost_usd,
        )


class _Grant:
    """Waits for a lock to be given."""

    def __init__(self) -> None:
        self.given: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    def push(self, line: bytes) -> None:
        """See `Listener`."""
        told = msgspec.json.decode(line)
        if self.given.done():
            return
        if told.get("event") == LOCKED:
            self.given.set_result(told.get("data") or {})
        elif told.get("event") == LOCK_EXPIRED:
            self.given.set_exception(WaitTimeout("the lock was not given in time; try again, or work elsewhere"))

    def news(self, news: News) -> None:
        """See `Listener`."""
        self.push(news.line())


def _origin(call: Call) -> dict[str, Any] | None:
    """The part of its call that a request keeps: Claude Code names the block of its model's answer."""
    used = call.meta.get("claudecode/toolUseId")
    return {"tool_use_id": used[:200]} if isinstance(used, str) else None


def _answered(reply: RequestReply) -> Answered:
    error = reply.reason or reply.error
    return Answered(
        request_id=reply.request_id,
        status=reply.status,
        session_id=reply.session_id,
        text=reply.result,
        error=error.code if error is not None else None,
        message=error.message if error is not None else None,
        model=reply.model or reply.requested_model,
        truncated=reply.truncated,
        position=reply.position,
        due_at=reply.due_at,
        total_tokens=reply.usage.total_tokens if reply.usage is not None else None,
        cost_usd=reply.cost_usd,
    )


def _sentence(known: Answered) -> str:
    if known.status == State.RUNNING.value:
        return "it runs"
    if known.status in (HELD, WAITING_INPUT):
        return "it waits for a person's answer"
    if known.position:
        return f"{known.status}, {known.position} before it in its conversation"
    return f"{known.status}"
