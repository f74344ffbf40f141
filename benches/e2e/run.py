"""A real vLLM engine on the CPU under several policies: hit tokens, time to first token, calls per second.

Two engines run side by side and take turns: stock vLLM without the connector, and one with it, whose policy is set
for every run. Each run starts from an empty cache and an untaught policy, after a few calls that are not counted, for
a process that has just waited is slower; within a repetition all policies are given the same calls, and which of them
comes first changes from one repetition to the next. The pool of a workload is the one at which the replay says MIN -
LRU is largest; a second pool holds everything. Both engines are started anew for each repetition: two processes that do
the same may differ by some percent for as long as they live.
Finished runs are kept in the result file, so an interrupted benchmark goes on where it stopped.

    make e2e E2E_JSON=results.json         all workloads
    make e2e-smoke                         one small workload, after the adapter's tests
    python benches/e2e/run.py --help       in the environment that scripts/e2e_env.sh makes

| policy | what decides |
|---|---|
| stock | vLLM, no connector |
| stock-again | the same in a process of its own: what two processes differ by; not run unless asked for |
| neutral | the adapter with vLLM's own order: what it costs, and that it changes nothing |
| cachescout | the published policy behind the same adapter |
| agentrt | agentrt |
| agentrt-inferred | the same where requests name neither session nor agent; not run unless asked for |
| agentrt-told-ends | the same where a request says which sessions are over since; not run unless asked for |
| agentrt-prefetch | with prefills in idle capacity (`speculation`): little of it without `--pause-every N` |
| optimal | the offline order: evicts what the calls of the stock run need last |

Under pressure `neutral`, `agentrt` and `agentrt-told-ends` record themselves as `agentrt record` does; the recordings
are replayed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benches.e2e.summary import STOCK, problems, report
from benches.e2e.workloads import (
    BATCH,
    CALLS,
    CONCURRENCY,
    ENGINE_BLOCK,
    GENERATED,
    GENERATED_CALLS,
    RECORDED,
    SCALED_BLOCK,
    TRACE_BLOCK,
    calls_of,
    capacities,
    orders_of,
)

ROOT = Path(__file__).resolve().parents[2]
AGAIN = "stock-again"
CONNECTOR = "connector"
# What is given to the adapter as its policy.
CORES = {
    STOCK: STOCK,
    AGAIN: STOCK,
    "neutral": "lru",
    "cachescout": "benches.e2e.cores:CacheScout",
    "agentrt": "agentrt",
    "agentrt-inferred": "agentrt",
    "agentrt-told-ends": "agentrt",
    "agentrt-prefetch": "agentrt",
    "optimal": "benches.e2e.cores:Optimal",
}
INFERRED, TOLD = "agentrt-inferred", "agentrt-told-ends"
PREFETCH = "agentrt-prefetch"
PREFETCHING = {"scheduling": "speculation"}
RECORDING = ("neutral", "agentrt", TOLD)
# Which policies of the replay a recording predicts, by the policy it is recorded under.
PREDICTED = {
    "neutral": {"neutral": "lru", "agentrt": "agentrt", "optimal": "min"},
    "agentrt": {"agentrt": "agentrt"},
    TOLD: {TOLD: TOLD},
}

# Calls at the beginning of each run that are not counted.
WARM_UP = 40
# Of the result file; a change of the method is one.
VERSION = 2

Row = dict[str, Any]


class Engine:
    """A worker process."""

    def __init__(self, name: str, options: dict[str, Any], folder: Path) -> None:
        self.log = folder / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "benches/e2e/worker.py"), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # Threads that wait for each other measure whatever else runs on the machine.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def answer(self) -> str:
        """The next line; ends the benchmark where there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-20:])
            raise SystemExit(f"error: the engine process has ended; its last lines:\n{tail}")
        return line

    def run_warm(self, job: dict[str, Any]) -> dict[str, Any]:
        """One job, after the first calls of it under vLLM's own order."""
        core = STOCK if job["core"] == STOCK else "lru"
        self.run({**job, "calls": WARM_UP, "core": core, "told_ends": False, "extra": {}, "future": None})
        return self.run(job)

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """One job."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        result: dict[str, Any] = json.loads(self.answer())
        return result

    def stop(self) -> None:
        """Ends the process and closes its pipes."""
        self.process.terminate()
        self.process.communicate()


class Results:
    """The result file, and beside it what later runs need of stock's: the order of its calls and its answers."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.stock_path = path.with_suffix(".stock.json")
        self.settings = settings
        self.rows: list[Row] = []
        self.stock: dict[str, dict[str, Any]] = {}
        # Runs whose answers wait for stock's.
        self.unchecked: list[tuple[str, Row, dict[str, Any]]] = []
        if path.exists():
            found = json.loads(path.read_text())
            if found.get("settings") != settings or found.get("version") != VERSION:
                raise SystemExit(
                    f"error: {path} holds results of other settings; delete it or name another: --json FILE"
                )
            self.rows = found["results"]
            if self.stock_path.exists():
                self.stock = json.loads(self.stock_path.read_text())

    @staticmethod
    def key(workload: str, pressure: bool, repetition: int) -> str:
        """Names what all policies share."""
        return f"{workload} {'pressure' if pressure else 'fits'} {repetition}"

    def has(self, workload: str, pressure: bool, repetition: int, policy: str) -> bool:
        """Whether this run is done."""
        wanted = workload, pressure, repetition, policy
        done = any((r["workload"], r["pressure"], r["repetition"], r["policy"]) == wanted for r in self.rows)
        return done and (policy != STOCK or self.key(workload, pressure, repetition) in self.stock)

    def add(self, row: Row, outputs: dict[str, Any]) -> None:
        """Keeps a run, and compares its answers with stock's as soon as both are there."""
        key = self.key(row["workload"], row["pressure"], row["repetition"])
        self.rows.append(row)
        self.unchecked.append((key, row, outputs))
        for one in [one for one in self.unchecked if one[0] in self.stock]:
            self.unchecked.remove(one)
            _, row, outputs = one
            expected = self.stock[one[0]]["outputs"]
            row["outputs_differing"] = sum(expected[call] != outputs[call] for call in expected.keys() & outputs)
        _write(self.stock_path, self.stock)
        _write(self.path, {"version": VERSION, "settings": self.settings, "results": self.rows})


