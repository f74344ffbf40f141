"""Vega-Lite specifications of the report's charts."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from agentrt.replay.summary import MeanResult, PolicySummary

__all__ = ["CONFIG", "HIT_RATE", "MUTED", "OWN", "TTFT", "by_capacity", "gap_closed"]

# The three that matter have colours of their own; the others share a muted palette in the order of their appearance.
OWN = {"agentrt": "#0a8f5b", "lru": "#e07a1f", "min": "#222222"}
MUTED = ("#7aa6d6", "#c98bc0", "#b0a160", "#8f8fd9", "#6fbcb8", "#d98c8c", "#9aa5b1", "#a9c47f", "#c7a17a", "#7f9f9f")

CONFIG = {
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "gridColor": "#eceff1",
        "domainColor": "#b0bec5",
        "tickColor": "#b0bec5",
    },
    "legend": {"labelFontSize": 12, "title": None, "orient": "top", "labelLimit": 240, "symbolStrokeWidth": 3},
    "header": {"labelFontSize": 13, "labelFontWeight": "bold", "title": None, "labelAnchor": "start"},
}


@dataclass(frozen=True)
class Metric:
    """What a chart by capacity shows."""

    field: str
    title: str
    scale: float


HIT_RATE = Metric("hit_rate", "hit rate, % of prompt blocks", 100.0)
TTFT = Metric("ttft_change", "mean TTFT against LRU, %", 100.0)


def _colours(policies: list[str]) -> dict[str, Any]:
    muted = iter(MUTED * (len(policies) // len(MUTED) + 1))
    return {"domain": policies, "range": [OWN.get(p) or next(muted) for p in policies]}


def gap_closed(summaries: list[PolicySummary]) -> dict[str, Any]:
    """Bars: share of the gap between LRU and MIN that each policy closes, mean over cells and seeds."""
    gaps: dict[str, list[float]] = {}
    for s in summaries:
        if s.gap_closed is not None and s.policy not in ("lru", "min"):
            gaps.setdefault(s.policy, []).append(s.gap_closed * 100)
    means = {policy: round(fmean(values), 2) for policy, values in gaps.items()}
    colours = {"condition": {"test": "datum.policy == 'agentrt'", "value": OWN["agentrt"]}, "value": "#90a4ae"}
    y = {"field": "policy", "type": "nominal", "sort": {"field": "gap", "order": "descending"}, "title": None}
    return {
        "config": CONFIG,
        "data": {"values": [{"policy": p, "gap": gap} for p, gap in means.items()]},
        "width": 640,
        "height": {"step": 26},
        "layer": [
            {
                "mark": {"type": "bar", "height": 16, "cornerRadiusEnd": 2},
                "encoding": {
                    "y": y,
                    "color": colours,
                    "x": {
                        "field": "gap",
                        "type": "quantitative",
                        "title": "% of the way from LRU (0) to the optimum MIN (100)",
                        "scale": {
                            "domain": [
                                1.2 * min([0.0, *means.values()]) - 4 * any(gap < 0 for gap in means.values()),
                                max([60.0, *means.values()]),
                            ],
                            "nice": True,
                        },
                    },
                    "tooltip": [{"field": "policy"}, {"field": "gap", "title": "gap closed, %"}],
                },
            },
            {
                "mark": {
                    "type": "text",
                    "align": {"expr": "datum.gap < 0 ? 'right' : 'left'"},
                    "dx": {"expr": "datum.gap < 0 ? -4 : 4"},
                    "fontSize": 12,
                },
                "encoding": {
                    "y": y,
                    "x": {"field": "gap", "type": "quantitative"},
                    "text": {"field": "gap", "format": ".1f"},
                },
            },
        ],
    }


def by_capacity(cells: list[MeanResult], metric: Metric) -> dict[str, Any]:
    """Small multiples: one panel per workload, capacity across, one line per policy. A click on the legend isolates."""
    policies = list(dict.fromkeys(c.policy for c in cells))
    capacities = list(dict.fromkeys(c.capacity for c in cells))
    rows = [
        {
            "workload": c.workload,
            "policy": c.policy,
            "pool": c.capacity,
            "value": round(getattr(c, metric.field) * metric.scale, 3),
            "gap": None if c.gap_closed is None else round(c.gap_closed, 3),
        }
        for c in cells
    ]
    x = {
        "field": "pool",
        "type": "ordinal",
        "sort": capacities,
        "title": "pool size",
        "axis": {"labelAngle": 0},
        "scale": {"padding": 0.25},
    }
    y = {"field": "value", "type": "quantitative", "title": metric.title, "scale": {"zero": False}}
    emphasis = "datum.policy == 'agentrt' || datum.policy == 'lru' || datum.policy == 'min'"
    encoding = {
        "x": x,
        "y": y,
        "color": {
            "field": "policy",
            "type": "nominal",
            "scale": _colours(policies),
            "legend": {"columns": 10 if len(policies) <= 10 else 5},
        },
        "opacity": {"condition": {"param": "shown", "value": 1}, "value": 0.08},
        "tooltip": [
            {"field": "workload"},
            {"field": "pool", "title": "pool"},
            {"field": "policy"},
            {"field": "value", "title": metric.title, "format": ",.1f"},
            {"field": "gap", "title": "gap closed", "format": ".2f"},
        ],
    }
    return {
        "config": CONFIG,
        "data": {"values": rows},
        "columns": 3,
        "align": "all",
        "facet": {"field": "workload", "type": "nominal", "sort": list(dict.fromkeys(c.workload for c in cells))},
        "resolve": {"scale": {"y": "independent"}, "axis": {"x": "independent"}},
        "spec": {
            "width": 280,
            "height": 210,
            "layer": [
                {
                    "params": [{"name": "shown", "select": {"type": "point", "fields": ["policy"]}, "bind": "legend"}],
                    "mark": {"type": "line"},
                    "encoding": {
                        **encoding,
                        "strokeWidth": {"condition": {"test": emphasis, "value": 3}, "value": 1.5},
                        "strokeDash": {
                            "condition": {"test": "datum.policy == 'min'", "value": [5, 4]},
                            "value": [1, 0],
                        },
                    },
                },
                {"mark": {"type": "point", "filled": True, "size": 36}, "encoding": encoding},
            ],
        },
    }
