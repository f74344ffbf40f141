"""What memo, speculation and cache scopes are worth: `python benches/py/tools_study.py memo|speculation|scopes`.

Everything is seeded and runs on a virtual clock, so the figures are the same on every machine. The recorded workloads
(block ids, agents and tool names; no arguments) are read from $AGENTRT_TRACES, by default ../shared/traces.

* `memo` - the recorded tool sequences of two workloads with generated arguments; how many executions a memo saves,
  against a time-to-live cache without invalidation and against an oracle that knows the state.
* `speculation` - generated sequences of a given predictability R; task time with and without running ahead.
* `scopes` - recorded prompts with seeded trust domains and taint; prefix-cache hit rates under no isolation, agentrt's
  scopes, one salt per request, and full isolation.
"""

from __future__ import annotations

import asyncio
import collections
import gzip
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agentrt.tools import Memo, MemoryStore, Scope, Speculator, ToolRuntime, scope

TRACES = Path(os.environ.get("AGENTRT_TRACES", Path(__file__).parents[2] / ".." / "shared" / "traces"))


def calls(workload: str) -> Iterator[dict[str, Any]]:
    with gzip.open(TRACES / f"{workload}.jsonl.gz", "rt") as lines:
        for line in lines:
            yield json.loads(line)


# Memo -----------------------------------------------------------------------------------------------------------------

