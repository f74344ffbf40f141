"""``explained.html``: what agentrt sees in a workload, as one self-contained page. Needs the extra ``report``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentrt.replay.explanation import Explanation
from agentrt.report import check_available, pictures, render_page

__all__ = ["render_explanation"]


def _headline(told: Explanation) -> list[str]:
    """What a person who runs these agents should know first."""
    hits = told.hit_rate
    others = f"LRU {hits.lru * 100:.1f} %, and an optimal order would find {hits.min * 100:.1f} %."
    sentences = [f"agentrt finds {hits.agentrt * 100:.1f} % of prompt blocks in the pool, {others}"]
    regretted = max(told.agents, key=lambda agent: agent.evicted_too_early_blocks)
    early = sum(agent.evicted_too_early_blocks for agent in told.agents)
    if early:
        share = regretted.evicted_too_early_blocks / early
        of_all = early / max(sum(agent.prompt_blocks for agent in told.agents), 1)
        sentences.append(
            f"{of_all * 100:.1f} % of prompt blocks had been there and were evicted too early; {share * 100:.0f} % of "
            f"those belong to calls of {regretted.agent}."
        )
    else:
        sentences.append("Nothing was evicted too early: the pool holds all that is used twice.")
    idle = max(told.agents, key=lambda agent: agent.kept_too_long_block_s)
    if idle.kept_too_long_block_s:
        sentences.append(
            f"Most space without return went to blocks of {idle.agent}: {idle.kept_too_long * 100:.0f} % of what they "
            "took."
        )
    return sentences


def render_explanation(told: Sequence[Explanation], *, command: str) -> str:
    """The page as text.

    Args:
        told: The workloads.
        command: The command line that made it, printed at the end of the page.

    Raises:
        MissingExtraError: The extra ``report`` is not installed.
    """
    check_available()
    specs: dict[str, Any] = {}
    for number, one in enumerate(told):
        specs[f"graph-{number}"] = pictures.graph(one)
        specs[f"hits-{number}"] = pictures.hit_rates(one)
        specs[f"regret-{number}"] = pictures.regret(one)
        specs[f"space-{number}"] = pictures.space(one)
        specs[f"silences-{number}"] = pictures.silences(one)
        specs[f"tails-{number}"] = pictures.tails(one)
        specs[f"reliability-{number}"] = pictures.reliability(one)
    return render_page(
        "explanation.html.j2", told=told, headlines=[_headline(one) for one in told], specs=specs, command=command
    )
