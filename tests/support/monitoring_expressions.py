"""Reads the PromQL expressions of dashboards and rules: variables filled in, alerts without their comparisons.

Needs promql-parser.
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
    """A PromQL expression.

    Attributes:
        where: Name of the file and panel, or of the rule, for messages.
        text: The expression, without Grafana's variables.
    """

    where: str
    text: str


def dashboard_expressions(folder: Path, rate_interval: str) -> Iterator[Expression]:
    """Yield the expressions of the dashboards in ``folder``, with everything selected."""
    for path in sorted(folder.glob("*.json")):
        for panel in panels(json.loads(path.read_text())):
            for target in panel["targets"]:
                yield Expression(f"{path.name}: {panel['title']}", filled(target["expr"], rate_interval))


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield all panels that show data, including those of collapsed rows."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panels({"panels": panel.get("panels") or []})
        else:
            yield panel


def filled(expression: str, rate_interval: str) -> str:
    """Replace Grafana's variables in ``expression``, so that all workers, tiers and releases are selected."""
    values = {"__rate_interval": rate_interval, "worker": ".+", "tier": ".+", "namespace": ".*", "release": ".*"}
    for name, value in values.items():
        expression = expression.replace(f"${name}", value)
    return expression


def rules(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the recording and alert rules in ``folder``."""
    for path in sorted(folder.glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def rule_expressions(folder: Path) -> Iterator[Expression]:
    """Yield the expressions of the rules in ``folder``; of alerts, the compared sides."""
    for rule in rules(folder):
        if "alert" in rule:
            for text in compared(rule["expr"]):
                yield Expression(rule["alert"], text)
        else:
            yield Expression(rule["record"], rule["expr"])


def compared(alert: str) -> Iterator[str]:
    """Yield the compared sides of an alert: of ``a > 1 and b > 2``, ``a`` and ``b``; of ``absent(a)``, ``a``.

    The alert itself has data only while it fires; these sides must always have some.
    """
    yield from _compared(promql_parser.parse(alert))


def _compared(node: Any) -> Iterator[str]:
    if isinstance(node, promql_parser.ParenExpr):
        yield from _compared(node.expr)
    elif isinstance(node, promql_parser.BinaryExpr) and str(node.op) in _SETS:
        yield from _compared(node.lhs)
        yield from _compared(node.rhs)
    elif isinstance(node, promql_parser.BinaryExpr) and str(node.op) in _COMPARISONS:
        yield node.lhs.prettify()
    elif isinstance(node, promql_parser.Call) and node.func.name == "absent":
        yield from _compared(node.args[0])
    else:
        yield node.prettify()


def names(expression: str) -> set[str]:
    """Return the names of the metrics that ``expression`` reads. Raises ValueError when it is not PromQL."""
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
