"""Claude Code, headless, as a full model: conversations resume, turns stream, and nothing forks or stays behind unseen.

A conversation is a session of Claude Code. Its process is kept warm for the next turn; a turn that was not good ends
it, and the next one begins in a new process at the last good message. Before a turn and after it the session's
transcript is looked at: what others wrote there is told, and left aside.

`temperature` and `stop` are not Claude Code's to set and are left out.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import msgspec
import structlog

from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Call, Capabilities, Chunk, Completion, Setting, StopReason, ToolUsed
from ksi.providers.claude_faults import is_lost, says_lost, told
from ksi.providers.claude_launch import environment, inert, quoted
from ksi.providers.claude_limits import named_zone
from ksi.providers.claude_login import LoginGate, Passage, StoredLogin, came_back, is_given, stored_login
from ksi.providers.claude_options import WORK, Options, launch_of, wishes_of
from ksi.providers.claude_pool import ClaudePool
from ksi.providers.claude_process import ProcessFault, SilentError
from ksi.providers.claude_sessions import Opened, Sessions, Start
from ksi.providers.claude_setup import Installation
from ksi.providers.claude_stream import Started
from ksi.providers.claude_transcript import Seal, find, projects_folder
from ksi.providers.claude_turn import Turn
from ksi.providers.process import ProcessRegistry

__all__ = ["ClaudeProvider", "Options", "build"]

_TAKEN = 10.0
"""Seconds in which a warm process takes up a turn; else it hangs, and has asked nobody."""
_ONE_CALL = 3600.0
"""Seconds that one call of Claude Code's API may take; silence is noticed here, and the queue limits a whole turn."""
_KEY_BYTES = 32
_SNAPSHOT = "--system-prompt-snapshot"


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
            mcp=True,
            process=True,
            sessions_on_node=True,
            context_tokens=options.context_tokens,
            price_list="anthropic",
        )
        self._setting = setting
        self._options = options
        self._idle_timeout = setting.idle_timeout
        run = setting.home / "var" / "run" / setting.name
        self._files = run / "files"
        self._registry = ProcessRegistry(run / "processes")
        self._installation = Installation(options.command, self._base_environment, self._registry, setting.home)
        self._pool = ClaudePool(
            setting.clock, limit=options.warm, age=options.warm_age, memory=options.warm_memory * 2**20
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
        """Kill what a daemon before this one left running, and begin to find out about the program."""
        for entry in await self._registry.reap(self._setting.clock):
            self._log.warning("killed what an earlier daemon left running", pid=entry.pid, session=entry.name)
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
        await self._pool.close()

    def problem(self) -> str | None:
        """That it is not installed, too old, or not logged in."""
        return self._installation.problem()

    def report(self) -> dict[str, Any]:
        """The program's version, and the processes with their memory."""
        return {"version": self._installation.version, **self._pool.report()}

    def knows(self, session: str) -> bool:
        """Whether Claude Code has a session of this name, be it one of a terminal: its transcript is there."""
        return find(self._projects(), session) is not None

    async def login_works(self) -> bool | None:
        """See `LoginProvider`. A login that is stored in a file is compared with the one that failed. Without such a
        file Claude Code is asked for its status, which takes half a second and asks nobody."""
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

    # -- a call ---------------------------------------------------------------------------------------------------

    async def complete(self, call: Call) -> AsyncGenerator[Chunk | ToolUsed | Completion, None]:
        """See the protocol."""
        tools: list[str] = []
        passage: Passage | None = None
        try:
            sessions, start = await self._prepared(call)
            passage = await self._gate.enter()
            pointed = lost = False
            while True:
                try:
                    opened = await (sessions.begin if lost else sessions.open)(call, start)
                    async with aclosing(self._turn(call, sessions, opened, passage, tools)) as items:
                        async for item in items:
                            yield item
                    return
                except _LostError:
                    lost = pointed or not await sessions.point(call)
                    pointed = True
                except _NotTakenError:
                    self._log.warning("a warm process hung; a new one goes on", session=call.provider_session)
        except OSError as fault:
            error = ProviderError(FailureClass.PROVIDER_ERROR, f"its transcript cannot be used: {fault}")
            raise told(error, self.name, tools) from None
        except ProviderError as error:
            if error.failure is FailureClass.AUTHENTICATION:
                self._installation.logged_in = False
                self._failed_login = passage.login if passage is not None else None
            raise told(error, self.name, tools) from None
        finally:
            if passage is not None:
                passage.close()

    async def _prepared(self, call: Call) -> tuple[Sessions, Start]:
        if self._sessions is None:
            raise ProviderError(FailureClass.PROVIDER_ERROR, "it was not started, or is stopped already")
        _check(call)
        launch = launch_of(wishes_of(self._options, call), call, self._setting.home)
        command = await self._installation.ready()
        if self._installation.has_option(_SNAPSHOT):
            command = [*command, _SNAPSHOT, "off"]  # a request's `system` counts for it, not the conversation's first
        variables = environment(
            self._setting.environ,
            launch,
            own=self._options.env,
            passed=self._options.pass_env,
            timeout=_ONE_CALL,
        )
        return self._sessions, Start(launch=launch, command=command, environment=variables)

    async def _turn(
        self, call: Call, sessions: Sessions, opened: Opened, passage: Passage, tools: list[str]
    ) -> AsyncGenerator[Chunk | ToolUsed | Completion, None]:
        """One turn in a process, which is kept if the turn was good and ended if not. `tools` is filled with the tools
        with effects that it used."""
        process, turn, prompt_id = opened.process, Turn(call.model), sessions.new_id()
        kept = False
        try:
            async with aclosing(self._items(call, opened, turn, prompt_id, passage)) as items:
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
            spot, fork = await sessions.look_after(opened, session, prompt_id, last_message)
            if fork is None and not turn.stopped:
                process.rest(spot)
                self._pool.put(process)
                kept = True
            self._installation.logged_in = True
            self._seen_logged_out = False
        except ProcessFault as fault:
            failure = FailureClass.TIMEOUT if isinstance(fault, SilentError) else FailureClass.PROVIDER_ERROR
            raise ProviderError(failure, f"{fault}; the next call starts a new process") from None
        finally:
            tools[:] = turn.tools_used
            if not kept:
                await self._pool.discard(process, gently=passage.refreshes)
        yield msgspec.structs.replace(completion, fork=fork or opened.fork)

    async def _items(
        self, call: Call, opened: Opened, turn: Turn, prompt_id: str, passage: Passage
    ) -> AsyncGenerator[Chunk | ToolUsed, None]:
        """The turn's pieces of text and uses of tools, until its `result` came."""
        process, taken = opened.process, False
        patience = _TAKEN if opened.warm else self._options.start_timeout
        try:
            await process.begin(self._prompt(call, fresh=opened.fresh), prompt_id, patience)
            event = await process.next(patience)
            taken, patience = True, self._idle_timeout
            while True:
                text = turn.take(event, now=self._setting.clock.now().unix)
                if turn.accepted:
                    passage.close()
                if text:
                    yield Chunk(text)
                for tool in turn.new_tools():
                    yield ToolUsed(tool)
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

    def _prompt(self, call: Call, *, fresh: bool) -> str:
        """What is said in this turn; in a fresh session with the history before it."""
        *before, last = call.messages[0 if fresh else call.history :]
        prompt = quoted([(message.role, message.content) for message in before], last.content)
        return prompt if wishes_of(self._options, call).commands else inert(prompt)

    def _completion(self, opened: Opened, turn: Turn) -> Completion:
        """The turn's answer, and what its process had counted by then.

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
        """What is common to all processes."""
        return {**self._setting.environ, **self._options.env}

    def _projects(self) -> Path | None:
        return projects_folder(self._base_environment())

    def _make_folders(self) -> bytes:
        """The folders that processes need, emptied of what an earlier daemon left; the key of our seal."""
        shutil.rmtree(self._files, ignore_errors=True)
        work = self._setting.home / WORK
        work.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = work.parent / "seal"
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            return path.read_bytes()[:_KEY_BYTES]
        key = secrets.token_bytes(_KEY_BYTES)
        os.write(handle, key)
        os.close(handle)
        return key


def _check(call: Call) -> None:
    """See that there is something to say.

    Raises:
        ProviderError: there is not.
    """
    last = call.messages[-1]
    if last.role != "user":
        raise ProviderError(FailureClass.INVALID_REQUEST, "the last message must be the user's")
    if not last.content.strip():
        raise ProviderError(FailureClass.INVALID_REQUEST, "the prompt is empty; Claude Code takes none like that")


def _goes_on_in_vain(turn: Turn, call: Call) -> bool:
    """Return True if the program is about to go on, three times, behind a limit that stands: the request's own or the
    model's window."""
    limits = (StopReason.CONTEXT_WINDOW, *((StopReason.MAX_TOKENS,) if call.max_tokens is not None else ()))
    return turn.cut in limits and not turn.stopped


def build(setting: Setting, options: Options) -> ClaudeProvider:
    """The provider for a configuration."""
    return ClaudeProvider(setting, options)
