"""Building blocks of the dashboards: a few kinds of panels with one look, and the choice of a release."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

from grafana_foundation_sdk.builders import bargauge, common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.models import common as look
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heatmap_model
from grafana_foundation_sdk.models import prometheus as query_model

Panel = timeseries.Panel | stat.Panel | heatmap.Panel | bargauge.Panel
Queries = Mapping[str, str]
"""Legend -> PromQL expression. Grafana replaces ``{{label}}`` in a legend by the label's value."""

SOURCE = model.DataSourceRef(type_val="prometheus", uid="$datasource")
WIDTH = 24  # columns of a dashboard

RELEASE = 'namespace=~"$namespace", app_kubernetes_io_instance=~"$release"'
"""Matchers of the Helm releases that are chosen on the dashboard; they match series without these labels if all are."""

_SELECTOR = re.compile(r"\b(?!overfill:slo_budget:)(overfill[_:][\w:]+|process_\w+|up|ALERTS)\b({)?")
"""Start of a selector, by the name of its metric. The objectives of overfill:slo_budget:ratio hold for all releases."""

SECONDS, BYTES, BYTES_PER_SECOND, SHARE, COUNT, PER_SECOND = "s", "bytes", "Bps", "percentunit", "short", "suffix:/s"

_PALETTES = {
    "{{part}}": {
        "router_queue": "#8AB8FF", "decode_reservation": "#CA95E5", "prefill_queue": "#FFB357",
        "prefill_compute": "#F2495C", "handoff": "#37872D", "first_step": "#FADE2A", "return_path": "#73BF69",
        "unattributed": "#808080",
    },
    "{{stage}}": {"prefill": "#F2495C", "decode": "#5794F2", "router": "#FF9830"},
    "used": {"used": "#F2495C", "cached": "#FADE2A", "free": "#73BF69"},
}  # fmt: skip
"""Legend -> colours by name, so that a part or stage has the same colour on all dashboards."""


def lines(
    title: str,
    queries: Queries,
    unit: str = COUNT,
    *,
    what: str = "",
    stacked: bool = False,
    shares: bool = False,
    span: int = 8,
    height: int = 8,
    limit: float | None = None,
) -> timeseries.Panel:
    """Return a panel with lines over time.

    Args:
        what: Description: meaning of the values, and how to read them.
        stacked: Stack the areas; the values must be parts of a whole.
        shares: Stack the areas as shares of the whole.
        span: Width in columns, of 24.
        height: Height in grid rows.
        limit: Threshold to draw; values above it are bad.
    """
    panel = timeseries.Panel().title(title).description(what).datasource(SOURCE).unit(unit).span(span).height(height)
    panel = (
        panel.min(0).line_width(1).show_points(look.VisibilityMode.NEVER).fill_opacity(70 if stacked or shares else 8)
    )
    legend = common.VizLegendOptions().display_mode(look.LegendDisplayMode.LIST)
    panel = panel.legend(legend.placement(look.LegendPlacement.BOTTOM).show_legend(True).calcs([]))
    panel = panel.tooltip(
        common.VizTooltipOptions().mode(look.TooltipDisplayMode.MULTI).sort(look.SortOrder.DESCENDING)
    )
    if stacked or shares:
        mode = look.StackingMode.PERCENT if shares else look.StackingMode.NORMAL
        panel = panel.stacking(common.StackingConfig().mode(mode).group("A"))
    if limit is not None:
        panel = panel.thresholds(_thresholds(limit))
        panel = panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(look.GraphTresholdsStyleMode.DASHED))
    colours = {name: colour for legend in queries for name, colour in _PALETTES.get(legend, {}).items()}
    for name, colour in colours.items():
        fixed = model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour})
        panel = panel.override_by_name(name, [fixed])
    return _ask(panel, queries)


def number(title: str, query: str, unit: str = COUNT, *, what: str = "", limit: float | None = None, span: int = 3):
    """Return a panel with the latest value in large digits over its graph; red above ``limit``."""
    panel = stat.Panel().title(title).description(what).datasource(SOURCE).unit(unit).span(span).height(4)
    panel = panel.graph_mode(look.BigValueGraphMode.AREA).color_mode(look.BigValueColorMode.VALUE)
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    if limit is not None:
        panel = panel.thresholds(_thresholds(limit))
    return _ask(panel, {"": query})


