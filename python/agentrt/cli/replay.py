"""``agentrt replay``: the instrument."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import rich_click as click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agentrt import replay as engine
from agentrt._files import check_writable, write_atomically
from agentrt.cli.tables import replay_tables
from agentrt.errors import BadOptionError

__all__ = ["replay"]


def _integers(option: str, text: str, least: int) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise BadOptionError(option, f"`{text}` is not a number", "write for example 16, or several: 16,64") from None
    if min(values) < least or max(values) >= 2**63:
        raise BadOptionError(option, f"`{text}` is out of range", f"use numbers from {least}")
    return values


def _policy(name: str) -> engine.PolicyArgument:
    """A built-in name, ``all``-expanded elsewhere, or ``file.py:Class``."""
    file, colon, attribute = name.rpartition(":")
    if not colon:
        return name
    path = Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise BadOptionError("--policy", f"`{file}` is not a Python file", "write path/to/file.py:ClassName")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = getattr(module, attribute)
    except Exception as error:
        problem = f"`{name}` cannot be loaded ({type(error).__name__}: {error})"
        raise BadOptionError("--policy", problem, "fix the file, or name another class in it") from error
    if not callable(made):
        raise BadOptionError("--policy", f"`{name}` is not a class", "name a class that follows ReplayPolicy")
    policy: Callable[[], engine.ReplayPolicy] = made
    return policy


def _policies(text: str) -> list[engine.PolicyArgument]:
    if text == "all":
        return list(engine.policy_names())
    return [_policy(part.strip()) for part in text.split(",") if part.strip()]


@click.command()
@click.argument("traces", nargs=-1, type=click.Path(path_type=Path), metavar="[TRACE]...")
@click.option(
    "--policy",
    "-p",
    default=",".join(engine.DEFAULT_POLICIES),
    show_default=True,
    metavar="A,B,C",
    help="Policies to run: names from `agentrt policies`, `all`, or your own as `file.py:Class`.",
)
@click.option(
    "--capacity",
    "-c",
    default=",".join(engine.DEFAULT_CAPACITIES),
    show_default=True,
    metavar="5%,1500",
    help="Pool sizes: percent of the live working set (sessions x mean distinct blocks of a session), or blocks.",
)
@click.option("--sessions", "-n", default="16", show_default=True, metavar="N", help="Concurrent sessions.")
@click.option(
    "--order",
    type=click.Choice(["closed", "open", "file"]),
    default="closed",
    show_default=True,
    help="closed: N sessions at a time; open: recorded arrivals; file: one call at a time in file order.",
)
@click.option(
    "--seed",
    default="0",
    show_default=True,
    metavar="S",
    help="Seed of session order and drawn times; several as 0,1,2.",
)
@click.option(
    "--model",
    type=click.Choice(engine.model_names()),
    default=engine.DEFAULT_MODEL,
    show_default=True,
    help="Latency model.",
)
@click.option("--host", metavar="4x|BLOCKS", help="Size of a host tier for evicted blocks; none by default.")
@click.option("--host-bandwidth", type=float, metavar="GB/S", help="Host link; by default the latency model's.")
@click.option(
    "--prefetch-bandwidth",
    type=float,
    metavar="GB/S",
    help="Share of the host link that prefetching may use; half by default, 0 switches it off.",
)
@click.option(
    "--strip-identity",
    is_flag=True,
    help="Hide sessions and agents from policies, which infer them from prompts; those that cannot are refused.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the results as JSON.")
@click.option(
    "--html",
    "html_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a self-contained report with plots (needs the extra `report`).",
)
@click.option("--skip-bad", is_flag=True, help="Leave out unusable lines, count and report them.")
@click.option(
    "--no-shared-system-prefix",
    is_flag=True,
    help="Keep sessions apart that were recorded with the same system prefix.",
)
def replay(
    traces: tuple[Path, ...],
    policy: str,
    capacity: str,
    sessions: str,
    order: str,
    seed: str,
    model: str,
    host: str | None,
    host_bandwidth: float | None,
    prefetch_bandwidth: float | None,
    strip_identity: bool,
    json_path: Path | None,
    html_path: Path | None,
    skip_bad: bool,
    no_shared_system_prefix: bool,
) -> None:
    """Replay workloads under cache policies and print hit rate, gap closed and modelled time to first token.

    Without TRACE the five built-in multi-agent workloads are replayed. A trace is a file in the agentrt, Mooncake or
    Dynamo format, plain or gzip. Hit rates count prompt blocks; `gap` is (policy - LRU) / (MIN - LRU), where MIN is
    the offline optimum.

    \b
    Examples:
      agentrt replay
      agentrt replay my-trace.jsonl.gz --capacity 5%,10%,25% --html report.html
      agentrt replay a.jsonl b.jsonl --policy lru,agentrt,min --sessions 64 --seed 0,1,2 --json results.json
      agentrt replay my-trace.jsonl --policy lru,my_policy.py:MyPolicy
      agentrt replay my-trace.jsonl --host 4x --host-bandwidth 25
    """
    if html_path:
        from agentrt import report

        report.check_available()
    for path in (json_path, html_path):
        if path:
            check_writable(path)
    if strip_identity and policy == ",".join(engine.DEFAULT_POLICIES):
        policy = ",".join(engine.DEFAULT_STRIPPED_POLICIES)
    policies = _policies(policy)
    session_counts = _integers("--sessions", sessions, 1)
    seeds = _integers("--seed", seed, 0)

    console = Console(stderr=True)
    if traces:
        loaded = []
        with console.status("") as status:
            for trace_path in traces:
                status.update(f"reading {trace_path}")
                loaded.append(
                    engine.Trace.read(trace_path, skip_bad=skip_bad, share_system_prefix=not no_shared_system_prefix)
                )
        for trace_path, trace in zip(traces, loaded, strict=True):
            if trace.skipped_lines:
                click.echo(f"{trace_path}: bad lines left out: {trace.skipped_lines}", err=True)
    else:
        loaded = engine.five_workloads()

    columns = (
        TextColumn("replaying"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("calls"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("replay", total=None)
        result = engine.run(
            loaded,
            policies=policies,
            capacities=capacity.split(","),
            order=order,
            sessions=session_counts,
            seed=seeds,
            model=model,
            host=host,
            host_bandwidth=host_bandwidth,
            prefetch_bandwidth=prefetch_bandwidth,
            strip_identity=strip_identity,
            progress=lambda done, total: bar.update(task, completed=done, total=total or None),
        )

    out = Console(width=None if sys.stdout.isatty() else 140)
    for part in replay_tables(result, out.width, engine.predictability(loaded)):
        out.print(part)
    command = shlex.join(["agentrt", *sys.argv[1:]])
    if json_path:
        write_atomically(json_path, result.to_json())
        click.echo(f"results: {json_path}", err=True)
    if html_path:
        from agentrt import report

        write_atomically(html_path, report.render_html(result, command=command))
        click.echo(f"report: {html_path.absolute()}", err=True)