def _write(path: Path, value: object) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def predict(recording: Path, blocks: int, policies: dict[str, str]) -> dict[str, float]:
    """Token hit rates that the replay of a recording gives."""
    from agentrt import replay

    rows = [json.loads(line) for line in recording.read_text().splitlines()]
    tokens = sum(row["prompt_tokens"] for row in rows)
    found = replay.run([recording], policies=sorted(set(policies.values())), capacities=[blocks], order="open").results
    hits = {result.policy: result.hit_blocks * ENGINE_BLOCK / tokens for result in found}
    return {name: round(hits[policy], 5) for name, policy in policies.items()}


def turns(policies: list[str], repetition: int) -> list[str]:
    """The order in this repetition; ``optimal`` needs the calls of the stock run."""
    at = repetition % len(policies)
    order = policies[at:] + policies[:at]
    if "optimal" in order and STOCK in order and order.index("optimal") < order.index(STOCK):
        order.remove("optimal")
        order.insert(order.index(STOCK) + 1, "optimal")
    return order


def process_of(policy: str) -> str:
    """The engine that a policy runs in."""
    return policy if CORES[policy] == STOCK else CONNECTOR


def started(processes: set[str], folder: Path, blocks: int, job: dict[str, Any]) -> dict[str, Engine]:
    """Engines without and with the connector that have done their first calls."""
    engines = {}
    for name in sorted(processes):
        options = {
            "stock": name != CONNECTOR,
            "model": job["model"],
            "model_folder": str(folder / name),
            "batch": job["batch"],
            "blocks": blocks,
        }
        engines[name] = Engine(name, options, folder)
    try:
        for name, engine in engines.items():
            engine.answer()
            # The first calls of a process pay for what is made once.
            engine.run({**job, "pool_blocks": blocks, "calls": 30, "core": "lru" if name == CONNECTOR else STOCK})
    except BaseException:
        for engine in engines.values():
            engine.stop()
        raise
    return engines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "e2e.json", help="result file, also read to resume")
    parser.add_argument(
        "--traces", type=Path, default=Path(os.environ.get("AGENTRT_TRACES", ROOT.parent / "shared" / "traces"))
    )
    parser.add_argument("--smoke", action="store_true", help="one small workload, one repetition")
    parser.add_argument("--workloads", help=f"of {','.join((*RECORDED, *GENERATED))}")
    parser.add_argument("--policies", help=f"of {','.join(CORES)}")
    parser.add_argument("--repetitions", type=int, help="3 by default")
    parser.add_argument(
        "--calls", type=int, help=f"of a run; {CALLS} by default, at most {GENERATED_CALLS} of a generated workload"
    )
    parser.add_argument("--sessions", type=int, default=CONCURRENCY, help="at a time")
    parser.add_argument("--model", choices=("tiny", "small", "medium"))
    parser.add_argument("--pause-every", type=int, default=0, metavar="N", help="calls, after which all sessions pause")
    pools = parser.add_mutually_exclusive_group()
    pools.add_argument("--pressure-only", action="store_true", help="leave out the pool into which everything fits")
    pools.add_argument("--fits-only", action="store_true", help="only that pool")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    # Ends through `finally`, so that no engine is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    smoke = asked.smoke
    # The name of the result file is the caller's, the engines' folder is not.
    shape: dict[str, Any] = {
        "model": asked.model or ("tiny" if smoke else "small"),
        "calls": asked.calls or (120 if smoke else CALLS),
        "concurrency": asked.sessions,
        "batch": BATCH,
        "max_tokens": 2,
        "token_scale": SCALED_BLOCK / TRACE_BLOCK,
        "pause_every": asked.pause_every,
    }
    recorded = [name for name in RECORDED if (asked.traces / f"{name}.jsonl.gz").exists()]
    for name in set(RECORDED) - set(recorded):
        print(f"skipped: {name}.jsonl.gz is not in {asked.traces}; name a folder: --traces FOLDER")
    names = asked.workloads.split(",") if asked.workloads else [*recorded, *GENERATED]
    if smoke and not asked.workloads:
        names = names[:1]
    usual = [name for name in CORES if name not in (AGAIN, INFERRED, TOLD)]
    policies = asked.policies.split(",") if asked.policies else usual
    if unknown := set(policies) - set(CORES):
        raise SystemExit(f"error: unknown policy `{min(unknown)}`; known: {', '.join(CORES)}")
    if PREFETCH in policies and not asked.pause_every:
        print(f"{PREFETCH}: without --pause-every N the engine is hardly ever idle, so there is little to prefill in")
    # Where all fits no order of eviction matters: what the adapter costs is left.
    fitting = [name for name in policies if name in (STOCK, AGAIN, "agentrt", INFERRED, TOLD)]
    repetitions = asked.repetitions or (1 if smoke else 3)
    if asked.fits_only and not fitting:
        raise SystemExit(f"error: where all fits only these are run: {STOCK}, {AGAIN}, agentrt, {INFERRED}, {TOLD}")
    if "optimal" in policies and STOCK not in policies:
        raise SystemExit(f"error: `optimal` needs the calls of `{STOCK}`; add it to --policies")

    results = Results(asked.json, shape)
    pools = {}
    for name in names:
        orders = orders_of(name, asked.traces, shape["concurrency"], calls_of(name, shape["calls"]))
        pools[name] = found = capacities(orders, name, shape["concurrency"], shape["batch"])
        print(
            f"{name}: {found.pressure:,} blocks, where the replay says LRU {found.lru:.1%}, MIN {found.optimal:.1%}; "
            f"all fits into {found.fits:,}"
        )
    todo = [
        (name, pressure, repetition, policy)
        for pressure in ((False,) if asked.fits_only else (True,) if smoke or asked.pressure_only else (True, False))
        for repetition in range(repetitions)
        for name in names
        for policy in turns(policies if pressure else fitting, repetition)
        if not results.has(name, pressure, repetition, policy)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        engines: dict[str, Engine] = {}
        try:
            largest = max(pool.fits for pool in pools.values())
            job = {
                **shape, "traces": str(asked.traces), "named": True, "future": None, "abort_every": 0, "extra": {},
                "seed": 0,
            }  # fmt: skip
            start, under = time.monotonic(), None
            for done, (name, pressure, repetition, policy) in enumerate(todo):
                if under != (pressure, repetition):
                    for engine in engines.values():
                        engine.stop()
                    under = pressure, repetition
                    processes = {process_of(policy) for _, *turn, policy in todo if turn == [*under]}
                    engines = started(processes, folder, largest, {**job, "workload": names[0]})
                blocks = pools[name].pressure if pressure else pools[name].fits
                key = results.key(name, pressure, repetition)
                recording = folder / "recording.jsonl"
                extra: dict[str, Any] = {}
                # Where all fits there is nothing to foretell, and what agentrt costs is asked.
                records = pressure and policy in RECORDING
                if records:
                    extra["record"] = str(recording)
                if policy == PREFETCH:
                    extra |= PREFETCHING
                answer = engines[process_of(policy)].run_warm(
                    {
                        **job,
                        "workload": name,
                        "calls": calls_of(name, shape["calls"]),
                        "pool_blocks": blocks,
                        "seed": repetition,
                        "core": CORES[policy],
                        "named": policy != INFERRED,
                        "told_ends": policy == TOLD,
                        "extra": extra,
                        "future": results.stock[key]["order"] if policy == "optimal" else None,
                    }
                )
                outputs, order = answer.pop("outputs"), answer.pop("order")
                if policy == STOCK:
                    results.stock[key] = {"order": order, "outputs": outputs}
                row = {
                    "workload": name,
                    "recorded": name in RECORDED,
                    "pressure": pressure,
                    "policy": policy,
                    "repetition": repetition,
                    **answer,
                    # Not known yet.
                    "outputs_differing": None,
                    "pool_blocks": blocks,
                    "place": list(CORES).index(policy),
                }
                if records:
                    row["predicted"] = predict(recording, blocks, PREDICTED[policy])
                results.add(row, outputs)
                minutes = (time.monotonic() - start) / 60
                print(
                    f"[{done + 1}/{len(todo)}] {key} {policy}: hits {row['hit_rate']:.1%}, "
                    f"TTFT {row['ttft_ms']['mean']:.0f} ms, {row['calls_per_s']:.2f} calls/s, "
                    f"{row['overhead_us_per_step']:.0f} us a step; {minutes:.1f} min, "
                    f"{minutes / (done + 1) * (len(todo) - done - 1):.0f} left",
                    flush=True,
                )
        finally:
            for engine in engines.values():
                engine.stop()
    print(report(results.rows))
    if problems(results.rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
