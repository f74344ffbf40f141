"""What the results of an engine benchmark say: tables, intervals and tests; needs scipy.

Everything is paired: a policy and stock vLLM ran the same calls in the same repetition, one after the other. Ratios are
compared as logarithms.

    python benches/e2e/summary.py e2e.json
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Metric = Callable[[Row], float]

STOCK = "stock"
SIGNIFICANT = 0.05


def _hit_rate(row: Row) -> float:
    return float(row["hit_rate"])


def _ttft(row: Row) -> float:
    return float(row["ttft_ms"]["mean"])


def _calls_per_s(row: Row) -> float:
    return float(row["calls_per_s"])


def _policies(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["policy"] for row in sorted(rows, key=lambda row: row["place"])))


def pairs(rows: list[Row], policy: str, metric: Metric) -> list[tuple[str, float, float]]:
    """(workload, under the policy, under stock) of every repetition that ran under both."""
    stock = {
        (row["workload"], row["pressure"], row["repetition"]): metric(row) for row in rows if row["policy"] == STOCK
    }
    mine = [row for row in rows if row["policy"] == policy]
    keys = [(row["workload"], row["pressure"], row["repetition"]) for row in mine]
    return [(key[0], metric(row), stock[key]) for key, row in zip(keys, mine, strict=True) if key in stock]


def change(rows: list[Row], policy: str, metric: Metric, relative: bool) -> float:
    """Mean over workloads of the mean change against stock."""
    by_workload: dict[str, list[float]] = {}
    for workload, mine, stock in pairs(rows, policy, metric):
        by_workload.setdefault(workload, []).append(mine / stock - 1 if relative else mine - stock)
    return statistics.mean(statistics.mean(values) for values in by_workload.values())


def interval(rows: list[Row], policy: str, metric: Metric, better: int) -> str:
    """95 % bootstrap interval of the mean log ratio, and the sign test over repetitions."""
    from scipy import stats

    logs = [math.log(mine / stock) for _, mine, stock in pairs(rows, policy, metric)]
    if len(logs) < 3 or len(set(logs)) < 2:
        return f"{len(logs)} pairs: too few for a statement"
    found = stats.bootstrap((logs,), statistics.mean, vectorized=False, method="percentile", rng=0)
    low, high = (math.exp(x) - 1 for x in found.confidence_interval)
    wins = sum(x * better > 0 for x in logs)
    p = stats.binomtest(wins, len(logs)).pvalue
    return f"95 % interval {low:+.1%} to {high:+.1%}; better in {wins} of {len(logs)} pairs, sign test p = {p:.2g}"


def table(rows: list[Row]) -> list[str]:
    """Means over repetitions, a line a workload and policy."""
    lines = [
        "| workload | blocks | policy | hit tokens | TTFT mean / p50 / p99 ms | calls/s | makespan s | us a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        for policy in _policies(rows):
            mine = [row for row in rows if (row["workload"], row["policy"]) == (workload, policy)]
            if not mine:
                continue
            ttft = [statistics.mean(row["ttft_ms"][name] for row in mine) for name in ("mean", "p50", "p99")]
            lines.append(
                f"| `{workload}` | {mine[0]['pool_blocks']:,} | {policy} "
                f"| {statistics.mean(map(_hit_rate, mine)):.1%} | {' / '.join(f'{value:,.0f}' for value in ttft)} "
                f"| {statistics.mean(map(_calls_per_s, mine)):.2f} | "
                f"{statistics.mean(row['makespan_s'] for row in mine):.1f} | "
                f"{statistics.mean(row['overhead_us_per_step'] for row in mine):.0f} |"
            )
    return lines


def against_stock(rows: list[Row]) -> list[str]:
    """Each policy against stock: the mean over workloads, then the statement over all repetitions."""
    lines = []
    best = change(rows, "optimal", _ttft, relative=True) if pairs(rows, "optimal", _ttft) else None
    for policy in _policies(rows):
        if policy == STOCK or not pairs(rows, policy, _ttft):
            continue
        hits = change(rows, policy, _hit_rate, relative=False) * 100
        ttft = change(rows, policy, _ttft, relative=True)
        speed = change(rows, policy, _calls_per_s, relative=True)
        share = f", {ttft / best:.0%} of what `optimal` saves" if best is not None and best < 0 else ""
        lines += [
            f"- {policy}: hits {hits:+.1f} points, mean TTFT {ttft:+.1%}{share}, calls/s {speed:+.1%}",
            f"  - TTFT: {interval(rows, policy, _ttft, -1)}",
            f"  - calls/s: {interval(rows, policy, _calls_per_s, 1)}",
        ]
    return lines


def slower(rows: list[Row]) -> list[str]:
    """Where a policy of agentrt is slower than stock beyond noise: one-sided paired t-test, uncorrected."""
    from scipy import stats

    lines = []
    tested = 0
    for policy in (name for name in _policies(rows) if name.startswith("agentrt")):
        for workload in dict.fromkeys(row["workload"] for row in rows):
            for pressure in (True, False):
                cell = [row for row in rows if (row["workload"], row["pressure"]) == (workload, pressure)]
                for name, metric, worse in (("mean TTFT", _ttft, 1), ("calls/s", _calls_per_s, -1)):
                    logs = [worse * math.log(mine / stock) for _, mine, stock in pairs(cell, policy, metric)]
                    if len(logs) < 3 or len(set(logs)) < 2:
                        continue
                    tested += 1
                    p = stats.ttest_1samp(logs, 0.0, alternative="greater").pvalue
                    if p < SIGNIFICANT:
                        where = "under pressure" if pressure else "where all fits"
                        loss = math.exp(worse * statistics.mean(logs)) - 1
                        lines.append(f"- {policy}, `{workload}` {where}: {name} {loss:+.1%} (p = {p:.2g})")
    return [f"Worse than stock beyond noise (p < {SIGNIFICANT}, {tested} tests): {len(lines) or 'nowhere'}", *lines]


def predictions(rows: list[Row]) -> list[str]:
    """What replays of recordings said against what was measured in the same repetitions: means and the farthest off."""
    measured = {(r["workload"], r["pressure"], r["repetition"], r["policy"]): r["hit_rate"] for r in rows}
    found: dict[tuple[str, str, str, str], list[tuple[float, float]]] = {}
    for row in rows:
        for policy, predicted in sorted(row.get("predicted", {}).items()):
            got = measured.get((row["workload"], row["pressure"], row["repetition"], policy))
            if got is not None:
                pool = "pressure" if row["pressure"] else "fits"
                found.setdefault((row["workload"], pool, row["policy"], policy), []).append((predicted, got))
    lines = [
        f"| `{workload}` | {pool} | {recorded} | {policy} | {statistics.mean(p for p, _ in values):.1%} | "
        f"{statistics.mean(g for _, g in values):.1%} | {max((p - g for p, g in values), key=abs) * 100:+.1f} |"
        for (workload, pool, recorded, policy), values in found.items()
    ]
    head = "| workload | pool | recorded under | policy | replayed | measured | farthest off, points |"
    return [head, "|---|---|---|---|---|---|---|", *lines] if lines else []


def problems(rows: list[Row]) -> list[str]:
    """What makes the figures worthless: other answers than stock's, or faults."""
    found = []
    for row in rows:
        where = f"{row['workload']}, pool {row['pool_blocks']}, {row['policy']}, repetition {row['repetition'] + 1}"
        if row["outputs_differing"]:
            found.append(f"{where}: {row['outputs_differing']} answers differ from stock's")
        faults = {kind: n for kind, n in row["faults"].items() if not kind.endswith(": slow")}
        if faults:
            found.append(f"{where}: faults {faults}")
    return found


