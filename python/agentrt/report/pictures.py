"""Vega-Lite specifications of the pictures in ``agentrt explain``'s page."""

from __future__ import annotations

import math
from typing import Any

from agentrt.replay.explanation import Explanation
from agentrt.report.charts import CONFIG, MUTED, OWN

__all__ = ["graph", "hit_rates", "regret", "reliability", "silences", "space", "tails"]

#: Transitions less likely than this are not drawn.
_LEAST = 0.03
#: Points of a drawn edge.
_SEGMENTS = 18
#: The circle's radius is 1.
_NODE = 0.085
_LOOP = 0.13

_PROMPT_PARTS = (
    ("found in the pool", OWN["agentrt"]),
    ("evicted too early", "#d1495b"),
    ("never seen", "#cfd8dc"),
)


def _curve(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """From node to node, bent to the left, from rim to rim."""
    (x0, y0), (x1, y1) = start, end
    dx, dy = x1 - x0, y1 - y0
    bend = 0.16
    mx, my = (x0 + x1) / 2 - dy * bend, (y0 + y1) / 2 + dx * bend
    points = []
    for i in range(_SEGMENTS + 1):
        t = i / _SEGMENTS
        a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t * t
        points.append((a * x0 + b * mx + c * x1, a * y0 + b * my + c * y1))
    return [p for p in points if min(math.dist(p, start), math.dist(p, end)) >= _NODE]


def _loop(at: tuple[float, float], outward: float) -> list[tuple[float, float]]:
    """From a node back to itself, away from the others."""
    cx, cy = at[0] + _LOOP * math.cos(outward), at[1] + _LOOP * math.sin(outward)
    turns = [outward + math.pi + 2 * math.pi * i / (2 * _SEGMENTS) for i in range(2 * _SEGMENTS + 1)]
    points = [(cx + _LOOP * math.cos(turn), cy + _LOOP * math.sin(turn)) for turn in turns]
    return [p for p in points if math.dist(p, at) >= _NODE]


def graph(told: Explanation) -> dict[str, Any]:
    """The learned transitions: agents on a circle, an edge as wide as the transition is likely."""
    agents = [agent for agent in told.agents if any(agent.agent in (e.source, e.target) for e in told.transitions)]
    agents = agents or told.agents[:1]
    place, turn_of = {}, {}
    for i, agent in enumerate(agents):
        turn = math.pi / 2 - 2 * math.pi * i / len(agents)
        radius = 1.0 if len(agents) > 1 else 0.0
        place[agent.agent], turn_of[agent.agent] = (radius * math.cos(turn), radius * math.sin(turn)), turn
    edges: list[dict[str, Any]] = []
    heads: list[dict[str, Any]] = []
    for number, edge in enumerate(told.transitions):
        if edge.learned < _LEAST or edge.source not in place or edge.target not in place:
            continue
        if edge.source == edge.target:
            points = _loop(place[edge.source], turn_of[edge.source])
        else:
            points = _curve(place[edge.source], place[edge.target])
        facts = {
            "edge": number,
            "from": edge.source,
            "to": edge.target,
            "learned": round(edge.learned, 4),
            "observed": round(edge.observed, 4),
        }
        edges += [{**facts, "order": i, "x": round(x, 4), "y": round(y, 4)} for i, (x, y) in enumerate(points)]
        (x0, y0), (x1, y1) = points[-3], points[-1]
        angle = math.degrees(math.atan2(x1 - x0, y1 - y0))
        heads.append({**facts, "x": round(x1, 4), "y": round(y1, 4), "angle": round(angle, 1)})
    nodes = [
        {"agent": a.agent, "calls": a.calls, "x": round(place[a.agent][0], 4), "y": round(place[a.agent][1], 4)}
        for a in agents
    ]
    hide = {"axis": None, "type": "quantitative", "scale": {"domain": [-1.45, 1.45], "nice": False}}
    x, y = {"field": "x", **hide}, {"field": "y", **hide}
    tooltip = [
        {"field": "from"},
        {"field": "to"},
        {"field": "learned", "title": "learned", "format": ".0%"},
        {"field": "observed", "title": "in the trace", "format": ".0%"},
    ]
    darkness = {
        "field": "learned",
        "type": "quantitative",
        "scale": {"domain": [0, 1], "range": ["#d5dee3", "#0a5f3e"]},
        "legend": None,
    }
    label = {"x": x, "y": y, "text": {"field": "agent"}}
    return {
        "config": CONFIG,
        "width": 620,
        "height": 560,
        "resolve": {"scale": {"size": "independent"}},
        "layer": [
            {
                "data": {"values": edges},
                "mark": {"type": "line", "interpolate": "linear", "strokeCap": "butt"},
                "encoding": {
                    "x": x,
                    "y": y,
                    "detail": {"field": "edge"},
                    "order": {"field": "order"},
                    "strokeWidth": {
                        "field": "learned",
                        "type": "quantitative",
                        "scale": {"domain": [0, 1], "range": [0.6, 9]},
                        "legend": None,
                    },
                    "color": darkness,
                    "tooltip": tooltip,
                },
            },
            {
                "data": {"values": heads},
                "mark": {"type": "point", "shape": "triangle-up", "filled": True, "opacity": 1},
                "encoding": {
                    "x": x,
                    "y": y,
                    "angle": {"field": "angle", "type": "quantitative", "scale": None},
                    "size": {
                        "field": "learned",
                        "type": "quantitative",
                        "scale": {"domain": [0, 1], "range": [40, 420]},
                        "legend": None,
                    },
                    "color": darkness,
                    "tooltip": tooltip,
                },
            },
            {
                "data": {"values": nodes},
                "mark": {"type": "circle", "color": "#ffffff", "stroke": "#455a64", "strokeWidth": 2, "opacity": 1},
                "encoding": {
                    "x": x,
                    "y": y,
                    "size": {
                        "field": "calls",
                        "type": "quantitative",
                        "scale": {"type": "sqrt", "range": [150, 1100]},
                        "legend": None,
                    },
                    "tooltip": [{"field": "agent"}, {"field": "calls", "format": ","}],
                },
            },
            {
                "data": {"values": nodes},
                "mark": {"type": "text", "fontSize": 13, "fontWeight": "bold", "stroke": "#ffffff", "strokeWidth": 4},
                "encoding": label,
            },
            {
                "data": {"values": nodes},
                "mark": {"type": "text", "fontSize": 13, "fontWeight": "bold", "color": "#1f2933"},
                "encoding": label,
            },
        ],
    }


def silences(told: Explanation) -> dict[str, Any]:
    """Small multiples by agent: how long sessions stay silent after its calls, observed and learned."""
    rows = []
    for agent in told.agents:
        silence = agent.silence
        if silence.ended < 5:
            continue
        name = f"{agent.agent} ({silence.ended:,} ended, {silence.censored:,} censored)"
        for kind, curve in (("observed (Kaplan-Meier)", silence.observed), ("learned", silence.learned)):
            rows += [
                {"agent": name, "kind": kind, "seconds": round(s, 4), "silent": round(p, 4)}
                for s, p in curve
                if s >= 0.01
            ]
    return {
        "config": CONFIG,
        "data": {"values": rows},
        "columns": 3,
        "facet": {"field": "agent", "type": "nominal", "sort": None},
        "spec": {
            "width": 270,
            "height": 150,
            "mark": {"type": "line", "interpolate": "monotone"},
            "encoding": {
                "x": {
                    "field": "seconds",
                    "type": "quantitative",
                    "scale": {"type": "log"},
                    "title": "seconds since the call ended",
                    "axis": {"format": "~g", "values": [0.01, 0.1, 1, 10, 100, 1000]},
                },
                "y": {
                    "field": "silent",
                    "type": "quantitative",
                    "title": "still silent",
                    "scale": {"domain": [0, 1]},
                    "axis": {"format": "%"},
                },
                "color": {
                    "field": "kind",
                    "type": "nominal",
                    "scale": {"domain": ["observed (Kaplan-Meier)", "learned"], "range": ["#222222", OWN["agentrt"]]},
                },
                "strokeDash": {"condition": {"test": "datum.kind == 'learned'", "value": [1, 0]}, "value": [5, 3]},
                "tooltip": [
                    {"field": "kind"},
                    {"field": "seconds", "format": ".3~g"},
                    {"field": "silent", "format": ".0%"},
                ],
            },
        },
    }


def tails(told: Explanation) -> dict[str, Any]:
    """Lines by agent: share of blocks used again, by how many calls have passed them over."""
    names = ["all agents"] + [agent.agent for agent in told.agents if agent.tails]
    rows = [
        {"agent": name, "misses": t.misses, "used": round(t.used_again, 4), "votes": round(t.votes, 1)}
        for name, of in zip(names, [told.tails] + [a.tails for a in told.agents if a.tails], strict=True)
        for t in of
        if t.votes >= 1
    ]
    muted = iter(MUTED * (len(names) // len(MUTED) + 1))
    encoding = {
        "x": {
            "field": "misses",
            "type": "ordinal",
            "title": "calls of the agent that have passed the block over (7: or more)",
            "axis": {"labelAngle": 0},
        },
        "y": {
            "field": "used",
            "type": "quantitative",
            "title": "used by the agent's next call",
            "scale": {"domain": [0, 1]},
            "axis": {"format": "%"},
        },
        "color": {
            "field": "agent",
            "type": "nominal",
            "scale": {"domain": names, "range": ["#222222", *(next(muted) for _ in names[1:])]},
            "legend": {"columns": 5},
        },
        "tooltip": [
            {"field": "agent"},
            {"field": "misses"},
            {"field": "used", "format": ".0%"},
            {"field": "votes", "format": ",.0f"},
        ],
    }
    return {
        "config": CONFIG,
        "data": {"values": rows},
        "width": 640,
        "height": 240,
        "layer": [
            {"mark": {"type": "line"}, "encoding": encoding},
            {
                "mark": {"type": "circle", "opacity": 0.9},
                "encoding": {
                    **encoding,
                    "size": {
                        "field": "votes",
                        "type": "quantitative",
                        "scale": {"type": "sqrt", "range": [10, 240]},
                        "legend": None,
                    },
                },
            },
        ],
    }


def hit_rates(told: Explanation) -> dict[str, Any]:
    """Lines: the hit rate of agentrt, LRU and MIN over the replay."""
    rows = [
        {"calls": window.calls, "policy": policy, "hits": round(getattr(window.hit_rate, policy), 4)}
        for window in told.windows
        for policy in OWN
    ]
    return {
        "config": CONFIG,
        "data": {"values": rows},
        "width": 820,
        "height": 240,
        "mark": {"type": "line", "interpolate": "monotone", "strokeWidth": 2},
        "encoding": {
            "x": {"field": "calls", "type": "quantitative", "title": "calls so far", "axis": {"format": ",d"}},
            "y": {"field": "hits", "type": "quantitative", "title": "hit rate", "axis": {"format": "%"}},
            "color": {
                "field": "policy",
                "type": "nominal",
                "scale": {"domain": list(OWN), "range": list(OWN.values())},
            },
            "strokeDash": {"condition": {"test": "datum.policy == 'min'", "value": [5, 4]}, "value": [1, 0]},
            "tooltip": [{"field": "policy"}, {"field": "calls", "format": ","}, {"field": "hits", "format": ".1%"}],
        },
    }


def regret(told: Explanation) -> dict[str, Any]:
    """Bars by agent: what became of its prompt blocks; marks where LRU and the optimum end."""
    names = [agent.agent for agent in told.agents if agent.prompt_blocks]
    parts, marks = [], []
    for agent in told.agents:
        if not agent.prompt_blocks:
            continue
        counts = (agent.hit_blocks.agentrt, agent.evicted_too_early_blocks, agent.never_seen_blocks)
        for order, ((part, _), blocks) in enumerate(zip(_PROMPT_PARTS, counts, strict=True)):
            parts.append(
                {"agent": agent.agent, "part": part, "order": order, "share": agent.share(blocks), "blocks": blocks}
            )
        marks += [
            {"agent": agent.agent, "policy": policy, "share": agent.share(getattr(agent.hit_blocks, policy))}
            for policy in ("lru", "min")
        ]
    y = {"field": "agent", "type": "nominal", "sort": names, "title": None}
    x = {
        "field": "share",
        "type": "quantitative",
        "title": "share of the agent's prompt blocks",
        "axis": {"format": "%"},
    }
    return {
        "config": CONFIG,
        "width": 640,
        "height": {"step": 26},
        "layer": [
            {
                "data": {"values": parts},
                "mark": {"type": "bar", "height": 16},
                "encoding": {
                    "y": y,
                    "x": {**x, "scale": {"domain": [0, 1]}},
                    "color": {
                        "field": "part",
                        "type": "nominal",
                        "scale": {"domain": [p for p, _ in _PROMPT_PARTS], "range": [c for _, c in _PROMPT_PARTS]},
                    },
                    "order": {"field": "order"},
                    "tooltip": [
                        {"field": "agent"},
                        {"field": "part"},
                        {"field": "share", "format": ".1%"},
                        {"field": "blocks", "format": ","},
                    ],
                },
            },
            {
                "data": {"values": marks},
                "mark": {"type": "tick", "thickness": 3, "size": 22},
                "encoding": {
                    "y": y,
                    "x": x,
                    "color": {"condition": {"test": "datum.policy == 'lru'", "value": OWN["lru"]}, "value": OWN["min"]},
                    "tooltip": [{"field": "policy"}, {"field": "share", "format": ".1%"}],
                },
            },
        ],
    }


def space(told: Explanation) -> dict[str, Any]:
    """Bars by agent: its share of the pool's space over time, and how much of that was kept too long."""
    total = sum(agent.held_block_s for agent in told.agents) or 1.0
    rows = []
    for agent in told.agents:
        useful = agent.held_block_s - agent.kept_too_long_block_s
        rows += [
            {"agent": agent.agent, "part": "until the last use", "share": useful / total},
            {"agent": agent.agent, "part": "kept too long", "share": agent.kept_too_long_block_s / total},
        ]
    return {
        "config": CONFIG,
        "data": {"values": rows},
        "width": 640,
        "height": {"step": 26},
        "mark": {"type": "bar", "height": 16},
        "encoding": {
            "y": {"field": "agent", "type": "nominal", "sort": [a.agent for a in told.agents], "title": None},
            "x": {
                "field": "share",
                "type": "quantitative",
                "title": "share of the pool's block-seconds in use",
                "axis": {"format": "%"},
            },
            "color": {
                "field": "part",
                "type": "nominal",
                "scale": {"domain": ["until the last use", "kept too long"], "range": ["#90a4ae", "#edae49"]},
            },
            "order": {"field": "part", "sort": "descending"},
            "tooltip": [{"field": "agent"}, {"field": "part"}, {"field": "share", "format": ".1%"}],
        },
    }


def reliability(told: Explanation) -> dict[str, Any]:
    """Points: what was said against what came, one per tenth of probability, as large as the number of predictions."""
    bins = [
        {"said": round(b.predicted, 4), "came": round(b.observed, 4), "n": b.n} for b in told.calibration.bins if b.n
    ]
    axis = {"type": "quantitative", "scale": {"domain": [0, 1]}, "axis": {"format": "%"}}
    encoding = {
        "x": {"field": "said", "title": "predicted survival", **axis},
        "y": {"field": "came", "title": "used in time", **axis},
    }
    return {
        "config": CONFIG,
        "width": 320,
        "height": 320,
        "layer": [
            {
                "data": {"values": [{"said": 0, "came": 0}, {"said": 1, "came": 1}]},
                "mark": {"type": "line", "color": "#b0bec5", "strokeDash": [5, 4]},
                "encoding": encoding,
            },
            {
                "data": {"values": bins},
                "mark": {"type": "line", "color": OWN["agentrt"], "strokeWidth": 1.5},
                "encoding": encoding,
            },
            {
                "data": {"values": bins},
                "mark": {"type": "circle", "color": OWN["agentrt"], "opacity": 1},
                "encoding": {
                    **encoding,
                    "size": {
                        "field": "n",
                        "type": "quantitative",
                        "scale": {"type": "sqrt", "range": [10, 500]},
                        "legend": None,
                    },
                    "tooltip": [
                        {"field": "said", "format": ".1%"},
                        {"field": "came", "format": ".1%"},
                        {"field": "n", "title": "predictions", "format": ","},
                    ],
                },
            },
        ],
    }
