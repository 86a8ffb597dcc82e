"""Claude Code, headless, as a full model: conversations resume, turns stream, and nothing forks or stays behind unseen.

A conversation is a session of Claude Code. Its process is kept warm for the next turn; a turn that was not good ends
it, and the next one begins in a new process at the last good message. Before a turn and after it the
session's transcript is read: messages of other writers are reported, and left out.

`temperature` and `stop` are not Claude Code's to set and are left out.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from secrets import token_bytes
from typing import Any

import msgspec
import structlog

from ksi.content.blocks import Block, is_blank
from ksi.errors import FailureClass, ProviderError
from ksi.host.private_files import make_folder
from ksi.providers.base import (
    Call,
    Capabilities,
    Chunk,
    Completion,
    Origin,
    Permission,
    PersonNeeded,
    Setting,
    StopReason,
    Thought,
    ToolUsed,
    Verdict,
)
from ksi.providers.claude_cli.faults import attributed, is_lost, says_lost
from ksi.providers.claude_cli.host import Host
from ksi.providers.claude_cli.installation import Installation
from ksi.providers.claude_cli.launch import environment, prompt_of, secrets_of
from ksi.providers.claude_cli.limits import named_zone
from ksi.providers.claude_cli.login import LoginGate, LoginPermit, StoredLogin, came_back, is_given, stored_login
from ksi.providers.claude_cli.options import FEATURES, WORK, Options, launch_of, turn_options
from ksi.providers.claude_cli.permissions import (
    LONGEST_INPUT,
    AskedError,
    WaitingTurn,
    WaitingTurns,
    call_id,
    permission_of,
    response_to,
)
from ksi.providers.claude_cli.pool import ClaudePool
from ksi.providers.claude_cli.process import BETWEEN_TURNS, ClaudeProcess, ProcessFault, SilentError
from ksi.providers.claude_cli.sessions import OpenedSession, Sessions, Start
from ksi.providers.claude_cli.stream import Asks, Denied, Started
from ksi.providers.claude_cli.transcript import Seal, find, projects_folder
from ksi.providers.claude_cli.turn import ClaudeTurn
from ksi.providers.process import ProcessRegistry, StrayError

__all__ = ["ClaudeProvider", "Options", "build"]

_TAKEN = 10.0
"""Seconds in which a warm process takes up a turn; else it hangs, and has not called its API."""
_ONE_CALL = 3600.0
"""Seconds that one call of Claude Code's API may take; silence is noticed here, and the queue limits a whole turn."""
_KEY_BYTES = 32
_SNAPSHOT = "--system-prompt-snapshot"
_SCHEMA = "--json-schema"


class _LostError(Exception):
    """The session that was to be resumed is not there."""


class _NotTakenError(Exception):
    """A warm process did not take up its turn."""


