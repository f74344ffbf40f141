"""Each scheduling policy on and off in a real vLLM engine on the CPU; a small scenario each.

    make e2e-policies                              all scenarios, three repetitions
    python benches/e2e/policies.py --help          in the environment that scripts/e2e_env.sh makes

One engine serves all runs; each starts from an empty cache and an untaught policy. Three take turns, and which comes
first changes from one repetition to the next: `neutral` (vLLM's own order and eviction), `agentrt` (learned
eviction), and `agentrt` with the policy. All get the same calls; their answers are compared. Times are CPU time of the
engine's process plus the sessions' pauses, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benches.e2e.run import Engine
from benches.e2e.scenarios import SCENARIOS, Scenario
from benches.e2e.workloads import BATCH

HOLD_S = 30.0
Row = dict[str, Any]


def arms(scenario: Scenario) -> dict[str, tuple[str, dict[str, Any]]]:
    """Adapter's policy and options by name."""
    return {
        "neutral": ("lru", {}),
        "off": ("agentrt", {}),
        "on": ("agentrt", {"scheduling": scenario.policy, "hold_s": HOLD_S}),
    }


def measure(scenario: Scenario, row: Row) -> float:
    """What the scenario is about."""
    if scenario.metric == "ttft_ms":
        return float(row["ttft_ms"]["mean"])
    if scenario.metric == "light_session_s":
        return float(row["session_s"]["light"])
    return float(row["mean_session_s"])


def table(rows: list[Row]) -> str:
    """Means over repetitions, and the change from off to on with its range."""
    lines = [
        "| scenario | figure | neutral | off | on | on against off | hit tokens | calls a second | prefilled |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = {"ttft_ms": "mean TTFT, ms", "session_s": "mean session, s", "light_session_s": "light tenant's session, s"}
    for name, scenario in SCENARIOS.items():
        by_arm = {arm: [row for row in rows if (row["scenario"], row["arm"]) == (name, arm)] for arm in arms(scenario)}
        if not all(by_arm.values()):
            continue
        mean = {arm: statistics.mean(measure(scenario, row) for row in mine) for arm, mine in by_arm.items()}
        off = {row["seed"]: row for row in by_arm["off"]}
        changes = [
            measure(scenario, row) / measure(scenario, off[row["seed"]]) - 1
            for row in by_arm["on"]
            if row["seed"] in off
        ]
        hits, speed = (
            [statistics.mean(row[figure] for row in by_arm[arm]) for arm in ("off", "on")]
            for figure in ("hit_rate", "calls_per_s")
        )
        prefilled = statistics.mean(row["prefilled_tokens"] / row["prompt_tokens"] for row in by_arm["on"])
        lines.append(
            f"| {name} | {names[scenario.metric]} | {mean['neutral']:.3g} | {mean['off']:.3g} | {mean['on']:.3g} "
            f"| {statistics.mean(changes):+.1%} ({min(changes):+.0%} to {max(changes):+.0%}) "
            f"| {hits[0]:.1%} -> {hits[1]:.1%} | {speed[0]:.2f} -> {speed[1]:.2f} | {prefilled:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("e2e-policies.json"), help="where all runs are written")
    parser.add_argument("--only", help=f"scenarios, by `;`: {'; '.join(SCENARIOS)}")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--model", choices=("tiny", "small", "medium"), default="small")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = asked.only.split(";") if asked.only else list(SCENARIOS)
    rows: list[Row] = []
    differing = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        largest = max(scenario.pool_blocks for scenario in SCENARIOS.values())
        options = {
            # In bfloat16 answers may depend on what is computed together.
            "stock": False, "model": asked.model, "dtype": "float32", "model_folder": str(folder / "model"),
            "batch": BATCH, "blocks": largest,
        }  # fmt: skip
        engine = Engine("engine", options, folder)
        try:
            engine.answer()
            engine.run({"scenario": "fairness", "seed": 99, "core": "lru", "extra": {}, "max_tokens": 2})
            for seed in range(asked.repetitions):
                for name in names:
                    scenario = SCENARIOS[name]
                    order = list(arms(scenario).items())
                    answers: dict[str, Any] = {}
                    for arm, (core, extra) in order[seed % 3 :] + order[: seed % 3]:
                        job = {"scenario": name, "seed": seed, "core": core, "extra": extra, "max_tokens": 4}
                        row = engine.run(job)
                        outputs = row.pop("outputs")
                        row.pop("order")
                        answers = answers or outputs
                        differing += outputs != answers
                        row |= {"scenario": name, "arm": arm, "seed": seed}
                        rows.append(row)
                        asked.json.write_text(json.dumps({"version": 1, "results": rows}, indent=1) + "\n")
                        print(
                            f"{name} {seed} {arm}: {measure(scenario, row):.3g}, hits {row['hit_rate']:.1%}, "
                            f"{row['calls_per_s']:.2f} calls/s, {row['makespan_s']:.0f} s, "
                            f"prefilled {row['prefilled_tokens']}, passed over {row['passed_over']}, "
                            f"{row['overhead_us_per_step']:.0f} us a step, faults {row['faults'] or 'none'}",
                            flush=True,
                        )
        finally:
            engine.stop()
    print(table(rows))
    print("answers are the same in all runs" if not differing else f"answers differ in {differing} runs")
    faults = [row for row in rows if any(not kind.endswith(": slow") for kind in row["faults"])]
    raise SystemExit(bool(differing or faults))


if __name__ == "__main__":
    main()
