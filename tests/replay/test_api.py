"""``agentrt.replay``: traces as objects, results as dataclasses, errors as classes."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import pytest

import agentrt
from agentrt import errors, replay


def test_run_answers_one_result_per_setting_in_order(tiny_trace: Path) -> None:
    done = replay.run([tiny_trace], policies=["min", "lru"], capacities=["10%", 40], sessions=[2, 3], seed=[0, 1])
    keys = [(r.sessions, r.seed, r.capacity, r.policy) for r in done.results]
    assert keys == [(n, s, c, p) for n in (2, 3) for s in (0, 1) for c in ("10%", "40") for p in ("min", "lru")]
    for result in done.results:
        assert result.lru_hit_rate <= result.min_hit_rate
        assert result.hit_blocks <= result.prompt_blocks


def test_min_is_never_beaten(tiny_trace: Path) -> None:
    done = replay.run([tiny_trace], policies=replay.policy_names(), capacities=["5%", "20%", "60%"], sessions=4)
    for result in done.results:
        assert result.hit_rate <= result.min_hit_rate, result.policy


def test_traces_with_equal_names_are_told_apart(tiny_trace: Path) -> None:
    done = replay.run([tiny_trace, tiny_trace], policies=["lru"], capacities=["20%"])
    assert [r.workload for r in done.results] == ["tiny", "tiny#2"]


def test_calls_larger_than_the_pool_are_counted_apart(tiny_trace: Path) -> None:
    done = replay.run([tiny_trace], policies=["lru"], capacities=[10], sessions=1)
    (result,) = done.results
    assert result.bypassed_calls > 0
    assert result.calls + result.bypassed_calls == replay.Trace.read(tiny_trace).calls


def test_trace_is_an_opaque_object_that_survives_a_file(tiny_trace: Path, tmp_path: Path) -> None:
    trace = replay.Trace.read(tiny_trace)
    assert (trace.workload, trace.sessions, trace.calls, trace.block_size) == ("tiny", 6, 30, 16)
    assert trace.agents == ["planner", "worker"]
    copy = tmp_path / "copy.jsonl.gz"
    trace.write(copy)
    again = replay.Trace.read(copy)
    options = {"policies": ["lru", "min"], "capacities": ["20%"], "sessions": 3}
    assert replay.run([again], **options).to_json() == replay.run([trace], **options).to_json()  # type: ignore[arg-type]


def test_generated_workloads_follow_their_seed(tmp_path: Path) -> None:
    for name, _, _ in replay.workloads():
        texts = []
        for seed in (1, 1, 2):
            path = tmp_path / f"{name}-{seed}.jsonl"
            replay.Trace.generate(name, sessions=3, seed=seed).write(path)
            texts.append(path.read_bytes())
        assert texts[0] == texts[1], name
        assert texts[0] != texts[2], name


def test_progress_reaches_the_total_or_stops_the_run(tiny_trace: Path) -> None:
    seen: list[tuple[int, int]] = []
    replay.run([tiny_trace], policies=["lru"], progress=lambda done, total: seen.append((done, total)))
    done, total = seen[-1]
    assert done == total > 0

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay.run([tiny_trace], policies=["lru"], progress=stop)


def test_other_threads_run_meanwhile(tiny_trace: Path) -> None:
    """The replay waits for a policy that waits for a thread that needs the interpreter."""
    go = threading.Event()

    class Waits:
        def __init__(self) -> None:
            assert go.wait(30)

        def call_start(self, call: replay.ReplayCall) -> None: ...
        def call_finish(self, call: replay.ReplayCall) -> None: ...
        def evict(self, n: int, time_us: int) -> list[int]:
            return []

    thread = threading.Thread(target=go.set)
    done = []
    caller = threading.Thread(target=lambda: done.append(replay.run([tiny_trace], policies=[Waits], threads=1)))
    caller.start()
    thread.start()
    caller.join(60)
    thread.join()
    assert len(done) == 1


def test_errors_share_a_base_carry_their_parts_and_pickle(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("hello\n")
    with pytest.raises(errors.BadLineError) as bad_line:
        replay.Trace.read(bad)
    assert (bad_line.value.path, bad_line.value.line) == (str(bad), 1)
    with pytest.raises(errors.FileAccessError) as absent:
        replay.Trace.read(tmp_path / "absent.jsonl")
    with pytest.raises(errors.UnknownWorkloadError) as workload:
        replay.Trace.generate("nosuch")
    assert workload.value.name == "nosuch"
    tiny = replay.Trace.generate("pipeline", sessions=2)
    with pytest.raises(errors.UnknownPolicyError) as policy:
        replay.run([tiny], policies=["nosuch"])
    assert "lru" in policy.value.known
    with pytest.raises(errors.BadOptionError) as option:
        replay.run([tiny], capacities=["0%"])
    assert option.value.option == "--capacity"
    for raised in (bad_line, absent, workload, policy, option):
        error = raised.value
        assert isinstance(error, agentrt.AgentRTError)
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


@pytest.mark.slow
def test_every_recorded_workload_replays(recorded_traces: list[Path]) -> None:
    done = replay.run(recorded_traces, policies=["lru", "min"], capacities=["10%"])
    assert len(done.results) == 2 * len(recorded_traces)
    for result in done.results:
        assert 0 < result.lru_hit_rate <= result.min_hit_rate < 1, result.workload
