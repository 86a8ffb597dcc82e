"""The place of a span in a trace: W3C's `traceparent`, and ids that follow from the names of requests."""

from __future__ import annotations

import re
from hashlib import blake2b

import msgspec

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceContext(msgspec.Struct, frozen=True):
    """A span of a trace, as it is handed on."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 of them."""
    sampled: bool = True

    @property
    def header(self) -> str:
        """It as the value of `traceparent`."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


def parse(traceparent: str | None) -> TraceContext | None:
    """The parsed `traceparent`; None if it is invalid, which its standard says to ignore."""
    found = _FORM.fullmatch((traceparent or "").strip())
    if found is None:
        return None
    version, trace, span, flags, more = found.groups()
    known = version == "00" and more is None
    if version == "ff" or not (known or version != "00") or not int(trace, 16) or not int(span, 16):
        return None
    return TraceContext(trace, span, sampled=bool(int(flags, 16) & 1))


def trace_id(name: str) -> str:
    """The trace of a chain, or of a request outside chains, if its client named no trace."""
    return _id(f"trace {name}", 16)


def request_span(request_id: str) -> str:
    """The span of a request, from its arrival to its end."""
    return _id(f"request {request_id}", 8)


def attempt_span(request_id: str, number: int) -> str:
    """The span of one of its attempts."""
    return _id(f"attempt {number} {request_id}", 8)


def other_span(what: str, name: str) -> str:
    """A span of another kind."""
    return _id(f"{what} {name}", 8)


def _id(text: str, size: int) -> str:
    """The same text has the same id, at every daemon and after every restart."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size, person=b"ksi").hexdigest()
