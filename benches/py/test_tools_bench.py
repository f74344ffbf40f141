"""What a tool call through agentrt costs: `pytest benches/py/test_tools_bench.py --benchmark-only`.

Each case first checks that the answer is right. Bars: hit 30 us and miss 50 us in memory, hit 300 us from SQLite, a
decision 5 us at 1,000 rules.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentrt._core import ToolRules
from agentrt.safety import AuditLog, Guard
from agentrt.tools import Memo, MemoryStore, Scope, Speculator, ToolRuntime
from agentrt.tools.canonical import digest
from agentrt.tools.spec import ToolSpec
from agentrt.tools.sqlite_store import SqliteStore

Benchmark = Any


def lookup(user_id: int, fields: tuple[str, ...] = ("name",), detail: bool = False) -> dict[str, Any]:
    return {"id": user_id, "name": "Ada", "tags": ["a", "b"], "fields": list(fields), "detail": detail}


def declared(runtime: ToolRuntime) -> Callable[..., Any]:
    return runtime.wrap(lookup, version="1", reads=["db/users/{user_id}"], writes=())


def in_memory(**options: Any) -> ToolRuntime:
    return ToolRuntime(memo=Memo(MemoryStore(), verify_rate=0.0), **options)


def test_plain_call(benchmark: Benchmark) -> None:
    assert benchmark(lookup, 7, detail=True)["id"] == 7


def test_hit_in_memory(benchmark: Benchmark) -> None:
    runtime = in_memory()
    tool = declared(runtime)
    assert tool(7, detail=True) == lookup(7, detail=True)
    assert benchmark(tool, 7, detail=True) == lookup(7, detail=True)
    assert runtime.memo.stats.executed == 1


def test_miss_in_memory(benchmark: Benchmark) -> None:
    runtime = in_memory()
    tool = declared(runtime)
    ids = itertools.count()
    assert benchmark(lambda: tool(next(ids), detail=True))["name"] == "Ada"
    assert runtime.memo.stats.hits == 0


def test_write_in_memory(benchmark: Benchmark) -> None:
    runtime = in_memory()
    ids = itertools.count()
    write = runtime.wrap(lambda key: None, name="put", reads=(), writes=["db/users/{key}"])
    benchmark(lambda: write(next(ids) % 1000))


def test_hit_from_sqlite(benchmark: Benchmark, tmp_path: Path) -> None:
    runtime = ToolRuntime(memo=Memo(SqliteStore(tmp_path / "s.sqlite"), verify_rate=0.0))
    tool = declared(runtime)
    tool(7, detail=True)
    assert benchmark(tool, 7, detail=True) == lookup(7, detail=True)
    assert runtime.memo.stats.executed == 1


def test_miss_to_sqlite(benchmark: Benchmark, tmp_path: Path) -> None:
    runtime = ToolRuntime(memo=Memo(SqliteStore(tmp_path / "s.sqlite"), verify_rate=0.0))
    tool = declared(runtime)
    ids = itertools.count()
    benchmark(lambda: tool(next(ids), detail=True))


def test_canonical_key(benchmark: Benchmark) -> None:
    arguments = {"user_id": 7, "fields": ["name", "mail"], "detail": True, "filter": {"a": 1, "b": [1, 2]}}
    assert len(benchmark(digest, arguments)) == 24


def test_speculation_per_call(benchmark: Benchmark) -> None:
    """What learning and predicting add to a call: a steady three-tool cycle, nothing is launched."""
    speculator = Speculator(max_in_flight=0)
    here = Scope()
    specs = [ToolSpec.of(lookup, name=name, version="1", reads=(), writes=()) for name in "abc"]
    calls = itertools.cycle([spec.bind((n,), {}, here) for n, spec in enumerate(specs)])
    now = itertools.count()

    def step() -> None:
        call = next(calls)
        speculator.called(call, float(next(now)))
        speculator.returned(call, {"id": 1, "hits": [1, 2, 3]}, 1.0, float(next(now)), True)
        speculator.predict(here)

    benchmark(step)


# Decisions at 1,000 rules ---------------------------------------------------------------------------------------------


def policy_text(tools: list[str], rules: list[str]) -> str:
    return "version = 1\n" + "".join(f"[tools.{t}]\nprivileged = false\n" for t in tools) + "".join(rules)


def rule(n: int, tool: str, more: str, effect: str = "deny") -> str:
    return f'[[rules]]\nid = "r{n}"\neffect = "{effect}"\ntools = ["{tool}"]\n{more}\n'


TOOLS = [f"tool_{n}" for n in range(100)]
ONE = ["tool_0"]
ARGUMENTS = {"path": "/srv/data/reports/2026/summary.txt", "mode": "r", "limit": 100}
LAST = [rule(999, "tool_0", 'args.path.path = "/srv/data/**"', "allow")]
CASES = {
    "100 tools, 10 rules each": policy_text(
        TOOLS, [rule(n, TOOLS[n % 100], f'args.path.path = "/etc/{n}/**"') for n in range(999)] + LAST
    ),
    "one tool, 1,000 paths": policy_text(
        ONE, [rule(n, "tool_0", f'args.path.path = "/etc/{n}/**"') for n in range(999)] + LAST
    ),
    "one tool, 1,000 regular expressions": policy_text(
        ONE, [rule(n, "tool_0", f"args.path.regex = 'secret{n}[0-9]+x'") for n in range(999)] + LAST
    ),
    "one tool, 1,000 agents": policy_text(
        ONE, [rule(n, "tool_0", f'agents = ["agent-{n}"]') for n in range(999)] + LAST
    ),
    "one tool, 1,000 labels and sessions": policy_text(
        ONE,
        [rule(n, "tool_0", f'sessions = ["run-{n}-*"]\nlabels.any = ["label{n % 60}"]') for n in range(999)] + LAST,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_decide_at_1000_rules(benchmark: Benchmark, case: str) -> None:
    rules = ToolRules(CASES[case])
    decided = benchmark(rules.decide, "tool_0", "planner", "s1", ("web",), ARGUMENTS)
    assert decided == ("allow", 999, "rule")


def test_decide_disguised_argument(benchmark: Benchmark) -> None:
    rules = ToolRules(CASES["100 tools, 10 rules each"])
    arguments = {"path": "%2fetc%2f100%2f\u0440asswd", "options": '{"path": "/x"}'}
    assert benchmark(rules.decide, "tool_0", "planner", "s1", (), arguments)[:2] == ("deny", 100)


def guarded(tmp_path: Path, audit: bool) -> ToolRuntime:
    path = tmp_path / "p.toml"
    path.write_text(CASES["100 tools, 10 rules each"])
    guard = Guard(path, audit=AuditLog(tmp_path / "a.jsonl") if audit else None)
    return in_memory(guard=guard)


@pytest.mark.parametrize("audit", [False, True], ids=["no audit", "audit"])
def test_guarded_hit(benchmark: Benchmark, tmp_path: Path, audit: bool) -> None:
    runtime = guarded(tmp_path, audit)
    tool = runtime.wrap(lambda path: path, name="tool_0", version="1", reads=(), writes=())
    tool("/srv/data/x")
    assert benchmark(tool, "/srv/data/x") == "/srv/data/x"
