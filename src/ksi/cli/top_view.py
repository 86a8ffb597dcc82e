"""The view of `ksi top` and its answers to keys: values in, lines and actions out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from rich.cells import cell_len, set_cell_size

from ksi.cli.progress import bar
from ksi.cli.render import Painter, clock_time, duration
from ksi.host.printable import visible

Json = Mapping[str, Any]

LISTS = ("active", "waiting", "delayed", "asking", "failed", "finished")
LIST_WORDS = {
    "active": "running",
    "waiting": "waiting",
    "delayed": "delayed",
    "asking": "asking",
    "failed": "failed",
    "finished": "ended",
}
SORTS = ("age", "priority", "model", "agent")
PRIORITIES = ("critical", "high", "normal", "low", "background")
MOST_PROVIDERS = 6
MOST_PROBLEMS = 2
COLUMNS = (9, 4, 6)
"""Cells of the columns between the id and the model: state, priority and time."""
LEAST_AGENT = 10
"""Minimum width of the agent's column, if there is room for more than the model's half."""
LIVE_LINES = 3
"""Lines of a running answer's end, if there is room for them."""

BOLD, DIM, REVERSE, RED, YELLOW = "1", "2", "7", "31", "33"

HELP = (
    "1 to 6, Tab     which requests are shown",
    "arrows, j, k    choose one",
    "/               show only those with a text in id, session, agent or model",
    "s, S            sort by age, priority, model or agent; the other way round",
    "c               cancel the chosen one",
    "a               ask again for the chosen one, where it failed",
    "y, n            say yes or no to what the chosen one asks",
    "p, r            pause, resume: everything, or what the chosen one belongs to",
    "Escape          back, and no filter",
    "q               leave",
)

THINGS = {"e": "everything", "a": "its agent", "s": "its session", "m": "its provider"}
"""The scopes that can be paused, by key."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon's last data."""

    status: Json = {}
    rows: tuple[Json, ...] = ()
    more: bool = False
    providers: Mapping[str, Json] = {}
    problems: tuple[str, ...] = ()
    cost: float | None = None
    """US dollars of the last 24 hours."""
    text: str = ""
    """Of the chosen one: its answer so far, the reason of its wait, or its end."""
    at: float = 0.0
    """Unix time."""
    lost: str | None = None
    """The reason for missing data."""


class View(msgspec.Struct, frozen=True, kw_only=True):
    """The person's choices."""

    listing: str = "active"
    sort: str = "age"
    turned: bool = False
    filter: str = ""
    chosen: str | None = None
    mode: Literal["list", "filter", "confirm", "pause", "resume", "help"] = "list"
    word: str = ""
    """A remark on the last action."""


class Act(NamedTuple):
    """An event to send, and the remark when it is done."""

    event: str
    data: Json
    done: str


QUIT = Act("", {}, "")

Span = tuple[str, str]
"""A text and its style."""


# -- keys ---------------------------------------------------------------------------------------------------------


def shown_rows(view: View, seen: Seen) -> list[Json]:
    """The rows of the list that fit the filter, in the chosen order."""
    wanted = view.filter.lower()
    rows = [
        row
        for row in seen.rows
        if not wanted
        or any(wanted in str(row.get(name) or "").lower() for name in ("request_id", "session_id", "agent_id", "model"))
    ]
    return sorted(rows, key=lambda row: _order(row, view.sort), reverse=view.turned)


def _order(row: Json, sort: str) -> tuple[Any, ...]:
    began = row.get("finished_at") or row.get("started_at") or row.get("enqueued_at") or 0.0
    match sort:
        case "priority":
            return (PRIORITIES.index(row.get("priority") or "normal"), began)
        case "model":
            return (row.get("model") or "", began)
        case "agent":
            return (row.get("agent_id") or "", began)
    return (-began if row.get("finished_at") else began,)


def pressed(view: View, seen: Seen, key: str) -> tuple[View, Act | None]:
    """The view after a key, and the action."""
    if key == "ctrl-c":
        return view, QUIT
    match view.mode:
        case "filter":
            return _filtering(view, key), None
        case "confirm":
            return _confirmed(view, key)
        case "pause" | "resume":
            return _pausing(view, seen, key)
        case "help":
            return msgspec.structs.replace(view, mode="list"), None
    return _listed(view, seen, key)