class ClaudeProvider:
    """See the module."""

    def __init__(self, setting: Setting, options: Options) -> None:
        self.name = setting.name
        self.capabilities = Capabilities(
            stateful=True,
            mcp="mcp_config" in options.open_to_requests,
            asks=True,
            own_tools=True,
            process=True,
            sessions_on_node=True,
            context_tokens=options.context_tokens,
            price_list="anthropic",
            features=FEATURES,
        )
        self._setting = setting
        self._options = options
        self._idle_timeout = setting.idle_timeout
        self._files = setting.run_folder / "files"
        self._registry = ProcessRegistry(setting.run_folder / "processes")
        self._installation = Installation(options.command, self._base_environment, self._registry, setting.home)
        self._pool = ClaudePool(
            setting.clock, limit=options.warm, age=options.warm_age, memory=options.warm_memory * 2**20
        )
        self._waiting = WaitingTurns(
            setting.clock,
            limit=options.warm,
            keep=options.permission_keep,
            longest=options.permission_timeout,
            discard=self._pool.discard,
        )
        self._gate = LoginGate(lambda: stored_login(self._base_environment()), setting.clock)
        self._failed_login: StoredLogin | None = None
        self._seen_logged_out = False
        self._zone = named_zone(options.env.get("TZ"))
        self._sessions: Sessions | None = None
        self._look: asyncio.Task[None] | None = None
        self._log = structlog.get_logger("ksi.claude")

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Kill the processes that an earlier daemon left running, and begin to find out about the program."""
        for entry in await self._registry.reap(self._setting.clock):
            self._log.warning("killed a process of an earlier daemon", pid=entry.pid, session=entry.name)
        self._sessions = Sessions(
            self._pool,
            self._registry,
            Seal(await asyncio.to_thread(self._make_folders)),
            projects=self._projects,
            files=self._files,
            clock=self._setting.clock,
        )
        self._look = asyncio.create_task(self._installation.look(), name=f"look at {self.name}")

    async def stop(self) -> None:
        """End all processes."""
        if self._look is not None:
            self._look.cancel()
            await asyncio.wait([self._look])
        self._sessions = None
        await self._waiting.close()
        await self._pool.close()

    def problem(self) -> str | None:
        """The reason why it cannot work: not installed, too old, or not logged in."""
        return self._installation.problem()

    def report(self) -> dict[str, Any]:
        """The program's version, and the processes with their memory."""
        return {"version": self._installation.version, **self._pool.report()}

    def knows(self, session: str) -> bool:
        """Return True if Claude Code has a session of this name, be it one of a terminal: its transcript is there."""
        return find(self._projects(), session) is not None

    def transcript(self, session: str) -> Path | None:
        """See `StatefulProvider`."""
        return find(self._projects(), session)

    async def login_works(self) -> bool | None:
        """See `LoginProvider`. A login that is stored in a file is compared with the one that failed. Without such a
        file Claude Code is asked for its status, which takes half a second and makes no call."""
        environment = self._base_environment()
        if is_given(environment):
            return None
        found = await asyncio.to_thread(stored_login, environment)
        if found is not None:
            works = came_back(self._failed_login, found)
        else:
            logged_in = None
            with suppress(ProviderError):
                logged_in = await self._installation.look_at_login()
            works = logged_in if self._seen_logged_out or not logged_in else None
            self._seen_logged_out = self._seen_logged_out or logged_in is False
        if works:
            self._installation.logged_in = True
        return works

    async def let_go(self, conversation: str) -> None:
        """See `AskingProvider`."""
        await self._waiting.let_go(conversation)

    def origin(self, pid: int) -> Origin | None:
        """See `StartingProvider`."""
        if self._options.programs == "owner":
            return None
        processes = {process.pid: process for process in self._pool.processes()}
        try:
            leader = self._registry.leader_of(pid, {process.pid: process.mark for process in processes.values()})
        except StrayError:
            return _nowhere
        return None if leader is None else partial(_request_of, processes[leader])

    # -- a call ---------------------------------------------------------------------------------------------------

    async def complete(self, call: Call) -> AsyncGenerator[Chunk | Thought | ToolUsed | Completion, None]:
        """See the protocol."""
        tools: list[str] = []
        permit: LoginPermit | None = None
        secrets: Sequence[str] = ()
        try:
            sessions, start = await self._prepared(call)
            secrets = start.secrets
            waiting = await self._waiting.take(call.conversation, call.request_id)
            permit = await self._gate.enter()
            if waiting is not None:
                async with aclosing(self._turn(call, sessions, waiting.opened, permit, tools, waiting)) as items:
                    async for item in items:
                        yield item
                return
            _refuse_second_run(call, tools)
            pointed = lost = False
            while True:
                try:
                    opened = await (sessions.begin if lost else sessions.open)(call, start)
                    async with aclosing(self._turn(call, sessions, opened, permit, tools)) as items:
                        async for item in items:
                            yield item
                    return
                except _LostError:
                    lost = pointed or not await sessions.point(call)
                    pointed = True
                except _NotTakenError:
                    self._log.warning("a warm process hung; a new one continues", session=call.provider_session)
        except OSError as fault:
            error = ProviderError(FailureClass.PROVIDER_ERROR, f"its transcript cannot be used: {fault}")
            raise attributed(error, self.name, tools, secrets) from None
        except ProviderError as error:
            if error.failure is FailureClass.AUTHENTICATION:
                self._installation.logged_in = False
                self._failed_login = permit.login if permit is not None else None
            raise attributed(error, self.name, tools, secrets) from None
        finally:
            if permit is not None:
                permit.close()

    async def _prepared(self, call: Call) -> tuple[Sessions, Start]:
        if self._sessions is None:
            raise ProviderError(FailureClass.PROVIDER_ERROR, "it was not started, or is stopped already")
        _check(call)
        launch = launch_of(turn_options(self._options, call), call, self._setting.home)
        command = await self._installation.ready()
        if launch.json_schema is not None and not self._installation.has_option(_SCHEMA):
            raise ProviderError(
                FailureClass.INVALID_REQUEST, "response_format: this Claude Code has no --json-schema; update it"
            )
        if self._installation.has_option(_SNAPSHOT):
            command = [*command, _SNAPSHOT, "off"]  # a request's `system` counts for it, not the conversation's first
        variables = environment(
            self._setting.environ,
            launch,
            own=self._options.env,
            passed=self._options.pass_env,
            timeout=_ONE_CALL,
        )
        if call.traceparent is not None:
            variables["TRACEPARENT"] = call.traceparent
        return self._sessions, Start(
            launch=launch, command=command, environment=variables, secrets=secrets_of(launch, variables)
        )

    async def _turn(
        self,
        call: Call,
        sessions: Sessions,
        opened: OpenedSession,
        permit: LoginPermit,
        tools: list[str],
        waiting: WaitingTurn | None = None,
    ) -> AsyncGenerator[Chunk | Thought | ToolUsed | Completion, None]:
        """One turn in a process, which is kept if the turn was good and ended if not. `tools` is filled with the tools
        with effects that it used. A turn that was `waiting` for an answer goes on with it.

        Raises:
            PersonNeeded: it waits for an answer, and its process does so too, if it may.
        """
        process, prompt_id = opened.process, sessions.new_id() if waiting is None else waiting.prompt_id
        turn = ClaudeTurn(call.model, process.harmless_tools) if waiting is None else waiting.turn
        kept = False
        process.request_id = call.request_id
        process.serve(None if call.tools is None else Host(call.tools))
        try:
            async with aclosing(self._items(call, opened, turn, prompt_id, permit, waiting)) as items:
                async for item in items:
                    yield item
            if turn.failed_servers:
                self._log.warning(
                    "MCP servers did not start, the turn went on without their tools",
                    servers=turn.failed_servers,
                    request_id=call.request_id,
                )
            completion = self._completion(opened, turn)
            session = completion.provider_session or process.session
            last_message = completion.last_message or ""
            position, fork = await sessions.look_after(opened, session, prompt_id, last_message)
            process.harmless_tools = turn.harmless
            if fork is None and not turn.stopped:
                process.rest(position)
                self._pool.put(process)
                kept = True
            self._installation.logged_in = True
            self._seen_logged_out = False
        except AskedError as asked:
            kept = self._may_wait(call)
            if kept:
                self._let_wait(call, opened, turn, prompt_id, asked)
            raise self._needed(turn, asked, waiting=kept) from None
        except ProcessFault as fault:
            failure = FailureClass.TIMEOUT if isinstance(fault, SilentError) else FailureClass.PROVIDER_ERROR
            raise ProviderError(failure, f"{fault}; the next call starts a new process") from None
        finally:
            process.serve(None)
            tools[:] = turn.tools_used
            if not kept:
                await self._pool.discard(process, gently=permit.refreshes)
        yield msgspec.structs.replace(completion, fork=fork or opened.fork)

    def _may_wait(self, call: Call) -> bool:
        return call.permissions is not None and call.permissions.keeps

    def _let_wait(self, call: Call, opened: OpenedSession, turn: ClaudeTurn, prompt_id: str, asked: AskedError) -> None:
        """Keep the process while a person is asked."""
        self._waiting.put(
            WaitingTurn(
                request_id=call.request_id,
                conversation=call.conversation,
                opened=opened,
                turn=turn,
                prompt_id=prompt_id,
                asks=asked.asks,
                must_stay=bool(turn.used_beside(call_id(asked.asks))),
            )
        )

    def _needed(self, turn: ClaudeTurn, asked: AskedError, *, waiting: bool) -> PersonNeeded:
        return PersonNeeded(
            asked.permission,
            seconds=self._options.permission_timeout,
            used=turn.used_beside(call_id(asked.asks)),
            waiting=waiting,
        )

    async def _answer(self, call: Call, turn: ClaudeTurn, process: ClaudeProcess, asks: Asks) -> None:
        """Answer a question for a permission.

        Raises:
            AskedError: a person has to.
        """
        permission = permission_of(asks)
        verdict = self._verdict(call, turn, asks, permission)
        if verdict is None:
            raise AskedError(asks, permission)
        if not verdict.allowed:
            turn.take(Denied(call_id(asks)), now=self._setting.clock.now().unix)
        await process.reply(asks.id, response_to(asks, verdict), self._idle_timeout)

    def _verdict(self, call: Call, turn: ClaudeTurn, asks: Asks, permission: Permission) -> Verdict | None:
        if call.permissions is None:
            return Verdict(allowed=False, why="Nobody is there who could allow it.")
        if len(permission.input) > LONGEST_INPUT:
            return Verdict(allowed=False, why=f"Its input is longer than {LONGEST_INPUT} bytes, and cannot be shown.")
        used = turn.used_beside(call_id(asks))
        if used and not self._may_wait(call):
            return Verdict(
                allowed=False,
                why=f"Nobody was asked: the turn has used {', '.join(used)} already, so it could not go on after an "
                "answer where several daemons share a store.",
            )
        return call.permissions.verdict(permission)

    async def _items(
        self,
        call: Call,
        opened: OpenedSession,
        turn: ClaudeTurn,
        prompt_id: str,
        permit: LoginPermit,
        waiting: WaitingTurn | None,
    ) -> AsyncGenerator[Chunk | Thought | ToolUsed, None]:
        """The turn's pieces of text and uses of tools, until its `result` came."""
        process, taken = opened.process, waiting is not None
        patience = _TAKEN if opened.warm else self._options.start_timeout
        try:
            if waiting is None:
                await process.begin(self._prompt(call, fresh=opened.fresh), prompt_id, patience)
                event = await process.next(patience)
            else:
                event = waiting.asks
                turn.tell_tools_again()
            patience = self._idle_timeout
            while True:
                if isinstance(event, Asks):
                    await self._answer(call, turn, process, event)
                # The turn before may have left such an event; it does not show that this turn was taken up.
                taken = taken or not isinstance(event, BETWEEN_TURNS)
                text = turn.take(event, now=self._setting.clock.now().unix)
                if turn.accepted:
                    permit.close()
                for item in _new_items(turn, text):
                    yield item
                if turn.finished is not None:
                    return
                if isinstance(event, Started) and process.launch.mcp_config is not None:
                    await process.ask_for_harmless_tools(patience)
                if _goes_on_in_vain(turn, call):
                    turn.stopped = True
                    await process.interrupt(patience)
                event = await process.next(patience)
        except ProcessFault as fault:
            if opened.warm and not taken:
                raise _NotTakenError from None
            if says_lost(str(fault)) and not opened.fresh:
                raise _LostError from None
            raise

    def _prompt(self, call: Call, *, fresh: bool) -> str | list[Block]:
        """The prompt of this turn; in a fresh session with the history before it."""
        messages = call.messages[0 if fresh else call.history :]
        return prompt_of(messages, commands=turn_options(self._options, call).commands)

    def _completion(self, opened: OpenedSession, turn: ClaudeTurn) -> Completion:
        """The turn's answer, and the counts of its process at that moment.

        Raises:
            ProviderError: the turn was not good.
            _LostError: the session is not there.
        """
        finished = turn.finished
        if finished is None:
            raise ProviderError(FailureClass.PROVIDER_ERROR, "the turn ended without a result")
        if is_lost(finished) and not opened.fresh:
            raise _LostError
        process = opened.process
        before = 0.0 if opened.fresh else process.total_cost
        cost = finished.turn_cost
        if cost is None and finished.total_cost is not None and before is not None:
            cost = finished.total_cost - before
        process.total_cost = finished.total_cost
        completion = turn.completion(finished, cost=cost, now=self._setting.clock.now().unix, zone=self._zone)
        return msgspec.structs.replace(completion, mcp=process.launch.mcp_config is not None)

    # -- the home -------------------------------------------------------------------------------------------------

    def _base_environment(self) -> dict[str, str]:
        """The variables that are common to all processes."""
        return {**self._setting.environ, **self._options.env}

    def _projects(self) -> Path | None:
        return projects_folder(self._base_environment())

    def _make_folders(self) -> bytes:
        """The folders for processes, emptied of an earlier daemon's files; the key of our seal."""
        shutil.rmtree(self._files, ignore_errors=True)
        work = self._setting.home / WORK
        make_folder(work)
        path = work.parent / "seal"
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            return path.read_bytes()[:_KEY_BYTES]
        key = token_bytes(_KEY_BYTES)
        os.write(handle, key)
        os.close(handle)
        return key