def cells(title: str, buckets: str, *, what: str = "", span: int = 12, height: int = 8) -> heatmap.Panel:
    """Return a heatmap of a histogram over time. ``buckets`` is an expression by ``le``, in seconds."""
    panel = heatmap.Panel().title(title).description(what).datasource(SOURCE).span(span).height(height)
    axis = heatmap.YAxisConfig().unit(SECONDS).axis_placement(look.AxisPlacement.LEFT)
    colours = heatmap.HeatmapColorOptions().mode(heatmap_model.HeatmapColorMode.SCHEME).scheme("Spectral").steps(64)
    panel = (
        panel.calculate(False)
        .y_axis(axis)
        .color(colours.reverse(True).scale(heatmap_model.HeatmapColorScale.EXPONENTIAL))
    )
    query = prometheus.Dataquery().expr(of_release(buckets)).legend_format("{{le}}").range()
    return panel.with_target(query.format(query_model.PromQueryFormat.HEATMAP).ref_id("A"))


def bars(
    title: str, queries: Queries, unit: str = COUNT, *, what: str = "", span: int = 8, height: int = 8
) -> bargauge.Panel:
    """Return a panel with the latest value of each series as a bar."""
    panel = (
        bargauge.Panel().title(title).description(what).datasource(SOURCE).unit(unit).span(span).height(height).min(0)
    )
    panel = panel.orientation(look.VizOrientation.HORIZONTAL).display_mode(look.BarGaugeDisplayMode.BASIC)
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return _ask(panel, queries)


def board(
    uid: str,
    title: str,
    what: str,
    rows: Mapping[str, Sequence[Panel]],
    workers: bool = False,
    tiers: bool = False,
) -> dashboard.Dashboard:
    """Return a dashboard of titled rows, with variables for the namespace and the Helm release.

    Args:
        workers: Add the variable ``$worker``, with which the user selects workers.
        tiers: Add the variable ``$tier``, with which the user selects tiers.
    """
    made = dashboard.Dashboard(f"Overfill / {title}").uid(f"overfill-{uid}").description(what).tags(["overfill"])
    made = made.refresh("10s").time("now-30m", "now").timezone("browser").tooltip(model.DashboardCursorSync.CROSSHAIR)
    made = made.link(
        dashboard.DashboardLink("Overfill").type(model.DashboardLinkType.DASHBOARDS).tags(["overfill"]).as_dropdown(True)
        .keep_time(True).include_vars(True)
    )  # fmt: skip
    made = made.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    named = 'overfill_build_info{namespace=~"$namespace"}'
    made = made.with_variable(_choice("namespace", "Namespace", "label_values(overfill_build_info, namespace)", ".*"))
    made = made.with_variable(_choice("release", "Release", f"label_values({named}, app_kubernetes_io_instance)", ".*"))
    if workers:
        query = f"label_values({of_release('overfill_build_info')}, worker)"
        made = made.with_variable(_choice("worker", "Worker", query, ".+"))
    if tiers:
        query = f"label_values({of_release('overfill_router_running_requests')}, tier)"
        made = made.with_variable(_choice("tier", "Tier", query, ".+"))
    ids = itertools.count(1)
    for name, panels in rows.items():
        made = made.with_row(dashboard.Row(name).id(next(ids)))
        for panel in panels:
            made = made.with_panel(panel.id(next(ids)))
    return made


def of_release(expression: str) -> str:
    """Return the expression with all its selectors restricted to the chosen releases."""
    return _SELECTOR.sub(lambda found: f"{found[1]}{{{RELEASE}{', ' if found[2] else '}'}", expression)


def _choice(name: str, label: str, query: str, all_value: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name).label(label).datasource(SOURCE)
        .query(query).refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True).include_all(True).all_value(all_value)
        .current(model.VariableOption(text="All", value="$__all", selected=True))
    )  # fmt: skip


def _ask(panel, queries: Queries):
    for index, (legend, expression) in enumerate(queries.items()):
        query = prometheus.Dataquery().expr(of_release(expression)).legend_format(legend).range()
        query = query.ref_id(chr(ord("A") + index))
        panel = panel.with_target(query)
    return panel


def _thresholds(limit: float) -> dashboard.ThresholdsConfig:
    steps = [model.Threshold(value=None, color="green"), model.Threshold(value=limit, color="red")]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)
