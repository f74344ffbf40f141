"""Whether the adapter's memory grows: a million requests through vLLM's real cache manager, without a model.

Sessions come and go (one in ten requests begins a new one), every third request carries no identity, and the pool
evicts all the time. Printed: resident memory of the process and what the adapter holds, on the way. Fails where the
last three quarters of the requests have cost more than 16 bytes each.

    python benches/e2e/growth.py
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.engines.vllm.pool import Call, Engine

POOL = 2_000


def resident_mb() -> float:
    """Megabytes of memory that the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * 4096 / 1e6, 1)


def held(adapter: Any) -> dict[str, int]:
    """Entries of what could grow."""
    adapter.held.catch_up()
    return {
        "calls": len(adapter.calls),
        "known_blocks": adapter.ranker.known_blocks,
        "pending_blocks": adapter.ranker.pending_blocks,
        "arrived_calls": adapter.held.arrived_calls,
        "core_bytes": sum(adapter.core.runtime.memory().values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    engine, rng, numbers = Engine(POOL, "agentrt"), random.Random(arguments.seed), count()
    connector = engine.connector
    assert connector is not None
    prompts: dict[int, list[int]] = {}
    anchors = [[next(numbers) for _ in range(4)] for _ in range(8)]
    megabytes = []
    reports = {arguments.requests * percent // 100 for percent in (1, 10, 25, 50, 75, 100)}
    for n in range(1, arguments.requests + 1):
        session = n // 10 - rng.randrange(1 + min(n // 10, 40))
        prompt = prompts.setdefault(session, list(anchors[session % 8]))
        prompt.append(next(numbers))
        if len(prompts) > 64:
            del prompts[next(iter(prompts))]
        engine.named = n % 3 != 0
        engine.call(Call(f"s{session}", f"agent{session % 8}", prompt, []))
        # The harness keeps these for tests.
        engine.hits.clear()
        engine.evicted.clear()
        if n in reports:
            gc.collect()
            faults = {kind: k for kind, k in connector.guard.faults.items() if not kind.endswith("slow")}
            megabytes.append(resident_mb())
            report = {"requests": n, "resident_mb": megabytes[-1], **held(connector.adapter), "faults": faults}
            print(json.dumps(report), flush=True)
    engine.check()
    grown = (megabytes[-1] - megabytes[2]) * 1e6 / (arguments.requests * 0.75)
    print(f"{grown:.1f} bytes a request from the first quarter on")
    if grown > 16:
        sys.exit("memory grows with requests")


if __name__ == "__main__":
    main()