def _filtering(view: View, key: str) -> View:
    text = view.filter
    if key == "enter":
        return msgspec.structs.replace(view, mode="list")
    if key == "escape":
        return msgspec.structs.replace(view, mode="list", filter="")
    if key == "backspace":
        text = text[:-1]
    elif len(key) == 1:
        text += key
    return msgspec.structs.replace(view, filter=text, chosen=None)


def _confirmed(view: View, key: str) -> tuple[View, Act | None]:
    back = msgspec.structs.replace(view, mode="list", word="nothing was cancelled")
    if key != "y" or view.chosen is None:
        return back, None
    return back, Act("completion:cancel", {"request_id": view.chosen}, f"cancelled {view.chosen}")


def _pausing(view: View, seen: Seen, key: str) -> tuple[View, Act | None]:
    verb = view.mode
    back = msgspec.structs.replace(view, mode="list", word="")
    row = chosen_row(view, seen) or {}
    fields = {"a": ("agent_id", row.get("agent_id")), "s": ("session_id", row.get("session_id"))}
    fields["m"] = ("provider", row.get("provider") or str(row.get("model") or "").partition("/")[0] or None)
    if key == "e":
        data: dict[str, Any] = {}
    elif key in fields and fields[key][1]:
        data = {fields[key][0]: fields[key][1]}
    else:
        return msgspec.structs.replace(back, word=f"nothing was {verb}d"), None
    what = next(iter(data.values()), "everything")
    if verb == "pause":
        data["why"] = "by hand, in ksi top"
    return back, Act(f"queue:{verb}", data, f"{verb}d {what}")


def _listed(view: View, seen: Seen, key: str) -> tuple[View, Act | None]:
    change = msgspec.structs.replace
    rows = shown_rows(view, seen)
    if key in tuple(map(str, range(1, len(LISTS) + 1))):
        return change(view, listing=LISTS[int(key) - 1], chosen=None, word=""), None
    match key:
        case "q":
            return view, QUIT
        case "tab":
            following = LISTS[(LISTS.index(view.listing) + 1) % len(LISTS)]
            return change(view, listing=following, chosen=None, word=""), None
        case "up" | "k" | "down" | "j" | "home" | "end":
            return change(view, chosen=_moved(view, rows, key), word=""), None
        case "/":
            return change(view, mode="filter", filter="", word=""), None
        case "escape":
            return change(view, filter="", word=""), None
        case "s":
            return change(view, sort=SORTS[(SORTS.index(view.sort) + 1) % len(SORTS)]), None
        case "S":
            return change(view, turned=not view.turned), None
        case "?" | "h":
            return change(view, mode="help"), None
        case "p":
            return change(view, mode="pause"), None
        case "r":
            return change(view, mode="resume"), None
        case "c" | "a" | "y" | "n":
            return _about_chosen(view, seen, key)
    return view, None


def _about_chosen(view: View, seen: Seen, key: str) -> tuple[View, Act | None]:
    change = msgspec.structs.replace
    row = chosen_row(view, seen)
    if row is None:
        return change(view, word="choose a request first: arrows, or j and k"), None
    if key == "c":
        if view.listing in ("failed", "finished"):
            return change(view, word="it has ended"), None
        return change(view, mode="confirm", chosen=row["request_id"]), None
    if key in ("y", "n"):
        if view.listing != "asking":
            return change(view, word="it asks nothing; asking requests are in list 4"), None
        event, done = ("completion:approve", "said yes to") if key == "y" else ("completion:reject", "said no to")
        return view, Act(event, {"request_id": row["request_id"]}, f"{done} {row['request_id']}")
    if view.listing != "failed":
        return change(view, word="only failed requests are asked again"), None
    return view, Act("completion:requeue", {"request_id": row["request_id"]}, f"asked again for {row['request_id']}")


def _moved(view: View, rows: Sequence[Json], key: str) -> str | None:
    ids = [str(row["request_id"]) for row in rows]
    if not ids:
        return None
    if view.chosen not in ids:
        return ids[-1] if key in ("up", "k", "end") else ids[0]
    at = ids.index(view.chosen)
    steps = {"up": at - 1, "k": at - 1, "down": at + 1, "j": at + 1, "home": 0, "end": len(ids) - 1}
    return ids[min(max(steps[key], 0), len(ids) - 1)]


def chosen_row(view: View, seen: Seen) -> Json | None:
    """The row that is chosen, if it is still shown."""
    return next((row for row in shown_rows(view, seen) if row["request_id"] == view.chosen), None)


