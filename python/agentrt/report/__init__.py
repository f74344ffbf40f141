"""``report.html``: a replay as one self-contained page that opens without a network.

Charts are Vega-Lite specifications (:mod:`agentrt.report.charts`); the scripts that draw them are embedded in the
page, about 0.9 MB. Needs the extra ``report``.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib.resources import files
from typing import Any

from agentrt import build_info
from agentrt.errors import MissingExtraError
from agentrt.replay import Replay
from agentrt.replay.summary import HEADROOM_POINTS, PolicySummary, average_seeds, summarise
from agentrt.report import charts

__all__ = ["check_available", "render_html", "render_page"]


def check_available() -> None:
    """Raises where the extra is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("jinja2", "vl_convert")):
        raise MissingExtraError("the HTML report", "report")


def render_page(template: str, **values: Any) -> str:
    """A page from one of the templates beside this file, with the scripts that draw its charts."""
    import jinja2
    import vl_convert

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    beside = files("agentrt.report")
    return environment.from_string(beside.joinpath(template).read_text(encoding="utf-8")).render(
        **values,
        style=beside.joinpath("style.css").read_text(encoding="utf-8"),
        # A script element ends at the first `</script`, even inside a string.
        script=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script"),
        versions=f"{build_info()}, Python {platform.python_version()}, {sys.platform} {platform.machine()}",
    )


def _headline(replay: Replay, summaries: list[PolicySummary]) -> list[str]:
    """Two or three sentences that answer "does it help?" with the run's own numbers, losses included."""
    own = [s for s in summaries if s.policy == "agentrt"]
    workloads = len({r.workload for r in replay.results})
    sentences = []
    for s in own:
        runs = f"{s.sessions} concurrent sessions, seed {s.seed}"
        if s.gap_closed is None or s.lift_points is None:
            sentences.append(
                f"With {runs}, nothing is to be gained: the optimum is nowhere {HEADROOM_POINTS:.0f} points above LRU. "
                "The pool is large enough, or nothing is used twice."
            )
            continue
        text = (
            f"Over {workloads} workload{'s' * (workloads > 1)} ({runs}), agentrt raises the prefix-cache hit rate by "
            f"{s.lift_points:.1f} points over LRU on average and closes {s.gap_closed * 100:.0f} % of the gap to the "
            "offline optimum"
        )
        if s.ttft_change is not None:
            verb = "falls" if s.ttft_change < 0 else "rises"
            text += f"; the modelled mean time to first token {verb} by {abs(s.ttft_change) * 100:.0f} %"
        loss = "No cell is below LRU by 0.05 points or more."
        if s.loses:
            loss = f"The worst cell is {s.worst_cell}: {s.worst_points:+.1f} points against LRU."
        sentences.append(f"{text}. {loss}")
    return sentences


def render_html(replay: Replay, *, command: str) -> str:
    """The page as text.

    Args:
        replay: What to show.
        command: The command line that made it, printed at the end of the page.

    Raises:
        MissingExtraError: The extra ``report`` is not installed.
    """
    check_available()
    summaries = summarise(replay)
    means = average_seeds(replay)
    specs: dict[str, Any] = {}
    for sessions in dict.fromkeys(m.sessions for m in means):
        cells = [m for m in means if m.sessions == sessions]
        specs[f"gap-{sessions}"] = charts.gap_closed([s for s in summaries if s.sessions == sessions])
        specs[f"hits-{sessions}"] = charts.by_capacity(cells, charts.HIT_RATE)
        specs[f"ttft-{sessions}"] = charts.by_capacity(cells, charts.TTFT)
    return render_page(
        "report.html.j2",
        replay=replay,
        headline=_headline(replay, summaries),
        summaries=summaries,
        means=means,
        session_counts=list(dict.fromkeys(m.sessions for m in means)),
        specs=specs,
        headroom=HEADROOM_POINTS,
        bypassed=[r for r in replay.results if r.bypassed_calls and r.policy == replay.results[0].policy],
        command=command,
    )