def report(rows: list[Row]) -> str:
    """All of it, as Markdown."""
    parts: list[str] = []
    for pressure, title in ((True, "Under pressure"), (False, "Where all fits")):
        cell = [row for row in rows if row["pressure"] == pressure]
        if cell:
            parts += [f"\n{title}:\n", *table(cell)]
    for title, recorded in (("recorded", True), ("generated", False)):
        cell = [row for row in rows if row["pressure"] and row["recorded"] == recorded]
        if cell:
            parts += [f"\nAgainst stock under pressure, mean over the {title} workloads:\n", *against_stock(cell)]
    cell = [row for row in rows if not row["pressure"]]
    if cell:
        parts += ["\nAgainst stock where all fits, mean over all workloads:\n", *against_stock(cell)]
    parts += ["", *slower(rows)]
    lines = predictions(rows)
    if lines:
        parts += ["\nHit rate: the replay of the run's own recording against the engine:\n", *lines]
    bad = problems(rows)
    parts += ["", "Answers are the same under every policy, no faults." if not bad else "\n".join(bad)]
    if unchecked := sum(row["outputs_differing"] is None for row in rows):
        parts.append(f"Answers of {unchecked} runs were not compared: stock's are missing, or came in a later part.")
    return "\n".join(parts)


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text())["results"]))