# -- lines --------------------------------------------------------------------------------------------------------


def lines(view: View, seen: Seen, width: int, height: int) -> list[list[Span]]:
    """The screen's lines, each at most `width` cells, and at most `height` of them."""
    head = [*_head(seen), *_problems(seen), [], *_providers(seen, width), [], _tabs(view, seen)]
    foot = _foot(view, seen, width)
    if view.mode == "help":
        body: list[list[Span]] = [[(f"  {line}", "")] for line in HELP]
    else:
        room = max(height - len(head) - len(foot), 1)
        body = _rows(view, seen, width, room)
    space = max(height - len(head) - len(body) - len(foot), 0)
    made = [*head, *body, *([] for _ in range(space)), *foot]
    return [_cut(line, width) for line in made[:height]]


def _head(seen: Seen) -> Iterator[list[Span]]:
    status = seen.status
    up = duration(status.get("uptime_seconds"))
    yield [
        (f"KSI {status.get('version', '')}", BOLD),
        (f"  up {up}" if up else "", ""),
        (f"  {clock_time(seen.at, seen.at)}", DIM),
        *([] if seen.lost is None else [(f"  {seen.lost}", RED)]),
    ]
    counts = [("running", status.get("active", 0))]
    counts += [(name, status.get(name, 0)) for name in ("queued", "retrying", "parked", "scheduled")]
    spans: list[Span] = []
    for name, count in counts:
        spans += [(f"{name} ", DIM), (f"{count}  ", BOLD if count else "")]
    spans += [("failed ", DIM), (f"{status.get('failed', 0)}  ", "")]
    if seen.cost is not None:
        spans += [(f"${seen.cost:.2f}", BOLD), (" in 24 h", DIM)]
    yield spans


def _problems(seen: Seen) -> Iterator[list[Span]]:
    for problem in seen.problems[:MOST_PROBLEMS]:
        yield [(f"! {problem}", YELLOW)]
    if len(seen.problems) > MOST_PROBLEMS:
        yield [(f"! {len(seen.problems) - MOST_PROBLEMS} more: ksi health", YELLOW)]


def _providers(seen: Seen, width: int) -> Iterator[list[Span]]:
    shown = sorted(seen.providers.items(), key=lambda item: (-item[1].get("running", 0), item[0]))[:MOST_PROVIDERS]
    size = min(max((cell_len(visible(name)) for name, _ in shown), default=0), 18)
    for name, report in shown:
        state, style = _provider_state(report)
        slots = report.get("max_concurrency") or 1
        running = report.get("running", 0)
        latency = (report.get("latency_ms") or {}).get("p50")
        words = [
            (f"{_fitted(name, size)} ", BOLD),
            (f"{bar(running / slots, 8)} {running:>3}/{slots:<4}", ""),
            (f"{report.get('calls', 0):>6} calls ", DIM),
            (f"{report.get('failures', 0):>4} failed ", DIM),
            (f"{'' if latency is None else duration(latency / 1000):>9}  ", ""),
            (state, style),
        ]
        yield words
    if len(seen.providers) > MOST_PROVIDERS:
        yield [(f"{len(seen.providers) - MOST_PROVIDERS} more: ksi providers", DIM)]


def _provider_state(report: Json) -> Span:
    for limit in report.get("limits") or ():
        until = limit.get("until")
        return f"{limit['cause']}{'' if until is None else f' until {clock_time(until)}'}", RED
    if not report.get("enabled", True):
        return "disabled", YELLOW
    if report.get("paused"):
        return "paused", YELLOW
    if report.get("breaker", "closed") != "closed":
        return f"breaker {report['breaker']}", RED
    return ("has a problem", RED) if report.get("problem") else ("well", "32")


def _tabs(view: View, seen: Seen) -> list[Span]:
    spans: list[Span] = []
    for number, name in enumerate(LISTS, 1):
        spans += [(f"{number} {LIST_WORDS[name]}", REVERSE if name == view.listing else DIM), (" ", "")]
    spans.append((f"by {view.sort}{' turned' if view.turned else ''}", DIM))
    if view.filter or view.mode == "filter":
        spans.append((f"  with {view.filter!r}", YELLOW))
    if seen.more:
        spans.append(("  the first 200", DIM))
    return spans


