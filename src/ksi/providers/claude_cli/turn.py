"""One turn of Claude Code as it comes: events in, pieces of text out, and at the end the answer or its fault. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import tzinfo

import msgspec

from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Completion, StopReason
from ksi.providers.claude_cli.faults import is_refusal, is_torso, of_result, of_retry
from ksi.providers.claude_cli.stream import (
    SYNTHETIC,
    AssistantBlock,
    Called,
    Denied,
    Event,
    Finished,
    HarmlessTools,
    Limited,
    MessageBegins,
    Piece,
    Results,
    Retrying,
    Started,
    Stopped,
    Thinks,
    Tool,
)
from ksi.providers.claude_cli.tools import has_effects, note_of
from ksi.providers.claude_cli.trail import Trail
from ksi.providers.json_text import TextJoiner
from ksi.request import Usage

_CUTS = {"max_tokens": StopReason.MAX_TOKENS, "model_context_window_exceeded": StopReason.CONTEXT_WINDOW}
_NO_ANSWER = frozenset({"prompt_too_long", "blocking_limit", "rapid_refill_breaker", "aborted_streaming"})
"""Reasons of the program to end a turn that left it without an answer, whatever `is_error` says."""
BETWEEN = "\n\n"
"""Between the texts of two messages of one turn."""


class ClaudeTurn:
    """Collects a turn."""

    def __init__(self, model: str, harmless: frozenset[str] = frozenset()) -> None:
        """`model` is the one that was asked for, `harmless` are the MCP tools that the process declared read-only in
        an earlier turn."""
        self._model = model
        self._pieces: list[str] = []
        self._joiner = TextJoiner()
        self._messages = 0
        self._new_message = False
        self._stop_reason: str | None = None
        self._word: str | None = None
        self._limited: Limited | None = None
        self.harmless = harmless
        """MCP tools that are known to be read-only."""
        self._used: dict[str, str] = {}
        self._untold: list[str] = []
        self._trail = Trail()
        self._thoughts: list[str] = []
        self.accepted = False
        """The API has taken the turn up: the login works."""
        self.last_message: str | None = None
        """The uuid of the model's last message in the transcript."""
        self.cut: StopReason | None = None
        """The limit at which a message was cut: `max_tokens` or `context_window`."""
        self.stopped = False
        """We had the program end the turn at that limit."""
        self.finished: Finished | None = None
        self.failed_servers: tuple[str, ...] = ()
        """MCP servers without whose tools the turn was made."""

    @property
    def tools_used(self) -> tuple[str, ...]:
        """The names of the tools with effects that were called and not denied, in the order of their first use."""
        return tuple(dict.fromkeys(self._used.values()))

    def used_beside(self, call: str) -> tuple[str, ...]:
        """The same without the call of this id."""
        return tuple(dict.fromkeys(name for key, name in self._used.items() if key != call))

    def tell_tools_again(self) -> None:
        """The turn goes on in another attempt, which is to know what it has used."""
        self._untold = list(self._used.values())

    def new_tools(self) -> list[str]:
        """The calls of tools with effects since the last time, each as the tool's name."""
        new, self._untold = self._untold, []
        return new

    def new_thoughts(self) -> str:
        """The model's thinking since the last time."""
        new, self._thoughts = "".join(self._thoughts), []
        return new

    # -- events ---------------------------------------------------------------------------------------------------

    def take(self, event: Event, *, now: float) -> str:
        """Take an event, and return the text that it adds. `now` is in Unix seconds.

        Raises:
            ProviderError: the program is about to ask again by itself, and may not.
        """
        self._follow(event)
        match event:
            case Piece() | AssistantBlock() | MessageBegins() if self.stopped:
                return ""  # it had begun to continue after the limit
            case Piece(text):
                return self._add(self._joiner.add(text))
            case MessageBegins():
                self.accepted = True
                return self._begin_message()
            case AssistantBlock():
                self._heed(event)
            case Called(tools):
                self._use(tools)
            case Denied(call):
                self._used.pop(call, None)
            case HarmlessTools(names):
                self.harmless = names
            case Stopped(reason):
                self._stop_reason = reason
                self.cut = _CUTS.get(reason or "", self.cut)
            case Started():
                self._model = event.model or self._model
                self.failed_servers = event.failed_servers
            case Retrying():
                self._bear(event, now)
            case Limited():
                self._limited = event
            case Finished():
                return self._finish(event)
        return ""

    def _follow(self, event: Event) -> None:
        """Note the program's thinking and actions on its way."""
        match event:
            case AssistantBlock(blocks=blocks) | Results(blocks):
                self._trail.add(blocks)
            case Thinks(text):
                self._thoughts.append(text)

    def _begin_message(self) -> str:
        rest = self._add(self._joiner.rest())
        self._messages += 1
        self._new_message = True
        return rest

    def _add(self, text: str) -> str:
        if text and self._new_message:
            text = BETWEEN + text if self._pieces and self.cut is None else text
            self._new_message = False
        if text:
            self._pieces.append(text)
        return text

    def _heed(self, said: AssistantBlock) -> None:
        self._use(said.tools)
        if said.model == SYNTHETIC:
            self._word = said.error
        else:
            self.accepted = True
            self._word = None
            self._model = said.model or self._model
            self.last_message = said.uuid or self.last_message

    def _use(self, tools: Iterable[Tool]) -> None:
        for tool in tools:
            key = tool.id or tool.name
            if has_effects(tool.name, self.harmless) and key not in self._used:
                self._used[key] = tool.name
                self._untold.append(tool.name)

    def _bear(self, retry: Retrying, now: float) -> None:
        """Forbid the program's own retry, except after tools with effects, as such a turn cannot be run again, and
        after a failed login: the program refreshes it before it asks again, and must not be disturbed in that."""
        error = of_retry(retry, self._limited, now=now)
        if not self._used and error.failure is not FailureClass.AUTHENTICATION:
            raise error

    def _finish(self, finished: Finished) -> str:
        self.finished = finished
        for denial in finished.denials:
            self._used.pop(denial.tool.id, None)
        return self._add(self._joiner.rest())

    # -- the end --------------------------------------------------------------------------------------------------

    def completion(
        self, finished: Finished, *, cost: float | None, now: float, zone: tzinfo | None = None
    ) -> Completion:
        """The answer. `cost` is in US dollars; `zone` is the program's time zone (None: the system's).

        Raises:
            ProviderError: the turn was not good.
        """
        text = self._text(finished)
        note = note_of(finished.denials)
        if not self.stopped:
            self._check(finished, now, zone)
        if not text.strip():
            raise self._empty(finished, note)
        return Completion(
            text=text,
            model=self._model,
            content=self._trail.content(text),
            usage=_with_cost(finished.usage, cost),
            stop_reason=self._reason(finished),
            note=self._noted(note),
            provider_session=finished.session,
            last_message=self.last_message,
            raw=finished.raw,
        )

    def _noted(self, note: str | None) -> str | None:
        if not self._trail.more:
            return note
        left_out = f"{self._trail.more} more steps of its work are not in the blocks."
        return f"{note} {left_out}" if note else left_out

    def _text(self, finished: Finished) -> str:
        """The pieces, if they are one text: of one message, or of one that continued after a cut. Otherwise they are
        remarks between tools, and the last message is the answer."""
        is_one = bool(self._pieces) and (self._messages <= 1 or self.cut is not None) and not finished.structured
        return "".join(self._pieces) if is_one or self.stopped else finished.text

    def _check(self, finished: Finished, now: float, zone: tzinfo | None) -> None:
        """Raise the fault of a turn that is no answer."""
        if not finished.is_error and finished.turns == 0:
            raise ProviderError(
                FailureClass.INVALID_REQUEST, f"it asked no model: {finished.text or 'no reason given'}"
            )
        if (
            finished.is_error
            or self._word is not None
            or finished.subtype.startswith("error_")
            or finished.stop_reason == "refusal"
            or finished.terminal_reason in _NO_ANSWER
            or is_torso(finished)
            or is_refusal(finished.text)
        ):
            raise of_result(finished, self._word, self._limited, now=now, zone=zone)

    def _empty(self, finished: Finished, note: str | None) -> ProviderError:
        if _CUTS.get(finished.stop_reason or self._stop_reason or "", self.cut) is StopReason.CONTEXT_WINDOW:
            return ProviderError(FailureClass.CONTEXT_TOO_LONG, "the context window is full, and nothing was answered")
        said = "the answer is empty" if note is None else f"the answer is empty. {note}"
        return ProviderError(FailureClass.EMPTY_ANSWER, said)

    def _reason(self, finished: Finished) -> str | None:
        if self.stopped:
            return self.cut
        reason = finished.stop_reason or self._stop_reason
        if finished.structured:
            return StopReason.END_TURN  # the tool that was called is the answer
        return _CUTS.get(reason or "", reason)


def _with_cost(usage: Usage | None, cost: float | None) -> Usage | None:
    """A cost of nothing for something means that the program has no price for the model."""
    return msgspec.structs.replace(usage, cost_usd=cost) if usage is not None and cost else usage
