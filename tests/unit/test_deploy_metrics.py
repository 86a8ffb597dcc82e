"""The dashboard and the alerts in `deploy/` are valid, and ask for metrics and labels that there are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from ksi.http.metrics import FAMILIES

pytestmark = pytest.mark.promise("V3")

DEPLOY = Path(__file__).parents[2] / "deploy"
BOARD: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
ALERTS: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus-alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
OWN = {"job", "instance"}
"""Labels that Prometheus gives by itself."""


def series() -> dict[str, set[str]]:
    """Every name that a query may use, with its labels."""
    found: dict[str, set[str]] = {}
    for family in FAMILIES.values():
        labels = {*family.labels, *OWN}
        if family.kind in ("histogram", "summary"):
            found[f"{family.name}_sum"] = found[f"{family.name}_count"] = labels
        if family.kind == "histogram":
            found[f"{family.name}_bucket"] = labels | {"le"}
        if family.kind in ("counter", "gauge"):
            found[family.name] = labels
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def queries() -> dict[str, str]:
    """Every PromQL expression, by where it stands."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in ALERTS}
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "5m")
            found[f"panel {panel['title']} {target['refId']}"] = query
    return found


def parts(expression: Any) -> Iterator[Any]:
    """An expression and all that it is made of."""
    yield expression
    match expression:
        case promql.Call():
            inner = list(expression.args)
        case promql.BinaryExpr():
            inner = [expression.lhs, expression.rhs]
        case promql.MatrixSelector():
            inner = [expression.vector_selector]
        case promql.AggregateExpr() | promql.ParenExpr() | promql.UnaryExpr():
            inner = [expression.expr]
        case _:
            inner = []
    for one in inner:
        yield from parts(one)


@pytest.mark.parametrize("place", queries())
def test_a_query_asks_for_metrics_and_labels_that_there_are(place: str) -> None:
    known, used = series(), set[str]()
    there = list(parts(promql.parse(queries()[place])))
    for part in there:
        if isinstance(part, promql.VectorSelector):
            assert part.name in known, part.name
            assert {matcher.name for matcher in part.matchers.matchers} <= known[part.name], part.name
            used |= known[part.name]
    assert used, "it asks for nothing"
    for part in there:
        if isinstance(part, promql.AggregateExpr) and part.modifier is not None:
            assert set(part.modifier.labels) <= used


def test_legends_name_labels_that_their_queries_leave() -> None:
    for panel in panels():
        for target in panel["targets"]:
            names = {part.partition("}}")[0] for part in target["legendFormat"].split("{{")[1:]}
            assert names <= set().union(*series().values()), panel["title"]


def test_the_dashboard_s_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_every_alert_has_its_meaning_and_advice() -> None:
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS) > 10
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_every_metric_has_a_panel_or_an_alert_or_is_for_the_eye() -> None:
    asked = {
        part.name
        for query in queries().values()
        for part in parts(promql.parse(query))
        if isinstance(part, promql.VectorSelector) and part.name
    }
    unseen = {name for name in FAMILIES if not any(one.startswith(name) for one in asked)}
    assert unseen == {
        "ksi_start_time_seconds", "ksi_connections", "ksi_requests_total", "ksi_provider_enabled",
        "ksi_draining", "ksi_conversations", "ksi_lock_lapses_total", "ksi_loop_longest_stall_seconds",
        "ksi_response_files", "ksi_response_files_bytes",
    }  # fmt: skip