def _rows(view: View, seen: Seen, width: int, room: int) -> list[list[Span]]:
    rows = shown_rows(view, seen)
    if not rows:
        nothing = "no request has it" if view.filter else f"nothing is {LIST_WORDS[view.listing]}"
        return [[(f"  {nothing}", DIM)]]
    live = _live(view, seen, width) if room > 4 * LIVE_LINES else []
    room = max(room - len(live) - 1, 1)
    at = next((n for n, row in enumerate(rows) if row["request_id"] == view.chosen), 0)
    first = min(max(at - room + 1, 0), max(len(rows) - room, 0))
    size = min(max([cell_len(visible(str(row["request_id"]))) for row in rows[first : first + room]] + [7]), 44)
    made: list[list[Span]] = [[(_line(("request", "state", "prio", "for", "model", "agent"), size, width), DIM)]]
    for row in rows[first : first + room]:
        cells = (
            row["request_id"],
            row.get("error") or row.get("status"),
            (row.get("priority") or "")[:4],
            _short(_since(row, seen.at)),
            row.get("model"),
            row.get("agent_id"),
        )
        words = _line(cells, size, width)
        style = REVERSE if row["request_id"] == view.chosen else Painter.COLOURS.get(str(row.get("status")), "")
        made.append([(words, style)])
    return [*made, *live]


def _since(row: Json, now: float) -> float:
    """How long it has run, waited, or been over; until it is due, if it is not."""
    began = row.get("finished_at") or row.get("started_at") or row.get("enqueued_at") or now
    if row.get("due_at") and row.get("status") in ("scheduled", "retrying", "parked"):
        return max(float(row["due_at"]) - now, 0.0)
    return max(now - float(began), 0.0)


def _line(words: Sequence[object], size: int, width: int) -> str:
    """A row: the id in full, and the model and the agent in the rest of the width."""
    rest = max(width - size - sum(COLUMNS) - len(COLUMNS) - 2, 2)
    model = max(rest // 2, rest - 24) if rest >= 2 * LEAST_AGENT else max(rest - LEAST_AGENT, 1)
    sizes = (size, *COLUMNS, model)
    return " ".join([*(_fitted(word, of) for word, of in zip(words, sizes, strict=False)), str(words[-1] or "")])


def _short(seconds: float) -> str:
    """A length of time in its largest unit, in few cells."""
    for unit, length, most in (("s", 1, 100), ("min", 60, 100), ("h", 3_600, 100)):
        if seconds < most * length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds // 86_400)} d"


def _fitted(word: object, size: int) -> str:
    text = visible("" if word is None else str(word))
    if cell_len(text) > size:
        return set_cell_size(text, size - 1) + "…"
    return text + " " * (size - cell_len(text))


def _live(view: View, seen: Seen, width: int) -> list[list[Span]]:
    """The end of the chosen request's answer so far, or the reason of its wait."""
    if not seen.text or view.chosen is None:
        return []
    text = " ".join(visible(seen.text, keep="\n").split())
    pieces: list[str] = []
    while text and len(pieces) < LIVE_LINES:
        pieces.append(text[-(width - 4) :])
        text = text[: -(width - 4)]
    return [[], *([("  " + piece, "")] for piece in reversed(pieces))]


def _foot(view: View, seen: Seen, width: int) -> list[list[Span]]:
    match view.mode:
        case "filter":
            return [[("show only: ", BOLD), (view.filter, ""), ("▏", "")]]
        case "confirm":
            return [[(f"cancel {view.chosen}? y or n", RED)]]
        case "pause" | "resume":
            row = chosen_row(view, seen)
            keys = [(key, what) for key, what in THINGS.items() if key == "e" or row is not None]
            return [[(f"{view.mode} ", BOLD), *((f" {key} {what} ", "") for key, what in keys)]]
        case "help":
            return [[("any key goes back", DIM)]]
    if view.word:
        return [[(view.word, BOLD)]]
    return [[("q leave  ? keys  / filter  s sort  c cancel  p pause  r resume", DIM)]]


def _cut(line: Iterable[Span], width: int) -> list[Span]:
    """A line without control characters, in at most `width` cells."""
    made: list[Span] = []
    left = width
    for words, style in line:
        text = visible(words)
        size = cell_len(text)
        if size > left:
            text = set_cell_size(text, max(left - 1, 0)) + ("…" if left else "")
        if text:
            made.append((text, style))
        left = max(left - size, 0)
        if not left:
            break
    return made
