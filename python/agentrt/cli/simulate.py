"""``agentrt simulate``: scheduling policies in a simulated serving engine."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich_click as click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from agentrt import _core
from agentrt._files import check_writable, write_atomically

__all__ = ["simulate"]

FORMAT_VERSION = 1
_FAMILIES = ("batch_shaping", "fairness", "tool_gap", "speculation")
#: 97.5th percentile of Student's t by degrees of freedom; the normal distribution's beyond.
_STUDENT = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class _Row:
    """A figure of the policy beside that of one baseline, by seed."""

    scenario: str
    metric: str
    unit: str
    higher: bool
    baseline_name: str
    baseline: Sequence[float]
    policy: Sequence[float]

    @classmethod
    def read(cls, row: dict[str, Any]) -> _Row:
        metric = row["metric"]
        return cls(
            row["scenario"],
            metric["name"],
            metric["unit"],
            metric["higher"],
            row["baseline_name"],
            row["baseline"],
            row["policy"],
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.scenario,
            "metric": self.metric,
            "unit": self.unit,
            "better": "higher" if self.higher else "lower",
            "baseline_name": self.baseline_name,
            "baseline": statistics.fmean(self.baseline),
            "policy": statistics.fmean(self.policy),
            "runs": len(self.policy),
        }


def _half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean; NaN for one value."""
    freedom = len(values) - 1
    if freedom == 0:
        return math.nan
    student = _STUDENT[freedom] if freedom < len(_STUDENT) else 1.96
    return student * statistics.stdev(values) / math.sqrt(len(values))


def _number(value: float) -> str:
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 100 else f"{value:.3g}"


def _with_interval(values: Sequence[float]) -> str:
    half = _half_width(values)
    mean = _number(statistics.fmean(values))
    return mean if math.isnan(half) else f"{mean} ±{_number(half)}"


def _change(row: _Row) -> str:
    """How far the policy's mean is from the baseline's, green where the intervals of the difference exclude none."""
    before, now = statistics.fmean(row.baseline), statistics.fmean(row.policy)
    differences = [b - a for a, b in zip(row.baseline, row.policy, strict=True)]
    half = _half_width(differences)
    text = f"{(now / before - 1) * 100:+.1f} %" if before else f"{now - before:+.3g}"
    mean = statistics.fmean(differences)
    if math.isnan(half) or abs(mean) <= half or mean == 0:
        return text
    return f"[green]{text}[/]" if (mean > 0) == row.higher else f"[red]{text}[/]"


def _table(rows: Sequence[_Row], policy: str) -> Table:
    table = Table(title=rows[0].scenario, title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("figure", no_wrap=True)
    table.add_column(policy, justify="right", no_wrap=True)
    table.add_column("beside", no_wrap=True)
    table.add_column("its value", justify="right", no_wrap=True)
    table.add_column("change", justify="right", no_wrap=True)
    last = None
    for row in rows:
        if last not in (None, row.metric):
            table.add_section()
        first = row.metric != last
        figure = f"{row.metric} ({row.unit}, {'higher' if row.higher else 'lower'} is better)" if first else ""
        own = _with_interval(row.policy) if first else ""
        table.add_row(figure, own, row.baseline_name, _with_interval(row.baseline), _change(row))
        last = row.metric
    return table


def _recorded(folder: Path | None) -> Path | None:
    """The folder of recorded workloads: as given, in ``AGENTRT_TRACES``, or where the repository has it."""
    if folder is None:
        folder = Path(os.environ.get("AGENTRT_TRACES", "../shared/traces"))
    return folder if folder.is_dir() else None


def _list(console: Console, policy: str | None, traces: Path | None) -> None:
    for family in [policy] if policy else _FAMILIES:
        table = Table(box=None, pad_edge=False, title=family, title_justify="left", title_style="bold")
        table.add_column("scenario", no_wrap=True)
        table.add_column("what")
        table.add_column("beside")
        for name, about, baselines in _core.scenarios(family, traces=traces):
            table.add_row(name, about, ", ".join(baselines))
        console.print(table)


@click.command()
@click.argument("policy", required=False)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31), metavar="S", help="First seed.")
@click.option("--runs", default=5, show_default=True, type=click.IntRange(1), metavar="N", help="Seeds: S, S+1, ...")
@click.option("--cache", default="lru", show_default=True, help="Cache policy of the engine, from `agentrt policies`.")
@click.option("--only", default="", metavar="TEXT", help="Only scenarios whose name contains this.")
@click.option(
    "--traces",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="Recorded workloads; by default AGENTRT_TRACES, or ../shared/traces. Without any, generated ones alone.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the means as JSON.")
@click.option("--list", "list_scenarios", is_flag=True, help="List scenarios and baselines, run nothing.")
def simulate(
    policy: str | None,
    seed: int,
    runs: int,
    cache: str,
    only: str,
    traces: Path | None,
    json_path: Path | None,
    list_scenarios: bool,
) -> None:
    """Run a scheduling policy and its baselines in a simulated serving engine and compare them.

    POLICY is `batch_shaping`, `fairness`, `tool_gap`, `speculation`, a baseline such as `lpm` or `vtc`, or several
    joined by `+`. Each runs in the scenarios made for it, under every seed, on the same workload as its baselines.
    Means come with their 95 % confidence interval; a change is coloured where the interval of the paired difference
    excludes zero. What the engine models: docs/simulator.md.

    \b
    Examples:
      agentrt simulate --list
      agentrt simulate batch_shaping --seed 0 --json batch_shaping.json
      agentrt simulate fairness --only flood --runs 10
      agentrt simulate batch_shaping+fairness --cache agentrt
    """
    out = Console(width=None if sys.stdout.isatty() else 140)
    folder = _recorded(traces)
    if list_scenarios:
        _list(out, policy, folder)
        return
    if policy is None:
        raise click.UsageError("name a policy, for example batch_shaping")
    if json_path:
        check_writable(json_path)
    console = Console(stderr=True)
    columns = (
        TextColumn("simulating"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("simulate", total=None)
        text = _core.simulate(
            policy,
            seed=seed,
            runs=runs,
            cache=cache,
            only=only,
            traces=folder,
            progress=lambda done, total: bar.update(task, completed=done, total=total or None),
        )
    rows = [_Row.read(row) for row in json.loads(text)]
    by_scenario: dict[str, list[_Row]] = {}
    for row in rows:
        by_scenario.setdefault(row.scenario, []).append(row)
    for group in by_scenario.values():
        out.print(_table(group, policy))
    if json_path:
        result = {"version": FORMAT_VERSION, "policy": policy, "seed": seed, "scenarios": [r.to_json() for r in rows]}
        write_atomically(json_path, json.dumps(result, indent=1) + "\n")
        click.echo(f"results: {json_path}", err=True)