def _request_of(process: ClaudeProcess) -> str | None:
    return process.request_id if process.alive else None


def _nowhere() -> None:
    """The origin of a program whose process has ended."""


def _check(call: Call) -> None:
    """See that there is something to say.

    Raises:
        ProviderError: there is not.
    """
    last = call.messages[-1]
    if last.role != "user":
        raise ProviderError(FailureClass.INVALID_REQUEST, "the last message must be the user's")
    if is_blank(last.content):
        raise ProviderError(FailureClass.INVALID_REQUEST, "the prompt is empty; Claude Code does not accept that")


def _new_items(turn: ClaudeTurn, text: str) -> Iterator[Chunk | Thought | ToolUsed]:
    """What the turn has brought since the last time."""
    if thought := turn.new_thoughts():
        yield Thought(thought)
    if text:
        yield Chunk(text)
    for tool in turn.new_tools():
        yield ToolUsed(tool)


def _refuse_second_run(call: Call, tools: list[str]) -> None:
    """See that a turn is not run again that has done something before it asked.

    Raises:
        ProviderError: it has, and the process that waited for the answer is gone.
    """
    tools += call.permissions.used_before if call.permissions is not None else ()
    if tools:
        raise ProviderError(FailureClass.DAEMON_RESTART, "the process that waited for the answer is gone")


def _goes_on_in_vain(turn: ClaudeTurn, call: Call) -> bool:
    """Return True three times if the program is about to continue after a hard limit: the request's own or the model's
    window."""
    limits = (StopReason.CONTEXT_WINDOW, *((StopReason.MAX_TOKENS,) if call.max_tokens is not None else ()))
    return turn.cut in limits and not turn.stopped


def build(setting: Setting, options: Options) -> ClaudeProvider:
    """The provider for a configuration."""
    return ClaudeProvider(setting, options)
