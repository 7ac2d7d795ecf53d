"""Extracts the PromQL expressions of ``deploy``'s dashboards and rules. Needs promql-parser.

Dashboards' variables are filled in. Of alerts, the compared expressions are returned without their comparisons, so that
they have a value while the alert does not fire.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml

_COMPARISONS = {"==", "!=", ">", "<", ">=", "<="}
_SETS = {"and", "or", "unless"}


@dataclass(frozen=True, slots=True)
class Expression:
    """A PromQL expression. ``where`` names its dashboard and panel, or its rule."""

    where: str
    text: str


def dashboard_expressions(folder: Path, rate_interval: str) -> Iterator[Expression]:
    """Yields the expressions of the dashboards in ``folder``, with all workers selected."""
    for path in sorted(folder.glob("*.json")):
        for panel in panels(json.loads(path.read_text())):
            for target in panel["targets"]:
                yield Expression(f"{path.name}: {panel['title']}", filled(target["expr"], rate_interval))


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields all panels that show data, including those in folded rows."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panels({"panels": panel.get("panels") or []})
        else:
            yield panel


def filled(expression: str, rate_interval: str) -> str:
    """Fills in the variables of ``expression`` as Grafana does."""
    return expression.replace("$__rate_interval", rate_interval).replace("$worker", ".+")


def rules(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the recording and alert rules in ``folder``."""
    for path in sorted(folder.glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def rule_expressions(folder: Path) -> Iterator[Expression]:
    """Yields the expressions of the rules in ``folder``; for alerts, the compared ones."""
    for rule in rules(folder):
        if "alert" in rule:
            for text in compared(rule["expr"]):
                yield Expression(rule["alert"], text)
        else:
            yield Expression(rule["record"], rule["expr"])


def compared(alert: str) -> Iterator[str]:
    """Yields the left sides of an alert's comparisons: for ``a > 1 and b > 2``, ``a`` and ``b``."""
    yield from _compared(promql_parser.parse(alert))


def _compared(node: Any) -> Iterator[str]:
    if isinstance(node, promql_parser.ParenExpr):
        yield from _compared(node.expr)
    elif isinstance(node, promql_parser.BinaryExpr) and str(node.op) in _SETS:
        yield from _compared(node.lhs)
        yield from _compared(node.rhs)
    elif isinstance(node, promql_parser.BinaryExpr) and str(node.op) in _COMPARISONS:
        yield node.lhs.prettify()
    else:
        yield node.prettify()


def names(expression: str) -> set[str]:
    """Returns the metrics that ``expression`` reads. Raises ValueError when it is not valid PromQL."""
    return set(_names(promql_parser.parse(expression)))


def _names(node: Any) -> Iterator[str]:
    if isinstance(node, promql_parser.VectorSelector):
        yield str(node.name)
        return
    if isinstance(node, promql_parser.MatrixSelector):
        yield str(node.vector_selector.name)
        return
    for part in ("lhs", "rhs", "expr", "param"):
        if (below := getattr(node, part, None)) is not None:
            yield from _names(below)
    for argument in getattr(node, "args", ()):
        yield from _names(argument)
