"""A real vLLM engine on the CPU under several policies: hit tokens, time to first token, calls per second.

For every workload one engine process per policy is started; they take turns (ABAB..), each run from an empty cache and
an untaught policy. Finished runs are kept in the result file, so an interrupted benchmark goes on where it stopped.

    make e2e-smoke                         one recorded or generated workload, small: some minutes
    make e2e E2E_JSON=results.json         all workloads

What is comparable: hit tokens (the order of calls depends on completed calls, not on the clock). What is indicative
only: times, which are those of this machine and whatever else runs on it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benches.e2e.workloads import GENERATED, RECORDED, sessions  # noqa: E402

POLICIES = {"stock": "", "neutral": "lru", "agentrt": "agentrt", "agentrt-inferred": "agentrt"}
BLOCK_TOKENS = 32


def pool_blocks(name: str, traces: Path, shape: dict[str, Any], share: float) -> int:
    """``share`` of the live working set: concurrent sessions times their mean distinct blocks; at least two prompts."""
    per_block = shape["tokens_per_block"] / BLOCK_TOKENS
    limit = shape["longest"] // shape["tokens_per_block"]
    sizes, longest = [], 0
    for session in sessions(name, traces)[: shape["sessions"]]:
        calls = session[: shape["calls_per_session"]]
        sizes.append(len({b for call in calls for b in call.blocks[:limit]}) * per_block)
        longest = max(longest, *(min(len(call.blocks), limit) for call in calls))
    live = shape["concurrency"] * statistics.mean(sizes)
    return max(int(share * live), int(longest * per_block * 2) + 8, shape["longest"] // BLOCK_TOKENS + 4)


def start(policy: str, blocks: int, shape: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    options = {
        "policy": policy,
        "core": POLICIES[policy],
        "model": shape["model"],
        "model_folder": str(folder / "model"),
        "pool_blocks": blocks,
        "batch": shape["batch"],
        "longest": shape["longest"],
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "benches/e2e/worker.py"), json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / f"{policy}.log").open("w"),
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )


def ask(process: subprocess.Popen[str], job: dict[str, Any] | None, log: Path) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    if job is not None:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise SystemExit(f"error: the engine process has ended; its last lines:\n{tail}")
    return answer


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["workload"], row["policy"], row["pressure"], row["repetition"], json.dumps(row["shape"], sort_keys=True)


def save(path: Path, results: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"version": 1, "results": results}, indent=1) + "\n")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "e2e.json", help="result file, also read to resume")
    parser.add_argument(
        "--traces", type=Path, default=os.environ.get("AGENTRT_TRACES", ROOT.parent / "shared" / "traces")
    )
    parser.add_argument("--smoke", action="store_true", help="one small workload, one repetition")
    parser.add_argument("--workloads", help="names, separated by commas")
    parser.add_argument("--policies", help="of " + ",".join(POLICIES))
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--model", choices=("tiny", "small", "medium"))
    parser.add_argument("--share", type=float, default=0.3, help="pool, as a share of the live working set")
    parser.add_argument("--fits", action="store_true", help="also run with a pool into which everything fits")
    arguments = parser.parse_args()
    # Ends through `finally`, so that no engine is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    traces = Path(arguments.traces)
    smoke = arguments.smoke
    shape: dict[str, Any] = {
        "model": arguments.model or ("tiny" if smoke else "small"),
        "tokens_per_block": 4 if smoke else 8,
        "longest": 2048 if smoke else 4096,
        "max_tokens": 2,
        "batch": 4,
        "concurrency": 8,
        "sessions": 12 if smoke else 24,
        "calls_per_session": 20 if smoke else 40,
        "seed": 1,
    }
    recorded = [name for name in RECORDED if (traces / f"{name}.jsonl.gz").exists()]
    names = arguments.workloads.split(",") if arguments.workloads else [*recorded, *GENERATED]
    if smoke and not arguments.workloads:
        names = names[:1]
    default = "stock,neutral,agentrt" if smoke else "stock,neutral,agentrt,agentrt-inferred"
    policies = (arguments.policies or default).split(",")
    repetitions = arguments.repetitions or (1 if smoke else 3)
    results = json.loads(arguments.json.read_text())["results"] if arguments.json.exists() else []
    have = {key(row) for row in results}
    for name in names:
        for pressure in (True, False) if arguments.fits else (True,):
            blocks = pool_blocks(name, traces, shape, arguments.share if pressure else 4.0)
            todo = [
                (repetition, policy)
                for repetition in range(repetitions)
                for policy in policies
                if key(
                    {"workload": name, "policy": policy, "pressure": pressure, "repetition": repetition, "shape": shape}
                )
                not in have
            ]
            if not todo:
                continue
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                (folder / "model").mkdir()
                workers = {policy: start(policy, blocks, shape, folder) for policy in dict.fromkeys(p for _, p in todo)}
                try:
                    for policy, worker in workers.items():
                        ask(worker, None, folder / f"{policy}.log")
                    for repetition, policy in todo:
                        job = {
                            **shape,
                            "workload": name,
                            "traces": str(traces),
                            "pool_blocks": blocks,
                            "named": policy != "agentrt-inferred",
                        }
                        answer = json.loads(ask(workers[policy], job, folder / f"{policy}.log"))
                        row = {
                            "workload": name,
                            "recorded": name in RECORDED,
                            "pressure": pressure,
                            "policy": policy,
                            "repetition": repetition,
                            **answer,
                            "pool_blocks": blocks,
                            "shape": shape,
                        }
                        results.append(row)
                        save(arguments.json, results)
                        print(
                            f"{name:18} {policy:17} run {repetition + 1}/{repetitions}, pool {blocks}: "
                            f"hits {row['hit_rate']:.3f}, TTFT mean {row['ttft_ms']['mean']:.0f} ms, "
                            f"{row['calls_per_s']:.2f} calls/s, {row['overhead_us_per_step']:.0f} us/step, "
                            f"outputs {row['outputs']}",
                            flush=True,
                        )
                finally:
                    for worker in workers.values():
                        worker.terminate()
                        worker.wait()


if __name__ == "__main__":
    main()
