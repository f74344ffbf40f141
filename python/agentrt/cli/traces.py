"""``agentrt profile``, ``generate`` and ``convert``: traces in, traces out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rich_click as click
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from agentrt import replay as engine
from agentrt._files import check_writable, write_atomically
from agentrt.errors import BadOptionError
from agentrt.replay.summary import HEADROOM_POINTS

__all__ = ["convert", "generate", "profile"]

_POOLS = ("5%", "10%", "25%", "50%", "100%")
#: Below this share of reusable prompt tokens no cache policy matters.
_LITTLE_REUSE = 0.10
#: A learned guess of the next agent has to beat the best fixed guess by this much to be worth a word.
_WORTH_LEARNING = 0.03


def _facts(p: dict[str, Any], kv_bytes_per_token: float, model: str) -> dict[str, str]:
    """What the profile says, one sentence per subject."""
    prompt, reuse, distance, agents = p["prompt_tokens"], p["reuse"], p["reuse_distance"], p["next_agent"]
    live_tokens = p["live_blocks"] * p["block_size"]

    def percent(share: float) -> str:
        return f"{share * 100:.0f} %"

    return {
        "size": f"{p['calls']:,} calls in {p['sessions']:,} sessions ({p['calls_per_session']:.1f} each, at most "
        f"{p['calls_per_session_max']:,}), {p['agents']:,} agents ({p['agents_per_session']:.1f} per session), "
        f"{percent(p['tool_calls'])} of calls run a tool",
        "prompts": f"{prompt['p50']:,} tokens median, {prompt['p90']:,} at the 90th percentile, {prompt['max']:,} at "
        f"most; blocks of {p['block_size']} tokens",
        "live working set": f"{p['live_blocks']:,.0f} blocks for {p['concurrent_sessions']} sessions at a time = "
        f"{live_tokens / 1e6:.2f} M tokens = {live_tokens * kv_bytes_per_token / 1e9:.1f} GB of KV for {model}",
        "reuse": f"{percent(reuse['total'])} of prompt tokens were computed before: {percent(reuse['same_agent'])} by "
        f"the same agent in its session, {percent(reuse['other_agent'])} by another agent of it, "
        f"{percent(reuse['other_sessions'])} by other sessions only",
        "anchors and tails": f"{percent(reuse['anchor_references'])} of prompt blocks belong to several sessions, "
        f"{percent(reuse['tail_references'])} to one",
        "reuse distance": f"{distance['p50']:,} distinct blocks median, {distance['p90']:,} at the 90th percentile, "
        "in file order",
        "next agent": f"commonest {percent(agents['most_frequent'])}, same again {percent(agents['stay'])}, order 1 "
        f"{percent(agents['order_1'])}, order 2 {percent(agents['order_2'])} guessed right; "
        f"R = 1 - H(A'|A)/H(A') = {agents['r']:.2f}",
    }


def _verdict(p: dict[str, Any], results: list[engine.Result]) -> Iterator[str]:
    """What the figures mean for somebody who wonders whether to bother."""
    at_min = {r.capacity: r for r in results if r.policy == "min"}
    with_room = [r for r in at_min.values() if r.headroom * 100 >= HEADROOM_POINTS]
    if p["reuse"]["total"] < _LITTLE_REUSE:
        yield "No. Hardly anything is used twice: no cache policy can help this workload."
        return
    if not with_room:
        yield (
            f"No. At every pool size the engine's own order is within {HEADROOM_POINTS:.0f} points of the optimum: "
            "there is nothing left to gain."
        )
        return
    best = max(with_room, key=lambda r: r.headroom)
    first, last = with_room[0].capacity, with_room[-1].capacity
    where = f"a pool of {first}" if first == last else f"pools from {first} to {last}"
    yield (
        f"Yes, with {where} of the live working set. "
        f"At {best.capacity} LRU hits {best.lru_hit_rate * 100:.0f} %, "
        f"and an optimal order would hit {best.min_hit_rate * 100:.0f} %."
    )
    own = {r.capacity: r for r in results if r.policy == "agentrt"}
    if best.capacity in own:
        mine = own[best.capacity]
        yield f"agentrt, which does not know the future, hits {mine.hit_rate * 100:.0f} % there."
    agents = p["next_agent"]
    trivial = max(agents["stay"], agents["most_frequent"])
    learned = max(agents["order_1"], agents["order_2"])
    if p["agents"] == 1:
        yield "There is one agent: the gain comes from knowing which sessions and which parts of a prompt come back."
    elif learned - trivial >= _WORTH_LEARNING:
        yield (
            f"Who runs next is predictable ({learned * 100:.0f} % right, {trivial * 100:.0f} % by the best "
            "fixed guess): prefetch and batching can use that too."
        )
    else:
        yield (
            f"Who runs next is no better told by order ({learned * 100:.0f} %) than by a fixed guess "
            f"({trivial * 100:.0f} %): expect the gain from content and timing, not from prediction of agents."
        )


def _pool_table(p: dict[str, Any], results: list[engine.Result], kv_bytes_per_token: float) -> Table:
    policies = list(dict.fromkeys(r.policy for r in results))
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("pool", "blocks", "KV GB", *(f"{policy} hit %" for policy in policies), "to gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for capacity in _POOLS:
        row = [r for r in results if r.capacity == capacity]
        blocks = row[0].capacity_blocks
        table.add_row(
            capacity,
            f"{blocks:,}",
            f"{blocks * p['block_size'] * kv_bytes_per_token / 1e9:.1f}",
            *(f"{r.hit_rate * 100:.1f}" for r in row),
            f"{row[0].headroom * 100:+.1f}",
        )
    return table


@click.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--sessions",
    "-n",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    metavar="N",
    help="Concurrent sessions to judge for.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="S", help="Seed of the replay.")
@click.option(
    "--model",
    type=click.Choice(engine.model_names()),
    default=engine.DEFAULT_MODEL,
    show_default=True,
    help="Model whose KV size and latency are used.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures as JSON.")
@click.option("--skip-bad", is_flag=True, help="Leave out unusable lines, count and report them.")
@click.option(
    "--no-shared-system-prefix",
    is_flag=True,
    help="Keep sessions apart that were recorded with the same system prefix.",
)
def profile(
    trace: Path,
    sessions: int,
    seed: int,
    model: str,
    json_path: Path | None,
    skip_bad: bool,
    no_shared_system_prefix: bool,
) -> None:
    """Tell on one screen what a workload looks like, where its hit rate could go, and whether that is worth it.

    \b
    Examples:
      agentrt profile my-trace.jsonl.gz
      agentrt profile my-trace.jsonl.gz --sessions 64 --json profile.json
    """
    if json_path:
        check_writable(json_path)
    console = Console(stderr=True)
    with console.status("reading and replaying"):
        loaded = engine.Trace.read(trace, skip_bad=skip_bad, share_system_prefix=not no_shared_system_prefix)
        figures = loaded.profile(sessions)
        policies = [name for name in ("lru", "agentrt", "min") if name in engine.policy_names()]
        results = engine.run(
            [loaded], policies=policies, capacities=_POOLS, sessions=sessions, seed=seed, model=model
        ).results
    kv_bytes = dict(engine.models())[model]
    out = Console(width=None if sys.stdout.isatty() else 140)
    parts: list[RenderableType] = [Text(loaded.workload, style="bold")]
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, text in _facts(figures, kv_bytes, model).items():
        facts.add_row(name, text)
    if loaded.skipped_lines:
        facts.add_row("left out", f"bad lines: {loaded.skipped_lines}")
    parts += [facts, Text(), _pool_table(figures, list(results), kv_bytes), Text()]
    parts.append(Text("Is it worth it? " + " ".join(_verdict(figures, list(results)))))
    parts.append(Text(f"Next: agentrt replay {trace} --html report.html", style="dim"))
    for part in parts:
        out.print(part)
    if json_path:
        rows = [{"capacity": r.capacity, "blocks": r.capacity_blocks, "policy": r.policy, "hit_rate": r.hit_rate}
                for r in results]  # fmt: skip
        write_atomically(json_path, json.dumps({"version": 1, "profile": figures, "pools": rows}, indent=1) + "\n")


@click.command()
@click.argument("name", required=False)
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE", help="Where to write; .gz compresses.")
@click.option("--sessions", "-n", type=click.IntRange(1), metavar="N", help="Number of sessions; default by workload.")
@click.option("--agents", type=click.IntRange(1), metavar="K", help="Size of the team; default by workload.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, metavar="S", help="Seed of everything drawn."
)
def generate(name: str | None, output: Path | None, sessions: int | None, agents: int | None, seed: int) -> None:
    """Write one of the built-in multi-agent workloads to a file in the agentrt format; list them without NAME.

    \b
    Examples:
      agentrt generate
      agentrt generate pipeline -o pipeline.jsonl.gz
      agentrt generate debate --sessions 500 --seed 7 -o debate.jsonl
    """
    if name is None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("name", style="bold", no_wrap=True)
        table.add_column("sessions", justify="right")
        table.add_column("what it is")
        for known, about, default_sessions in engine.workloads():
            table.add_row(known, f"{default_sessions:,}", about)
        Console(width=None if sys.stdout.isatty() else 140).print(table)
        return
    if output is None:
        raise BadOptionError("--output", "no file named", f"write agentrt generate {name} -o {name}.jsonl.gz")
    check_writable(output)
    made = engine.Trace.generate(name, sessions=sessions, seed=seed, agents=agents)
    made.write(output)
    click.echo(f"{output}: {made.sessions:,} sessions, {made.calls:,} calls, {made.blocks:,} distinct blocks")


@click.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="IN")
@click.argument("target", type=click.Path(path_type=Path), metavar="OUT")
@click.option(
    "--block-size",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="Tokens per block of a Mooncake or Dynamo file; inferred where absent.",
)
@click.option("--skip-bad", is_flag=True, help="Leave out unusable lines, count and report them.")
def convert(source: Path, target: Path, block_size: int | None, skip_bad: bool) -> None:
    """Read a trace (agentrt, Mooncake or Dynamo; plain or gzip) and write it in the agentrt format.

    \b
    Examples:
      agentrt convert conversation_trace.jsonl conversation.jsonl.gz
      agentrt convert requests.jsonl requests.agentrt.jsonl --block-size 512
    """
    check_writable(target)
    trace = engine.Trace.read(source, skip_bad=skip_bad, block_size=block_size)
    trace.write(target)
    skipped = f", bad lines left out: {trace.skipped_lines}" if trace.skipped_lines else ""
    click.echo(f"{target}: {trace.sessions:,} sessions, {trace.calls:,} calls{skipped}")
