"""`ksi show` and `ksi cancel`: single requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import click

from ksi.cli.completing import complete_request
from ksi.cli.fork_tree import print_forks
from ksi.cli.lists import forks_of
from ksi.cli.render import clock_time, duration, figures, json_line, say, table
from ksi.cli.settings import Settings, json_option, pass_settings
from ksi.cli.status import ask_each, ask_named

Json = Mapping[str, Any]

_LONGEST = 2_000
"""Maximum number of characters shown of a tool's input."""


@click.command(
    epilog="""\b
Examples:
  ksi show req_0197...
  ksi show --json req_0197... | jq .attempts
"""
)
@click.argument("request_id", metavar="REQUEST", shell_complete=complete_request)
@json_option
@pass_settings
def show(settings: Settings, request_id: str, as_json: bool) -> None:
    """Show everything known about a REQUEST: its state, answer or error, usage, attempts, and the tree of forks."""
    data = {"request_id": request_id, "content": True}
    reply = asyncio.run(ask_named(settings, "completion:get", data, "request_id"))
    if as_json:
        json_line(reply)
        return
    attempts = reply.get("attempts", [])
    figures(_facts(reply))
    if attempts:
        say()
        columns = ("attempt", "provider", "model", "outcome", "started", "took", "first text", "in", "out", "error")
        table(columns, map(_attempt_row, attempts), title="attempts")
    if reply.get("session_id") is not None:
        print_forks(asyncio.run(forks_of(settings, reply["session_id"])))
    answer = in_lines(reply.get("blocks")) or reply.get("result", reply.get("text_so_far"))
    said = {**said_in(reply.get("content") or {}), "result" if "result" in reply else "so far": answer}
    if any(text is not None for text in said.values()):
        say()
        figures(said)


def said_in(content: Json) -> dict[str, object]:
    """The request's content by role: the system text, the messages or the prompt."""
    said: dict[str, object] = {"system": in_lines(content.get("system")), "prompt": content.get("prompt")}
    for number, message in enumerate(content.get("messages") or (), 1):
        said[f"{number} {message.get('role')}"] = in_lines(message.get("content"))
    return {who: text for who, text in said.items() if text is not None}


def in_lines(content: object) -> object:
    """Blocks, each on a line of its own; a text unchanged."""
    return "\n".join(map(_line, content)) if isinstance(content, list) else content


def _line(block: object) -> str:
    if not isinstance(block, dict):
        return str(block)
    match block.get("type"):
        case "text":
            return str(block.get("text"))
        case "thinking":
            return f"[thinking] {block.get('thinking')}"
        case "tool_use" | "server_tool_use":
            return f"[calls {block.get('name')}] {_json(block.get('input'))}"
        case "tool_result" | "server_tool_result":
            return f"[{'error' if block.get('is_error') else 'result'}] {in_lines(block.get('content'))}"
        case "image" | "document":
            source = block.get("source") or {}
            where = source.get("url") or source.get("file_id") or f"{len(source.get('data') or '')} characters"
            return f"[{block.get('type')}] {source.get('media_type') or ''} {block.get('title') or where}"
    return f"[{block.get('type')}] {_json(block)}"


def _json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _facts(reply: Json) -> dict[str, object]:
    usage = reply.get("usage")
    error = reply.get("error")
    return {
        "request": reply.get("request_id"),
        "status": f"{reply.get('status')}{', being cancelled' if reply.get('cancelling') else ''}",
        "error": f"{error.get('code')}: {error.get('message')}" if error else None,
        **_question(reply.get("question")),
        "conversation": reply.get("session_id"),
        "provider session": reply.get("provider_session_id"),
        "model": reply.get("model") or reply.get("requested_model"),
        "provider": reply.get("provider"),
        "priority": reply.get("priority"),
        "agent": reply.get("agent_id"),
        "enqueued": clock_time(reply.get("enqueued_at")),
        "due": clock_time(reply.get("due_at")),
        "started": clock_time(reply.get("started_at")),
        "ended": clock_time(reply.get("finished_at")),
        "waited": _milliseconds(reply.get("queued_ms")),
        "took": _milliseconds(reply.get("duration_ms")),
        "position": reply.get("position"),
        "holder": reply.get("holder"),
        "waits for node": reply.get("node"),
        "tokens": _tokens(usage) if usage else None,
        "cost": f"${reply['cost_usd']:.6f}" if reply.get("cost_usd") is not None else None,
        "stopped by": reply.get("stop_reason"),
        "not whole": "cut at a limit of tokens" if reply.get("truncated") else None,
        "note": reply.get("note"),
        "interruptions": reply.get("interruptions") or None,
        "interrupted by": reply.get("interrupted_by"),
        "requeued from": reply.get("requeued_from"),
        "metadata": reply.get("metadata"),
    }


def _question(question: Json | None) -> dict[str, object]:
    if question is None:
        return {}
    said = question.get("answer")
    by, why = question.get("by"), question.get("why")
    return {
        "question": f"{question['kind']}: {question['text']}",
        "answer": said and f"{said}{f', by {by}' if by else ''}{f': {why}' if why else ''}",
    }


def _tokens(usage: Json) -> str:
    words = [f"{usage.get('input_tokens', 0):,} in", f"{usage.get('output_tokens', 0):,} out"]
    for name, label in (
        ("cache_read_tokens", "read from cache"),
        ("cache_write_tokens", "written to cache"),
        ("reasoning_tokens", "reasoning"),
    ):
        if usage.get(name):
            words.append(f"{usage[name]:,} {label}")
    if usage.get("unknown_attempts"):
        words.append(f"unknown for {usage['unknown_attempts']} attempts")
    return ", ".join(words)


def _attempt_row(item: Json) -> tuple[object, ...]:
    usage = item.get("usage", "unknown")
    known = isinstance(usage, Mapping)
    return (
        item.get("attempt"),
        item.get("provider"),
        item.get("model"),
        item.get("outcome"),
        clock_time(item.get("started_at")),
        _milliseconds(item.get("duration_ms")),
        _milliseconds(item.get("time_to_first_token_ms")),
        usage.get("input_tokens", 0) if known else usage,
        usage.get("output_tokens", 0) if known else usage,
        ": ".join(str(word) for word in (item.get("error"), item.get("message")) if word) or None,
    )


def _milliseconds(value: float | None) -> str | None:
    return duration(value / 1000) if value is not None else None


@click.command(
    epilog="""\b
Examples:
  ksi cancel req_0197...
  ksi queue --list waiting --all --json | jq -r .request_id | xargs ksi cancel
"""
)
@click.argument("request_ids", metavar="REQUEST...", nargs=-1, required=True, shell_complete=complete_request)
@json_option
@pass_settings
@click.pass_context
def cancel(ctx: click.Context, settings: Settings, request_ids: tuple[str, ...], as_json: bool) -> None:
    """Cancel each REQUEST that has not ended, and stop its provider's work.

    A request that has already ended is reported with its state, which is no error. An unknown request is an error: the
    others are cancelled all the same, and the exit code is 4.
    """

    def show(request_id: str, reply: Json) -> None:
        if as_json:
            json_line(reply)
        elif reply.get("status") == "already_final":
            figures({request_id: f"had ended {reply.get('state')}"})
        else:
            figures({request_id: reply.get("status")})

    ctx.exit(asyncio.run(ask_each(settings, "completion:cancel", request_ids, show, as_json=as_json)))
