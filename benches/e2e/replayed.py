"""vLLM's real scheduler against the replay of its own recording, without a model and on a simulated clock.

The calls of `benches/e2e/run.py`, in its pools, one run in less than a second. A step takes a time that goes with its
tokens, times noise from a seed, so a run can be repeated to the block, and many seeds tell a systematic difference
from what one block named at another moment does to the rest.

    python benches/e2e/replayed.py
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benches.e2e.run import predict  # noqa: E402
from benches.e2e.simulated import run as simulate  # noqa: E402
from benches.e2e.workloads import CALLS, Call, calls_of, sessions  # noqa: E402
from tests.engines.vllm.scheduler import transfer  # noqa: E402

# The pools that `benches/e2e/run.py` finds.
POOLS = {"coding_team": 280, "research_tree": 320}
STEP_US, TOKEN_US, NOISE = 8_000, 40, 0.2
STEADY_US = 40_000


@dataclass(frozen=True)
class Rates:
    """Token hit rates."""

    engine: float
    replay: float


def run(
    todo: list[list[Call]], calls: int, blocks: int, seed: int, clock_seed: int, asked: argparse.Namespace
) -> Rates:
    """Runs sessions in a closed loop and replays what was recorded."""
    rng = random.Random(clock_seed)

    def step_us(tokens: int) -> int:
        if asked.steady:
            return STEADY_US + 1_500 * clock_seed
        return int((STEP_US + TOKEN_US * tokens) * rng.lognormvariate(0, NOISE))

    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder) / "recording.jsonl"
        flag = transfer(asked.policy, record=str(recording))
        outcome = simulate(todo, calls, blocks, seed, flag, step_us, asynchronous=asked.asynchronous)
        return Rates(outcome.hit_rate, predict(recording, blocks, {asked.policy: asked.policy})[asked.policy])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="draws of sessions")
    parser.add_argument("--clocks", type=int, default=12, help="seeds of the clock, each with all draws")
    parser.add_argument("--policy", default="agentrt")
    parser.add_argument("--steady", action="store_true", help="all steps of a run take the same time")
    parser.add_argument("--asynchronous", action="store_true", help="schedule a step ahead, as vLLM does on GPUs")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    print("workload", "blocks", "engine", "replay", "difference", "least", "most", sep="\t")
    for name, blocks in POOLS.items():
        draws = [sessions(name, Path("none"), seed) for seed in range(arguments.seeds)]
        rates = [
            run(todo, calls_of(name, CALLS), blocks, seed, clock, arguments)
            for seed, todo in enumerate(draws)
            for clock in range(arguments.clocks)
        ]
        engine, replay = (statistics.mean(getattr(r, of) for r in rates) for of in ("engine", "replay"))
        off = [100 * (r.replay - r.engine) for r in rates]
        print(
            name, blocks, f"{engine:.2%}", f"{replay:.2%}", f"{statistics.mean(off):+.2f}", f"{min(off):+.2f}",
            f"{max(off):+.2f}", sep="\t", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
