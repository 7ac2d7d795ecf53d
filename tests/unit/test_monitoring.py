"""Dashboards and rules use every exported metric and no other, and every alert has a runbook.

``tests/integration/test_telemetry.py`` checks that their queries return data.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import promql_parser
import pytest
from monitoring_expressions import dashboard_expressions, names, panels, rule_expressions, rules

from overfill.telemetry.metrics import declared

ROOT = Path(__file__).parents[2]
DASHBOARDS, RULES = (ROOT / "deploy/helm/overfill/files" / folder for folder in ("dashboards", "rules"))
STANDARD = {
    "up", "ALERTS", "process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds",
}  # fmt: skip


def expressions():
    return [*dashboard_expressions(DASHBOARDS, "1m"), *rule_expressions(RULES)]


def test_dashboards_are_up_to_date():
    command = [sys.executable, ROOT / "deploy/grafana/generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_queries_read_exported_or_recorded_metrics_only():
    exported = set(STANDARD)
    for spec in declared():
        exported |= (
            {f"{spec.name}_{part}" for part in ("bucket", "sum", "count")} if spec.kind == "histogram" else {spec.name}
        )
    recorded = {rule["record"] for rule in rules(RULES) if "record" in rule}
    unknown = {(each.where, name) for each in expressions() for name in names(each.text) - exported - recorded}
    assert not unknown


def test_every_metric_is_on_a_dashboard():
    shown = {re.sub(r"_(bucket|sum|count)$", "", n) for e in expressions() for n in names(e.text)}
    missing = {re.sub(r"_(bucket|sum|count)$", "", spec.name) for spec in declared()} - shown
    assert not missing


RELEASE = ("namespace", "app_kubernetes_io_instance")
"""Labels of a Helm release's series. Without Kubernetes no series has them."""


def nodes(node):
    yield node
    for part in ("lhs", "rhs", "expr", "param", "vector_selector"):
        if (below := getattr(node, part, None)) is not None:
            yield from nodes(below)
    for argument in getattr(node, "args", ()):
        yield from nodes(argument)


def test_rules_keep_releases_apart():
    merged = []
    for rule in rules(RULES):
        for node in nodes(promql_parser.parse(rule["expr"])):
            if isinstance(node, promql_parser.AggregateExpr):
                kept = node.modifier.labels if node.modifier else ()
                if not set(RELEASE) <= set(kept):
                    merged.append((rule.get("alert") or rule["record"], str(node)))
    assert merged == []


def test_worker_counts_of_two_revisions_are_added():
    merged = [
        (one.where, str(node))
        for one in expressions()
        for node in nodes(promql_parser.parse(one.text))
        if isinstance(node, promql_parser.AggregateExpr)
        and getattr(node.expr, "name", "") == "overfill_router_workers"
        and "revision" not in node.modifier.labels
    ]
    assert merged == []


def test_every_query_of_a_dashboard_selects_the_release():
    wanted = {("namespace", "$namespace"), ("app_kubernetes_io_instance", "$release")}
    without = [
        (path.name, panel["title"], str(node))
        for path in DASHBOARDS.glob("*.json")
        for panel in panels(json.loads(path.read_text()))
        for target in panel["targets"]
        for node in nodes(promql_parser.parse(target["expr"].replace("$__rate_interval", "1m")))
        if isinstance(node, promql_parser.VectorSelector)
        and node.name != "overfill:slo_budget:ratio"  # the objectives hold for all releases
        and not wanted <= {(one.name, one.value) for one in node.matchers.matchers}
    ]
    assert without == []


def test_dashboards_have_a_variable_for_each_label_that_they_select_by():
    for path in DASHBOARDS.glob("*.json"):
        variables = {one["name"] for one in json.loads(path.read_text())["templating"]["list"]}
        assert set(re.findall(r"=~\\?\"\$(\w+)", path.read_text())) == variables - {"datasource"}


def test_every_recorded_rule_is_used():
    read = {name for each in expressions() for name in names(each.text)}
    assert {rule["record"] for rule in rules(RULES) if "record" in rule} <= read


def test_every_alert_has_a_runbook_and_a_test():
    page = (ROOT / "docs/reference/alerts.md").read_text()
    headings = re.findall(r"^## (Overfill\w+)$", page, re.MULTILINE)
    alerts = [rule for rule in rules(RULES) if "alert" in rule]
    assert sorted(headings) == sorted(rule["alert"] for rule in alerts)
    tests = (ROOT / "deploy/prometheus/tests/alerts_test.yml").read_text()
    for rule in alerts:
        assert rule["annotations"]["runbook"] == f"docs/reference/alerts.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert f'alertname="{rule["alert"]}"' in tests


def test_panels_have_a_place_a_unit_and_a_source():
    for path in DASHBOARDS.glob("*.json"):
        board = json.loads(path.read_text())
        found = list(panels(board))
        assert len({panel["id"] for panel in found}) == len(found)
        assert len({panel["title"] for panel in found}) == len(found), "a runbook names a panel by its title"
        for panel in found:
            assert panel["datasource"]["uid"] == "$datasource"
            assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
            assert panel["targets"]


def test_runbooks_name_existing_panels():
    page = (ROOT / "docs/reference/alerts.md").read_text()
    titles = {
        (json.loads(path.read_text())["title"].removeprefix("Overfill / "), panel["title"])
        for path in DASHBOARDS.glob("*.json")
        for panel in panels(json.loads(path.read_text()))
    }
    named = re.findall(r"\*([A-Z][\w ]+) › ([^*]+)\*", page)
    assert len(named) >= 20
    assert [pair for pair in named if pair not in titles] == []


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_alerts_fire_and_stay_quiet_as_they_should():
    for command in (
        ["check", "rules", *RULES.glob("*.yml")],
        ["test", "rules", *ROOT.glob("deploy/prometheus/tests/*.yml")],
    ):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
