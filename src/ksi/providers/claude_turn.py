"""One turn of Claude Code as it comes: events in, pieces of text out, and at the end the answer or its fault. Pure."""

from __future__ import annotations

import msgspec

from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Completion
from ksi.providers.claude_faults import of_result, of_retry
from ksi.providers.claude_stream import (
    SYNTHETIC,
    Event,
    Finished,
    Limited,
    MessageBegins,
    Piece,
    Retrying,
    Said,
    Started,
    Stopped,
)
from ksi.request import Usage

CUT = "max_tokens"
BETWEEN = "\n\n"
"""Between the texts of two messages of one turn."""


class Turn:
    """Collects a turn."""

    def __init__(self, model: str) -> None:
        """`model` is the one that was asked for."""
        self._model = model
        self._pieces: list[str] = []
        self._messages = 0
        self._new_message = False
        self._word: str | None = None
        self._limited: Limited | None = None
        self.last_message: str | None = None
        """The uuid of the model's last message in the transcript."""
        self.cut = False
        """Whether a message was cut at the limit of its tokens."""
        self.stopped = False
        """Whether we had the program end it there."""
        self.finished: Finished | None = None
        self.failed_servers: tuple[str, ...] = ()
        """MCP servers without whose tools it was made."""

    def take(self, event: Event, *, now: float) -> str:
        """Take an event; the text that it adds to what was said. `now` in Unix seconds.

        Raises:
            ProviderError: the program is about to ask again by itself, which is not its business (F2).
        """
        match event:
            case Piece() | Said() | MessageBegins() if self.stopped:
                return ""  # it had begun to go on behind the limit
            case Piece(text):
                return self._add(text)
            case MessageBegins():
                self._messages += 1
                self._new_message = True
            case Said():
                self._heed(event)
            case Stopped(reason):
                self.cut = self.cut or reason == CUT
            case Started():
                self._model = event.model or self._model
                self.failed_servers = event.failed_servers
            case Retrying():
                raise of_retry(event, self._limited, now=now)
            case Limited():
                self._limited = event
            case Finished():
                self.finished = event
        return ""

    @property
    def _is_one(self) -> bool:
        """Whether the pieces are one text: of one message, or of one that went on where it was cut. Otherwise they are
        what was said between tools, and the last message is the answer."""
        return bool(self._pieces) and (self._messages <= 1 or self.cut)

    def _add(self, text: str) -> str:
        if text and self._new_message:
            text = BETWEEN + text if self._pieces and not self.cut else text
            self._new_message = False
        self._pieces.append(text)
        return text

    def _heed(self, said: Said) -> None:
        if said.model == SYNTHETIC:
            self._word = said.error
        else:
            self._model = said.model or self._model
            self.last_message = said.uuid or self.last_message

    def completion(self, finished: Finished, *, cost: float | None, now: float) -> Completion:
        """The answer; `cost` is in US dollars.

        Raises:
            ProviderError: the turn was not good.
        """
        good = self.stopped or (not finished.is_error and finished.turns >= 1)
        if not good and (finished.is_error or finished.turns >= 1):
            raise of_result(finished, self._word, self._limited, now=now)
        if not good:
            raise ProviderError(
                FailureClass.INVALID_REQUEST, f"it asked no model: {finished.text or 'no reason given'}"
            )
        if self.last_message is None:
            raise ProviderError(FailureClass.PROVIDER_ERROR, "the model answered nothing")
        return Completion(
            text="".join(self._pieces) if self._is_one else finished.text,
            model=self._model,
            usage=_with_cost(finished.usage, cost),
            stop_reason=CUT if self.stopped else finished.stop_reason,
            provider_session=finished.session,
            last_message=self.last_message,
            raw=finished.raw,
        )


def _with_cost(usage: Usage | None, cost: float | None) -> Usage | None:
    """A cost of nothing for something means that the program has no price for the model."""
    return msgspec.structs.replace(usage, cost_usd=cost) if usage is not None and cost else usage
