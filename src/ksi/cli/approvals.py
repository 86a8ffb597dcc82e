"""`ksi approvals`, `ksi approve`, `ksi reject` and `ksi release`: requests that wait for a person, and the person's
answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import click

from ksi.cli.completing import complete_asking
from ksi.cli.render import clock_time, figures, json_line, say, table
from ksi.cli.settings import Settings, json_option, own_name, pass_settings
from ksi.cli.status import ask_each, ask_named, ask_one

Json = Mapping[str, Any]

COLUMNS = ("request", "asks for", "agent", "question", "until")


@click.command(
    epilog="""\b
Examples:
  ksi approvals
  ksi approvals req_0197...
  ksi approve req_0197...
  ksi reject req_0197... --why "not on a Friday"
"""
)
@click.argument("request_id", metavar="[REQUEST]", required=False, shell_complete=complete_asking)
@click.option("--kind", type=click.Choice(("hold", "approval", "permission")), help="Only questions of this kind.")
@json_option
@pass_settings
def approvals(settings: Settings, request_id: str | None, kind: str | None, as_json: bool) -> None:
    """Show the requests that wait for a person's answer; for one REQUEST all facts for the decision.

    \b
    hold        held back by its sender: `ksi release`
    approval    its chain has come to a depth, a cost or a risk: `ksi approve` or `ksi reject`
    permission  it runs, and asks whether it may use a tool: `ksi approve` or `ksi reject`
    """
    found = asyncio.run(_all(settings, request_id, kind))
    if as_json:
        for one in found:
            json_line(one)
        return
    if not found:
        say("nothing waits for an answer")
    elif request_id is not None:
        figures(_facts(found[0]))
    else:
        table(COLUMNS, map(_row, found))


async def _all(settings: Settings, request_id: str | None, kind: str | None) -> list[Json]:
    wishes = {"request_id": request_id, "kind": kind}
    data = {name: value for name, value in wishes.items() if value is not None}
    if request_id is not None:
        return list((await ask_named(settings, "completion:approvals", data, "request_id"))["approvals"])
    found: list[Json] = []
    while True:
        reply = await ask_one(settings, "completion:approvals", data)
        found += reply["approvals"]
        if "cursor" not in reply:
            return found
        data["cursor"] = reply["cursor"]


def _row(one: Json) -> tuple[object, ...]:
    question = one["question"]
    asked = question["text"] if question.get("tool") is None else f"{question['tool']} {question.get('input')}"
    return one["request_id"], question["kind"], one.get("agent_id"), asked, clock_time(question.get("expires_at"))


def _facts(one: Json) -> dict[str, object]:
    question = one["question"]
    return {
        "request": one["request_id"],
        "status": one["status"],
        "asks for": question["kind"],
        "question": question["text"],
        "tool": question.get("tool"),
        "input": _indented(question.get("input")),
        "asked": clock_time(question["asked_at"]),
        "no, from": clock_time(question.get("expires_at")),
        "agent": one.get("agent_id"),
        "conversation": one["session_id"],
        "model": one.get("model"),
        "chain": one.get("chain_id"),
        "parent": one.get("parent_request_id"),
        "depth": one.get("ideation_depth"),
        "prompt": one.get("prompt"),
    }


def _indented(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except ValueError:
        return text


def _answering(event: str, name: str, doc: str, example: str) -> click.Command:
    """A command that gives one answer to each of some requests."""

    @click.command(name, help=doc, epilog=f"\b\nExamples:\n  {example}\n")
    @click.argument("request_ids", metavar="REQUEST...", nargs=-1, required=True, shell_complete=complete_asking)
    @click.option("--why", default="", help="The reason; a rejection is passed on to the agent.")
    @json_option
    @pass_settings
    @click.pass_context
    def command(ctx: click.Context, settings: Settings, request_ids: tuple[str, ...], why: str, as_json: bool) -> None:
        said = {"by": own_name(), "why": why}
        show = _printer(as_json=as_json)
        ctx.exit(asyncio.run(ask_each(settings, event, request_ids, show, as_json=as_json, more=said)))

    return command


def _printer(*, as_json: bool) -> Callable[[str, Json], None]:
    def show(request_id: str, reply: Json) -> None:
        if as_json:
            json_line(reply)
        else:
            figures({request_id: f"{reply['question'].get('answer')}; it is {reply['status']}"})

    return show


release = _answering(
    "completion:release",
    "release",
    "Let each held REQUEST come into the line.",
    "ksi release req_0197...",
)
approve = _answering(
    "completion:approve",
    "approve",
    "Approve each waiting REQUEST. The same answer twice is one; another one is refused.",
    "ksi approve req_0197...",
)
reject = _answering(
    "completion:reject",
    "reject",
    "Reject each waiting REQUEST. A request that has not run ends as cancelled; one that asks for a permission "
    "continues without it.",
    'ksi reject req_0197... --why "not on a Friday"',
)
