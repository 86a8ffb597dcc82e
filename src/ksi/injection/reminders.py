"""Makes the text of a delivery of its facts, with the trigger's template. The user's own templates come first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateError, TemplateNotFound, TemplateSyntaxError
from jinja2.loaders import split_template_path
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ksi.injection.wrapper import wrap

GENERAL = "general"
"""The template that replaces a missing or broken one."""
TRIGGERS = ("research", "coordination", "memory", "antThinking", GENERAL)
"""The triggers whose templates are in the package."""
SUFFIX = ".md.j2"

_PACKAGE = Path(__file__).with_name("templates")
_LONG = frozenset({"result", "guidance"})
_FAULTS = (
    TemplateError,
    OSError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""Errors of a template: the engine's own, an unreadable file, and errors of its expressions."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """The variables of a template by name. Each is one line, except `result` and `guidance`."""

    trigger: str
    outcome: str
    """`completed`, `failed`, `timeout`, `cancelled`, `expired`, `blocked`; `undelivered` for the notice that a
    delivery was blocked."""
    mode: str
    """`direct` or `next`."""
    request_id: str
    """The request that ended."""
    conversation: str
    """The conversation in which it ran."""
    target: str
    """The target."""
    own: bool
    """True if these two are the same."""
    agent_id: str | None
    """The agent of the request."""
    chain: str
    hop: int
    """Of this delivery; the chain's first request has 0. Of the request itself, where this tells of a block."""
    max_depth: int
    tokens_used: int
    """Charged to the chain, this request included."""
    token_budget: int
    age_seconds: int
    time_window_seconds: int
    result: str = ""
    """Neutralised already, like `guidance`."""
    truncated: bool = False
    """True if the result was cut at a limit of tokens."""
    error_code: str | None = None
    error_message: str | None = None
    guidance: str | None = None
    passed_on: bool = False
    """True if the target's answer is passed on in its turn ..."""
    reply_to: str | None = None
    """... and if `inherit` is `reply`, the conversation it goes to."""
    warning: str | None = None
    """What the pattern checks suspect of the chain, in a sentence."""
    undelivered_id: str | None = None
    """The blocked delivery, for a notice of a block."""


class Rendered(msgspec.Struct, frozen=True):
    """A reminder's text, wrapped; `problem` names the error of a template that was replaced by another."""

    text: str
    problem: str | None = None


class _Folders(BaseLoader):
    """Templates from the first folder that has them. A file that changes, comes or goes is seen at the next use."""

    def __init__(self, *folders: Path) -> None:
        self._folders = folders

    def get_source(self, environment: Environment, template: str) -> tuple[str, str | None, Callable[[], bool]]:
        """The text, its path, and the check that it is still current."""
        found = self._find(template)
        if found is None:
            raise TemplateNotFound(template)
        return found[0].read_text("utf-8"), str(found[0]), lambda: self._find(template) == found

    def _find(self, template: str) -> tuple[Path, int] | None:
        parts = split_template_path(template)
        for folder in self._folders:
            path = folder.joinpath(*parts)
            if path.is_file():
                return path, path.stat().st_mtime_ns
        return None


class Templates:
    """The templates by trigger. A user's file is read when it is used, and again when it was changed."""

    def __init__(self, user_folder: Path | None = None) -> None:
        """`user_folder` holds `<trigger>.md.j2` files that come before the package's, or add triggers to them. It need
        not exist."""
        self._folder = user_folder
        self._any = _environment(_Folders(*([user_folder] if user_folder is not None else []), _PACKAGE))
        self._own = _environment(_Folders(_PACKAGE))

    def names(self) -> tuple[str, ...]:
        """The triggers that have a template, sorted."""
        found = set(TRIGGERS)
        if self._folder is not None and self._folder.is_dir():
            found |= {file.name.removesuffix(SUFFIX) for file in self._folder.glob(f"*{SUFFIX}")}
        return tuple(sorted(name for name in found if not name.startswith("_")))

    def known(self, trigger: str) -> bool:
        """True if a trigger has a template."""
        return trigger in TRIGGERS or trigger in self.names()

    def render(self, facts: Facts, wrapped: dict[str, str] | None = None) -> Rendered:
        """The reminder's text.

        A delivery is not lost with its template: if that is missing or broken, the package's own `general` replaces it
        and `problem` gives the reason. `wrapped` caches wrapped texts: targets with equal texts share one.
        """
        values = _values(facts)
        try:
            body = self._any.get_template(f"{facts.trigger}{SUFFIX}").render(values)
        except _FAULTS as error:
            body = self._own.get_template(f"{GENERAL}{SUFFIX}").render(values)
            return Rendered(_wrap(body.strip(), facts, wrapped), self._words(facts.trigger, error))
        return Rendered(_wrap(body.strip(), facts, wrapped))

    def _words(self, trigger: str, error: BaseException) -> str:
        if isinstance(error, TemplateNotFound) and error.name == f"{trigger}{SUFFIX}":
            place = f"; put {trigger}{SUFFIX} into {self._folder}" if self._folder is not None else ""
            return f"no template for the trigger {trigger!r}: the package's {GENERAL} was used{place}"
        line = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
        return (
            f"the template {trigger}{SUFFIX}{line} cannot be used: {type(error).__name__}: {error}; "
            f"the package's {GENERAL} was used"
        )


def _wrap(body: str, facts: Facts, wrapped: dict[str, str] | None) -> str:
    if wrapped is None:
        wrapped = {}
    text = wrapped.get(body)
    if text is None:
        text = wrapped[body] = wrap(body, (facts.result, facts.guidance or ""))
    return text


def _environment(loader: BaseLoader) -> Environment:
    return ImmutableSandboxedEnvironment(
        loader=loader,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def _values(facts: Facts) -> dict[str, Any]:
    """The facts for a template, all but the long texts on one line: no name begins a new one."""
    return {
        name: " ".join(value.split()) if isinstance(value, str) and name not in _LONG else value
        for name, value in msgspec.structs.asdict(facts).items()
    }
