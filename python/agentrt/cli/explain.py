"""``agentrt explain``: what agentrt sees in a workload."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import rich_click as click
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from agentrt import replay as engine
from agentrt._files import check_writable, write_atomically
from agentrt.replay.explanation import AgentFigures, Explanation
from agentrt.replay.explanation import explain as explain_one

__all__ = ["explain"]

_DASH = "-"
#: Superseded tails are told up to so many misses.
_FEW_MISSES = 2


def _percent(share: float) -> str:
    return f"{share * 100:.1f}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return _DASH
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _facts(told: Explanation) -> Iterator[tuple[str, str]]:
    own, lru, best = told.hit_rate.agentrt, told.hit_rate.lru, told.hit_rate.min
    yield "hit rate", f"agentrt {_percent(own)} %, LRU {_percent(lru)} %, optimum {_percent(best)} %"
    early = sum(a.evicted_too_early_blocks for a in told.agents)
    never = sum(a.never_seen_blocks for a in told.agents)
    blocks = max(sum(a.prompt_blocks for a in told.agents), 1)
    held = sum(a.held_block_s for a in told.agents) or 1.0
    late = sum(a.kept_too_long_block_s for a in told.agents)
    text = (
        f"{_percent(early / blocks)} % of prompt blocks were evicted too early, {_percent(never / blocks)} % had never "
    )
    yield "regret", f"{text}been seen; {_percent(late / held)} % of the pool's space held blocks too long"
    yield from _foresight(told)
    if told.tails:
        shares = ", ".join(
            f"{_percent(t.used_again)} % of blocks "
            + ("that its last call used" if t.misses == 0 else f"passed over {t.misses} time{'s' * (t.misses > 1)}")
            for t in told.tails
            if t.misses <= _FEW_MISSES
        )
        yield "tails", f"used by the agent's next call: {shares}"
    yield "calibration", _calibration(told)
    if told.bypassed_calls:
        yield "left out", f"calls larger than the pool: {told.bypassed_calls:,}"


def _foresight(told: Explanation) -> Iterator[tuple[str, str]]:
    following = told.next_agent
    if len(told.agents) == 1:
        yield "next agent", "there is one"
        return
    foreseen, offline = _percent(following.agentrt), _percent(following.offline)
    text = f"{foreseen} % foreseen (order 2 trained on the whole trace {offline} %, the same again "
    yield "next agent", f"{text}{_percent(following.stay)} %); R = {following.r:.2f}"
    early = following.early
    if early.transitions:
        text = (
            f"transitions 51 to {50 + early.transitions}: {_percent(early.agentrt)} % foreseen, trained on the whole "
        )
        yield "learning", f"{text}trace {_percent(early.offline)} %"


def _calibration(told: Explanation) -> str:
    c = told.calibration
    if not c.n:
        return "nothing was evicted, or the replay ended too soon to tell"
    text = f"ECE {c.ece:.3f}, Brier {c.brier:.3f} (always the mean: {c.brier_of_mean:.3f}) over {c.n:,} predictions of "
    said = f"{_percent(c.predicted)} % said, {_percent(c.observed)} % came"
    return f"{text}use within about {_seconds(told.residence_s)}: {said}"


def _agents(told: Explanation) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("agent", no_wrap=True)
    for name in (
        "calls", "hit %\nagentrt", "\nLRU", "\noptimum", "evicted\ntoo early %", "never\nseen %", "kept too\nlong %",
        "silent for\n(median)", "last\ncall %",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("next", overflow="fold")
    for agent in told.agents:
        table.add_row(*_agent_row(told, agent))
    return table


def _agent_row(told: Explanation, agent: AgentFigures) -> list[str]:
    known = agent.silence.learned
    hits = agent.hit_blocks
    return [
        agent.agent,
        f"{agent.calls:,}",
        *(_percent(agent.share(blocks)) for blocks in (hits.agentrt, hits.lru, hits.min)),
        _percent(agent.share(agent.evicted_too_early_blocks)),
        _percent(agent.share(agent.never_seen_blocks)),
        _percent(agent.kept_too_long),
        _seconds(agent.silence.median_s),
        _percent(1 - agent.silence.continues) if known else _DASH,
        ", ".join(f"{e.target} {e.learned * 100:.0f} %" for e in told.likely_next(agent.agent)[:3]) or _DASH,
    ]


def _parts(told: Explanation) -> Iterator[RenderableType]:
    title = f"{told.workload}: {told.calls:,} calls, {told.sessions} sessions at a time, pool {told.capacity}"
    yield Text(f"{title} = {told.capacity_blocks:,} blocks, seed {told.seed}", style="bold")
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, text in _facts(told):
        facts.add_row(name, text)
    yield facts
    yield Text()
    yield _agents(told)
    yield Text()


@click.command()
@click.argument("traces", nargs=-1, type=click.Path(path_type=Path), metavar="[TRACE]...")
@click.option(
    "--sessions", "-n", type=click.IntRange(1), default=16, show_default=True, metavar="N", help="Concurrent sessions."
)
@click.option(
    "--capacity",
    "-c",
    default="10%",
    show_default=True,
    metavar="10%|1500",
    help="Pool size: percent of the live working set, or blocks.",
)
@click.option(
    "--order",
    type=click.Choice(["closed", "open", "file"]),
    default="closed",
    show_default=True,
    help="closed: N sessions at a time; open: recorded arrivals; file: one call at a time in file order.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="S", help="Seed of the replay.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures as JSON.")
@click.option(
    "--html",
    "html_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a self-contained page with pictures (needs the extra `report`).",
)
@click.option("--skip-bad", is_flag=True, help="Leave out unusable lines, count and report them.")
def explain(
    traces: tuple[Path, ...],
    sessions: int,
    capacity: str,
    order: str,
    seed: int,
    json_path: Path | None,
    html_path: Path | None,
    skip_bad: bool,
) -> None:
    """Show what agentrt learns of a workload, where it does well, what it regrets, and whether it is right.

    Without TRACE the five built-in multi-agent workloads are explained. agentrt, LRU and the offline optimum run over
    the same calls. A prompt block that misses was *evicted too early* or *never seen*; space was *kept too long* by
    blocks that left the pool without being used again.

    \b
    Examples:
      agentrt explain my-trace.jsonl.gz
      agentrt explain my-trace.jsonl.gz --capacity 5% --html explained.html
    """
    if html_path:
        from agentrt import report

        report.check_available()
    for path in (json_path, html_path):
        if path:
            check_writable(path)
    told = []
    with Console(stderr=True).status("") as status:
        loaded: list[engine.Trace] = []
        for trace_path in traces:
            status.update(f"reading {trace_path}")
            loaded.append(engine.Trace.read(trace_path, skip_bad=skip_bad))
        for trace in loaded or engine.five_workloads():
            status.update(f"replaying {trace.workload}")
            told.append(explain_one(trace, capacity=capacity, order=order, sessions=sessions, seed=seed))
    for trace_path, trace in zip(traces, loaded, strict=True):
        if trace.skipped_lines:
            click.echo(f"{trace_path}: bad lines left out: {trace.skipped_lines}", err=True)
    out = Console(width=None if sys.stdout.isatty() else 160)
    for one in told:
        for part in _parts(one):
            out.print(part)
    if json_path:
        write_atomically(json_path, json.dumps({"version": 1, "workloads": [one.raw for one in told]}, indent=1) + "\n")
        click.echo(f"figures: {json_path}", err=True)
    if html_path:
        from agentrt.report.explanation import render_explanation

        command = shlex.join(["agentrt", *sys.argv[1:]])
        write_atomically(html_path, render_explanation(told, command=command))
        click.echo(f"page: {html_path.absolute()}", err=True)
