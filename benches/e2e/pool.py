"""Prefix hits of recorded workloads in vLLM's real cache manager, without a model: seconds instead of minutes.

Sessions run in a closed loop: a call is admitted when its blocks fit, decodes a block at a time, and its session calls
again after a drawn pause. The clock is simulated, so a run is repeatable to the block.

Recorded workloads have no words; in generated ones (``--generated``) prompts quote the answers they contain, so that
agents of a run can be linked by them. ``by blocks``: the same calls with prompts that quote nothing.

``--large``: whole traces, 48 sessions at a time, in pools large enough for the thread that names victims ahead, and
``at once``, the same without it.

    python benches/e2e/pool.py
"""

from __future__ import annotations

import argparse
import heapq
import logging
import os
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.engines.vllm.pool import BLOCK, Call, Engine, read_calls  # noqa: E402

from agentrt.replay import Trace  # noqa: E402

WORKLOADS = {"whowhen_magentic": 3000, "marble_research": 3000, "taubench_airline": 1500}
GENERATED = {"pipeline": 1500, "debate": 1500, "selector_chat": 3000, "research_tree": 1500, "coding_team": 3000}
LARGE = {"whowhen_magentic": 12_000, "marble_research": 12_000}
#: Policy, whether requests name themselves, whether prompts quote.
KINDS: dict[str, tuple[str | None, bool, bool]] = {
    "stock": (None, True, True),
    "neutral": ("lru", True, True),
    "agentrt": ("agentrt", True, True),
    "inferred": ("agentrt", False, True),
    "by blocks": ("agentrt", False, False),
}


def closed_loop(calls: list[Call], engine: Engine, blocks: int, concurrency: int, seed: int) -> None:
    """Runs all sessions, so many at a time."""
    sessions: dict[str, list[Call]] = {}
    for call in calls:
        # What could not run alone is left out.
        if len(call.prompt) + len(call.output) + 2 <= blocks:
            sessions.setdefault(call.session, []).append(call)
    rng = random.Random(seed)
    order = list(sessions)
    rng.shuffle(order)
    upcoming = iter(order)
    events: list[tuple[float, int, Any]] = []
    number = 0

    def at(time_s: float, what: Any) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (time_s, number, what))

    def call_next(time_s: float, session: str | None, step: int) -> None:
        if session is None or step == len(sessions[session]):
            session, step = next(upcoming, None), 0
        if session is not None:
            at(time_s + (rng.lognormvariate(0.5, 1.0) if step else rng.random()), (session, step, None))

    for _ in range(concurrency):
        call_next(0.0, None, 0)
    waiting: list[tuple[Any, Call, str, int]] = []
    # Blocks still to be decoded, and one that is never full.
    running: dict[str, int] = {}
    while events:
        now_s, _, (session, step, request) = heapq.heappop(events)
        engine.now_us = max(engine.now_us, 1_000_000 + int(now_s * 1e6))
        call = sessions[session][step]
        if request is None:
            waiting.append((engine.request(call), call, session, step))
        else:
            assert engine.decode(request, BLOCK if call.output else 1)
            running[request.request_id] -= 1
            if running[request.request_id] > 1:
                at(now_s + 0.1, (session, step, request))
            else:
                engine.finish(request)
                del running[request.request_id]
                call_next(now_s, session, step + 1)
        while waiting:
            request, call, session, step = waiting[0]
            needed = len(call.prompt) + len(call.output) + 2 + sum(running.values())
            if needed > engine.pool.get_num_free_blocks() or not engine.admit(request):
                break
            waiting.pop(0)
            running[request.request_id] = len(call.output) + 1
            at(now_s + (0.3 if call.output else 0.2), (session, step, request))
    engine.check()


def read(name: str, traces: Path | None, limit: int) -> list[Call]:
    """A recorded workload, or a generated one."""
    if traces is not None:
        return read_calls(traces / f"{name}.jsonl.gz", limit)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.jsonl.gz"
        Trace.generate(name).write(path)
        return read_calls(path, limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=os.environ.get("AGENTRT_TRACES", ROOT.parent / "shared/traces"))
    parser.add_argument("--generated", action="store_true", help="the built-in workloads instead of recorded ones")
    parser.add_argument("--calls", type=int, default=1500)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="large pools, with and without the thread beside")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    kinds = {name: kind for name, kind in KINDS.items() if kind[2] or arguments.generated}
    workloads = GENERATED if arguments.generated else WORKLOADS
    if arguments.large:
        kinds = {"stock": KINDS["stock"], "agentrt": KINDS["agentrt"], "at once": KINDS["agentrt"]}
        workloads, arguments.calls, arguments.concurrency = LARGE, 1 << 20, 48
    print("workload", "blocks", *kinds, sep="\t")
    for name, blocks in workloads.items():
        calls = read(name, None if arguments.generated else arguments.traces, arguments.calls)
        rates = []
        for kind, (policy, named, quotes) in kinds.items():
            calls = calls if quotes else [replace(call, quoted=[]) for call in calls]
            hit = prompt = 0
            for seed in range(arguments.seeds):
                engine = Engine(blocks, policy, named)
                if kind == "at once":
                    engine.connector.adapter.held.ahead = 0  # type: ignore[union-attr]
                closed_loop(calls, engine, blocks, arguments.concurrency, seed)
                assert engine.connector is None or set(engine.connector.guard.faults) <= {
                    k for k in engine.connector.guard.faults if k.endswith("slow")
                }
                hit += engine.hit_blocks
                prompt += engine.prompt_blocks
            rates.append(f"{hit / prompt:.4f}")
        print(name, blocks, *rates, sep="\t", flush=True)


if __name__ == "__main__":
    main()
