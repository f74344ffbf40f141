"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from agentrt.replay import Replay
from agentrt.replay.summary import HEADROOM_POINTS, MeanResult, Prediction, average_seeds, parts, prediction, summarise

__all__ = ["replay_tables"]

_COLUMNS_OF_A_CAPACITY = 24


def _percent(rate: float) -> str:
    return f"{rate * 100:.1f}"


def _gap(gap: float | None) -> str:
    return "-" if gap is None else f"{gap:.2f}"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}"


def _style(policy: str) -> str:
    return {"agentrt": "bold green", "lru": "yellow", "min": "dim"}.get(policy, "")


def _wide(cells: list[MeanResult], capacities: list[str], title: str) -> Table:
    """One row per workload and policy, the capacities side by side."""
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("workload", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for capacity in capacities:
        table.add_column(f"{capacity}\nhit %", justify="right", no_wrap=True)
        table.add_column("\ngap", justify="right", no_wrap=True)
        table.add_column("TTFT\nms", justify="right", no_wrap=True)
    rows: dict[tuple[str, str], dict[str, MeanResult]] = {}
    for cell in cells:
        rows.setdefault((cell.workload, cell.policy), {})[cell.capacity] = cell
    last = None
    for (workload, policy), by_capacity in rows.items():
        if last not in (None, workload):
            table.add_section()
        values = [workload if workload != last else "", policy]
        for capacity in capacities:
            cell = by_capacity[capacity]
            values += [_percent(cell.hit_rate), _gap(cell.gap_closed), _ms(cell.ttft_mean_ms)]
        table.add_row(*values, style=_style(policy))
        last = workload
    return table


def _long(cells: list[MeanResult], title: str) -> Table:
    """One row per workload, capacity and policy: fits a narrow terminal."""
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    for name in ("workload", "pool", "policy"):
        table.add_column(name, no_wrap=True)
    for name in ("hit %", "gap", "TTFT ms"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for cell in sorted(cells, key=lambda c: [x.workload for x in cells].index(c.workload)):
        key = (cell.workload, cell.capacity)
        if last is not None and last != key:
            table.add_section()
        first = last != key
        table.add_row(
            cell.workload if first else "",
            cell.capacity if first else "",
            cell.policy,
            _percent(cell.hit_rate),
            _gap(cell.gap_closed),
            _ms(cell.ttft_mean_ms),
            style=_style(cell.policy),
        )
        last = key
    return table


def _summary(replay: Replay) -> Table:
    table = Table(
        title=f"Mean over the cells in which MIN is at least {HEADROOM_POINTS:.0f} points above LRU",
        title_justify="left",
        header_style="bold",
        pad_edge=False,
    )
    several_sessions = len({r.sessions for r in replay.results}) > 1
    table.add_column("policy", no_wrap=True)
    if several_sessions:
        table.add_column("sessions", justify="right")
    if len(replay.seeds) > 1:
        table.add_column("seed", justify="right")
    for name in ("cells", "gap closed", "hit points\nover LRU", "mean TTFT\nvs LRU", "worst cell\nvs LRU"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("where", no_wrap=True)
    for s in summarise(replay):
        row = [s.policy]
        if several_sessions:
            row.append(str(s.sessions))
        if len(replay.seeds) > 1:
            row.append(str(s.seed))
        row += [
            f"{s.cells} of {s.all_cells}",
            _gap(s.gap_closed),
            "-" if s.lift_points is None else f"{s.lift_points:+.1f}",
            "-" if s.ttft_change is None else f"{s.ttft_change * 100:+.0f} %",
            f"{s.worst_points:+.1f}",
            s.worst_cell if s.loses else "",
        ]
        table.add_row(*row, style=_style(s.policy))
    return table


def _parts(replay: Replay) -> Table:
    table = Table(title="What each part is worth", title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for name in ("sessions", "gap closed", "by seed", "worst cell\nvs LRU", "gain lost\nvs agentrt"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in parts(replay):
        table.add_row(
            part.policy,
            str(part.sessions),
            f"{part.gap_closed:.3f}",
            ", ".join(f"{gap:.3f}" for gap in part.by_seed),
            f"{part.worst_points:+.1f}",
            f"{part.lost * 100:.0f} %" if part.policy != "agentrt" else "",
            style=_style(part.policy),
        )
    return table


def _prediction(rows: list[Prediction]) -> Table:
    table = Table(
        title="What foreseeing the next agent is worth, by how predictable it is: R = 1 - H(next | last) / H(next)",
        title_justify="left",
        header_style="bold",
        pad_edge=False,
    )
    table.add_column("workload", no_wrap=True)
    for name in ("sessions", "R", "cells", "gap closed", "without", "gain lost"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            str(row.sessions),
            "" if row.r is None else f"{row.r:.2f}",
            str(row.cells),
            f"{row.with_it:.3f}",
            f"{row.without:.3f}",
            f"{row.lost * 100:.0f} %",
            style="bold" if row.r is None else "",
        )
    return table


def replay_tables(replay: Replay, width: int, predictability: dict[str, float]) -> Iterator[RenderableType]:
    """The tables of a replay for a terminal of ``width`` columns, then what needs saying beside them.

    ``predictability`` is R: how predictable the next agent of each workload is.
    """
    means = average_seeds(replay)
    for sessions in dict.fromkeys(m.sessions for m in means):
        cells = [m for m in means if m.sessions == sessions]
        capacities = list(dict.fromkeys(c.capacity for c in cells))
        seeds = ", ".join(map(str, replay.seeds))
        title = f"{replay.order} order, {sessions} sessions, seed {seeds}" + (
            " (means)" if len(replay.seeds) > 1 else ""
        )
        names = max(len(c.workload) for c in cells) + max(len(c.policy) for c in cells) + 8
        wide = names + len(capacities) * _COLUMNS_OF_A_CAPACITY <= width
        yield _wide(cells, capacities, title) if wide else _long(cells, title)
    yield _summary(replay)
    if parts(replay):
        yield _parts(replay)
    if rows := prediction(replay, predictability):
        yield _prediction(rows)
    yield Text(
        "hit %: leading prompt blocks found in the pool. gap: share of the way from LRU to the optimum MIN. "
        f"TTFT: modelled for {replay.model}.",
        style="dim",
    )
    bypassed = {}
    for r in replay.results:
        if r.bypassed_calls:
            bypassed[r.workload, r.capacity] = r.bypassed_calls
    for (workload, capacity), calls in bypassed.items():
        yield Text(f"{workload} at {capacity}: calls larger than the pool, not counted: {calls}", style="dim")
    for policy, victims in replay.invalid_victims.items():
        if victims:
            yield Text(f"{policy}: victims that could not go (in use, absent or with children), skipped: {victims}")