# What the recorded tools do to state; the names are the sources' own.
WRITES = {
    "taubench_airline": {
        "update_reservation_flights": "reservation",
        "update_reservation_baggages": "reservation",
        "update_reservation_passengers": "reservation",
        "cancel_reservation": "reservation",
        "book_reservation": "reservation",
        "send_certificate": "user",
    },
    "hyperagent": {"editor_file": "file", "terminal": "*"},
}
READS = {
    "taubench_airline": {
        "get_reservation_details": "reservation",
        "get_user_details": "user",
        "search_direct_flight": "flight",
        "search_onestop_flight": "flight",
        "list_all_airports": "airport",
        "calculate": None,
    },
    "hyperagent": {
        "open_file": "file",
        "code_search": "*",
        "get_folder_structure": "*",
        "get_all_symbols": "file",
        "Semantic Code Search": "*",
        "go_to_definition": "*",
        "find_all_references": "*",
    },
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def tool_steps(workload: str) -> list[list[str]]:
    sessions: dict[str, list[str]] = {}
    for call in calls(workload):
        if call["tool_name"]:
            sessions.setdefault(call["session_id"], []).append(call["tool_name"])
    known = READS[workload].keys() | WRITES[workload].keys()
    return [[t for t in tools if t in known] for tools in sessions.values()]


def memo_run(workload: str, repeat: float, seed: int, concurrent: int = 8) -> dict[str, float]:
    """One pass over all sessions, `concurrent` at a time; each call repeats an earlier subject with P = `repeat`."""
    rng = random.Random(seed)
    clock = Clock()
    memo = Memo(MemoryStore(clock=clock), verify_rate=0.0)
    runtime = ToolRuntime(memo=memo)
    versions: collections.Counter[str] = collections.Counter()
    subjects: list[int] = []
    spent = [0.0]
    reads_at: dict[str, Callable[..., Any]] = {}
    writes_at: dict[str, Callable[..., Any]] = {}

    def state(kind: str | None, subject: int) -> str:
        if kind is None:
            return "constant"
        if kind == "*":
            return str(sum(versions.values()))
        return f"{versions['*']}.{versions[f'{kind}/{subject}']}"

    for name, kind in READS[workload].items():

        def read(subject: int, name: str = name, kind: str | None = kind) -> str:
            seconds = random.Random(f"{name}:{subject}").lognormvariate(0.0, 0.8)
            clock.now += seconds
            spent[0] += seconds
            return state(kind, subject)

        resources = [] if kind is None else ["*"] if kind == "*" else [kind + "/{subject}"]
        reads_at[name] = runtime.wrap(read, name=name, version="1", reads=resources, writes=())
    for name, kind in WRITES[workload].items():

        def write(subject: int, kind: str = kind) -> None:
            versions["*" if kind == "*" else f"{kind}/{subject}"] += 1

        writes_at[name] = runtime.wrap(write, name=name, writes=["*"] if kind == "*" else [kind + "/{subject}"])

    waiting = [iter(steps) for steps in tool_steps(workload)]
    rng.shuffle(waiting)
    active = [waiting.pop() for _ in range(min(concurrent, len(waiting)))]
    asked = hits = stale = ttl_hits = ttl_stale = oracle = 0
    total_s = 0.0
    ttl_cache: dict[tuple[str, int], tuple[float, str]] = {}
    known: dict[tuple[str, int], str] = {}
    while active:
        n = rng.randrange(len(active))
        name = next(active[n], None)
        if name is None:
            if waiting:
                active[n] = waiting.pop()
            else:
                del active[n]
            continue
        clock.now += rng.lognormvariate(1.0, 0.5) / concurrent
        subject = rng.choice(subjects) if subjects and rng.random() < repeat else len(subjects)
        subjects.append(subject)
        if name in writes_at:
            writes_at[name](subject)
            continue
        kind = READS[workload][name]
        truth = state(kind, subject)
        asked += 1
        total_s += random.Random(f"{name}:{subject}").lognormvariate(0.0, 0.8)
        oracle += known.get((name, subject)) == truth
        known[name, subject] = truth
        kept = ttl_cache.get((name, subject))
        if kept is not None and clock.now - kept[0] < 300.0:
            ttl_hits += 1
            ttl_stale += kept[1] != truth
        else:
            ttl_cache[name, subject] = (clock.now, truth)
        before = memo.stats.hits
        answer = reads_at[name](subject)
        hits += memo.stats.hits - before
        stale += answer != truth
    return {
        "calls": asked,
        "hit": hits / asked,
        "oracle": oracle / asked,
        "saved": 1.0 - spent[0] / total_s,
        "stale": stale,
        "ttl hit": ttl_hits / asked,
        "ttl stale": ttl_stale / asked,
    }


def memo_table() -> None:
    print(
        "share of read calls, mean of 5 seeds; tool times lognormal (median 1 s); TTL cache: 300 s, no invalidation\n"
    )
    print("| workload | repeat | read calls | hits | oracle | tool seconds saved | stale | TTL hits | TTL stale |")
    print("|---|---|---|---|---|---|---|---|---|")
    for workload in WRITES:
        for repeat in (0.2, 0.4, 0.7):
            runs = [memo_run(workload, repeat, seed) for seed in range(5)]
            mean = {k: statistics.fmean(r[k] for r in runs) for k in runs[0]}
            print(
                f"| {workload} | {repeat} | {mean['calls']:.0f} | {mean['hit']:.1%} | {mean['oracle']:.1%} |"
                f" {mean['saved']:.1%} | {sum(r['stale'] for r in runs):.0f} | {mean['ttl hit']:.1%} |"
                f" {mean['ttl stale']:.1%} |"
            )


# Speculation ----------------------------------------------------------------------------------------------------------


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose sleeps take no time: when nothing is ready, the clock jumps to the next timer."""

    def __init__(self) -> None:
        self.virtual_s = 0.0
        super().__init__()

    def time(self) -> float:
        return self.virtual_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.virtual_s = max(self.virtual_s, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


TOOL_NAMES = ("search", "open", "list", "stat", "parse", "query")


def chain(peak: float, rng: random.Random) -> list[list[float]]:
    """Rows of a transition matrix: one successor with `peak`, the rest even, over a permutation of the tools."""
    n = len(TOOL_NAMES)
    order = rng.sample(range(n), n)
    rows = [[(1.0 - peak) / (n - 1)] * n for _ in range(n)]
    for i, tool in enumerate(order):
        rows[tool][order[(i + 1) % n]] = peak
    return rows


def predictability(rows: list[list[float]]) -> float:
    """R = 1 - H(next | last) / H(next); the stationary distribution of these chains is uniform."""
    h = statistics.fmean(-sum(p * math.log2(p) for p in row if p > 0) for row in rows)
    return 1.0 - h / math.log2(len(rows))


def speculation_run(
    peak: float, known_arguments: float, seed: int, ahead: bool, sessions: int = 40
) -> dict[str, float]:
    rng = random.Random(f"{peak}:{known_arguments}:{seed}")
    rows = chain(peak, rng)
    loop = VirtualLoop()
    executed = [0]
    memo = Memo(MemoryStore(clock=loop.time), verify_rate=0.0)
    speculator = Speculator()
    runtime = ToolRuntime(memo=memo, speculation=speculator if ahead else False)
    tools: dict[str, Callable[..., Any]] = {}
    for name in TOOL_NAMES:

        async def run(key: str, name: str = name) -> dict[str, Any]:
            executed[0] += 1
            await asyncio.sleep(random.Random(f"{seed}:{name}:{key}").lognormvariate(math.log(1.5), 0.6))
            return {"next": f"{key}+{name}", "items": [1, 2, 3]}

        tools[name] = runtime.wrap(run, name=name, version="1", reads=(), writes=(), cache=False)

    async def session(n: int) -> float:
        began = loop.time()
        with scope(session=f"s{n}", agent="agent") as here:
            tool, key = rng.randrange(len(TOOL_NAMES)), f"task{n}"
            for step in range(12):
                result = await tools[TOOL_NAMES[tool]](key)
                await asyncio.sleep(rng.lognormvariate(math.log(2.0), 0.5))
                tool = rng.choices(range(len(TOOL_NAMES)), rows[tool])[0]
                key = result["next"] if rng.random() < known_arguments else f"{n}.{step}.{rng.random()}"
            runtime.end_session(Scope(here.session, here.agent, here.domain))
        return loop.time() - began

    async def main() -> float:
        # One after the other, so that both runs draw the same sessions.
        return statistics.fmean([await session(n) for n in range(sessions)])

    wall = time.perf_counter()
    asyncio.set_event_loop(loop)
    try:
        task_s = loop.run_until_complete(main())
        runtime.close()
        loop.run_until_complete(asyncio.sleep(0))
    finally:
        loop.close()
    stats = speculator.stats
    return {
        "task": task_s,
        "executed": executed[0] / (sessions * 12),
        "R": predictability(rows),
        "used": stats.committed / max(1, stats.launched),
        "cpu_us": (time.perf_counter() - wall) / (sessions * 12) * 1e6,
    }


def speculation_table() -> None:
    print("12 calls a task, 40 tasks, 5 seeds; think time lognormal (median 2 s), tool time lognormal (median 1.5 s);")
    print("arguments: copied from the last result with the given probability, else unforeseeable; no memo\n")
    print(
        "| R | arguments known | task time, s | with speculation, s | saved (95 %) | executions | used | CPU per call |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for peak, known in [
        (0.95, 1.0),
        (0.9, 0.9),
        (0.8, 0.9),
        (0.8, 0.6),
        (0.6, 0.9),
        (0.5, 0.9),
        (0.35, 0.9),
        (0.17, 0.9),
    ]:
        pairs = [(speculation_run(peak, known, s, False), speculation_run(peak, known, s, True)) for s in range(5)]
        saved = [1.0 - b["task"] / a["task"] for a, b in pairs]
        spread = 2.776 * statistics.stdev(saved) / math.sqrt(len(saved))
        off = statistics.fmean(a["task"] for a, _ in pairs)
        on = statistics.fmean(b["task"] for _, b in pairs)
        extra = statistics.fmean(b["executed"] for _, b in pairs)
        used = statistics.fmean(b["used"] for _, b in pairs)
        cost = statistics.fmean(b["cpu_us"] - a["cpu_us"] for a, b in pairs)
        print(
            f"| {pairs[0][0]['R']:.2f} | {known:.0%} | {off:.1f} | {on:.1f} |"
            f" {statistics.fmean(saved):.1%} ± {spread:.1%} | {extra:.2f}x | {used:.0%} | {cost:.0f} us |"
        )


# Cache scopes ---------------------------------------------------------------------------------------------------------

DOMAINS = 4
CONCURRENT = 16
# Every n-th session of the long workloads, to keep the study to minutes.
STRIDE = {"claude_code_main": 10, "claude_code_sub": 2}
SCOPES_WORKLOADS = (
    "autokaggle",
    "whowhen_magentic",
    "whowhen_ag2",
    "marble_research",
    "hyperagent",
    "taubench_airline",
    "claude_code_sub",
    "claude_code_main",
    "mooncake_conversation",
)
UNTAINTED = 1 << 60
MODES = ("none", "agentrt", "request salt", "per domain", "per session")


def expand(runs: list[list[int]] | None) -> list[int]:
    return [i for first, n in (runs or []) for i in range(first, first + n)]


class Prompts:
    """Recorded prompts with zones: for each call its blocks and where domain and session zones begin."""

    def __init__(self, workload: str, seed: int) -> None:
        rng = random.Random(f"{workload}:{seed}")
        records = list(calls(workload))
        names = list(dict.fromkeys(r["session_id"] for r in records))[:: STRIDE.get(workload, 1)]
        chosen = {name: n for n, name in enumerate(names)}
        records = [r for r in records if r["session_id"] in chosen]
        self.domain = [rng.randrange(DOMAINS) for _ in names]
        tools = sorted({r["tool_name"] for r in records if r["tool_name"] and r["tool_name"] != "?"})
        untrusted = set(rng.sample(tools, (len(tools) + 1) // 2))
        aliases: dict[tuple[str, int], int] = {}
        self.sessions: list[list[tuple[list[int], int, int, int, int]]] = [[] for _ in names]
        blocks_of: list[tuple[int, dict[str, Any], list[int], list[int]]] = []
        sharers: dict[int, set[int]] = collections.defaultdict(set)
        for record in records:
            session = chosen[record["session_id"]]
            blocks, output = expand(record["blocks"]), expand(record["out_blocks"])
            if record.get("sys_key"):
                # Sessions with equal tool and system prompts share that prefix; the ids of the source do not say so.
                shared = min(record["sys_blocks"] or 0, len(blocks))
                for i in range(shared):
                    blocks[i] = aliases.setdefault((record["sys_key"], i), -1 - len(aliases))
            for block in blocks:
                sharers[block].add(session)
            blocks_of.append((session, record, blocks, output))
        # Operator text: what more than a tenth of the sessions (at least 3) begin with.
        enough = max(3, len(names) // 10)
        public = {block for block, who in sharers.items() if len(who) >= enough}
        seen: list[set[int]] = [set() for _ in names]
        tainted = [False] * len(names)
        self.block_size = records[0]["block_size"]
        for session, record, blocks, output in blocks_of:
            domain_from = next((i for i, b in enumerate(blocks) if b not in public), len(blocks))
            session_from = UNTAINTED
            if tainted[session]:
                fresh = (i for i, b in enumerate(blocks) if b not in seen[session] and b not in public)
                session_from = next(fresh, len(blocks))
            else:
                seen[session].update(blocks, output)
            self.sessions[session].append(
                (blocks + output, len(blocks), domain_from, session_from, record["prompt_tokens"])
            )
            tool = record["tool_name"]
            named = tool in untrusted if tools else rng.random() < 0.3
            tainted[session] = tainted[session] or (named if tool != "?" else rng.random() < 0.3)
        self.distinct = len(sharers)


def keys(
    mode: str, prompts: Prompts, session: int, call: tuple[list[int], int, int, int, int]
) -> list[tuple[int, int]]:
    blocks, n_prompt, domain_from, session_from, _ = call
    domain, own = 1 + prompts.domain[session], 1 + DOMAINS + session
    if mode == "none":
        return [(b, 0) for b in blocks]
    if mode == "per domain":
        return [(b, domain) for b in blocks]
    if mode == "per session":
        return [(b, own) for b in blocks]
    if mode == "request salt":
        salt = own if session_from < n_prompt else domain if domain_from < n_prompt else 0
        return [(b, salt) for b in blocks]
    # Decoded text belongs to the zone its prompt ends in, and to the domain at least.
    return [
        (b, own if i >= session_from else domain if i >= min(domain_from, n_prompt) else 0)
        for i, b in enumerate(blocks)
    ]


def hit_rate(mode: str, prompts: Prompts, capacity: int, seed: int) -> float:
    """Token hit rate of a prefix cache with LRU replacement, leaves first; `CONCURRENT` sessions in closed loop."""
    rng = random.Random(seed)
    cache: collections.OrderedDict[tuple[int, int], None] = collections.OrderedDict()
    waiting = list(range(len(prompts.sessions)))[::-1]
    active = [(s, 0) for s in (waiting.pop() for _ in range(min(CONCURRENT, len(waiting))))]
    cached = total = 0
    while active:
        n = rng.randrange(len(active))
        session, step = active[n]
        if step == len(prompts.sessions[session]):
            if waiting:
                active[n] = (waiting.pop(), 0)
            else:
                del active[n]
            continue
        active[n] = (session, step + 1)
        call = prompts.sessions[session][step]
        chain_keys = keys(mode, prompts, session, call)
        leading = 0
        for key in chain_keys[: call[1]]:
            if key not in cache:
                break
            leading += 1
        cached += leading * prompts.block_size
        total += call[4]
        for key in reversed(chain_keys):
            if key in cache:
                cache.move_to_end(key)
            else:
                cache[key] = None
        while len(cache) > capacity:
            cache.popitem(last=False)
    return cached / total


def live_blocks(prompts: Prompts) -> float:
    return CONCURRENT * statistics.fmean(len({b for call in s for b in call[0]}) for s in prompts.sessions)


def scopes_table(workloads: tuple[str, ...] = SCOPES_WORKLOADS, seeds: int = 2) -> None:
    print(f"prompt-token hit rate, %, mean of {seeds} seeds; {DOMAINS} trust domains; half the tools untrusted;")
    print("infinite cache / LRU at 25 % of the live blocks of 16 sessions\n")
    print("| workload | tainted tokens | " + " | ".join(MODES) + " | isolation cost avoided |")
    print("|---" * (len(MODES) + 3) + "|")
    for workload in workloads:
        rows: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
        taint: list[float] = []
        for seed in range(seeds):
            prompts = Prompts(workload, seed)
            everything = [call for session in prompts.sessions for call in session]
            taint.append(sum(c[1] - min(c[3], c[1]) for c in everything) / sum(c[1] for c in everything))
            capacity = int(live_blocks(prompts) / 4)
            for mode in MODES:
                rows[mode].append((hit_rate(mode, prompts, 1 << 60, seed), hit_rate(mode, prompts, capacity, seed)))
        mean = {mode: [100 * statistics.fmean(r[i] for r in rows[mode]) for i in (0, 1)] for mode in MODES}
        cells = " | ".join(f"{mean[m][0]:.1f} / {mean[m][1]:.1f}" for m in MODES)
        avoided = []
        for i in (0, 1):
            cost = mean["none"][i] - mean["per session"][i]
            avoided.append(f"{(mean['agentrt'][i] - mean['per session'][i]) / cost:.0%}" if cost > 0.5 else "-")
        print(f"| {workload} | {100 * statistics.fmean(taint):.0f} % | {cells} | {' / '.join(avoided)} |", flush=True)


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["memo", "speculation", "scopes"]
    for study in chosen:
        {"memo": memo_table, "speculation": speculation_table, "scopes": scopes_table}[study]()
        print()
