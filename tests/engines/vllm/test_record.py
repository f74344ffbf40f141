"""Live traffic written as a trace, read back by the replay. Needs no vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentrt import _core
from agentrt.engines.vllm.record import Recorder


def write(recorder: Recorder, calls: int, blocks: int = 6) -> None:
    for i in range(calls):
        session, step = i % 3, i // 3
        prompt = [session << 40 | b for b in range(blocks + 2 * step)]
        output = [session << 40 | b for b in range(blocks + 2 * step, blocks + 2 * step + 2)]
        recorder.arrived(i, session, 1_000_000 * (i + 5))
        recorder.call(
            number=i,
            session=session,
            agent="ab"[step % 2],
            arrived_us=1_000_000 * (i + 5),
            started_us=1_000_000 * (i + 5) + 125_000,
            ended_us=1_000_000 * (i + 5) + 375_000,
            prompt_tokens=16 * len(prompt) + 3,
            output_tokens=29,
            prompt=prompt,
            output=output,
        )
    recorder.close()


def test_a_recording_is_a_trace_the_replay_reads(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    recorder = Recorder(str(path), "mine", 16)
    write(recorder, 60)
    assert (recorder.written, recorder.dropped) == (60, 0)
    trace = _core.Trace.read(path)
    assert (trace.workload, trace.calls, trace.sessions, trace.block_size) == ("mine", 60, 3, 16)
    assert sorted(trace.agents) == ["a", "b"]
    first = json.loads(path.read_text().splitlines()[0])
    assert first["t_arrival"] == 0.0
    assert (first["queue_s"], first["llm_latency_s"]) == (0.125, 0.25)
    assert first["blocks"] == [[0, 6]]


def test_files_are_rotated_and_each_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    write(Recorder(str(path), "mine", 16, max_bytes=4000, files=3), 200)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["live.jsonl", "live.jsonl.1", "live.jsonl.2"]
    assert all(p.stat().st_size < 5000 for p in tmp_path.iterdir())
    for file in tmp_path.iterdir():
        assert _core.Trace.read(file).calls >= 1


def end(recorder: Recorder, number: int, ended_s: int, *, started: bool = True) -> None:
    recorder.call(
        number=number, session=1, agent=f"a{number}", arrived_us=number * 1_000_000,
        started_us=number * 1_000_000 if started else None, ended_us=ended_s * 1_000_000,
        prompt_tokens=40, output_tokens=1, prompt=[1, 2], output=[],
    )  # fmt: skip


def test_parallel_calls_of_a_session_are_written_in_the_order_of_their_arrival(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    recorder = Recorder(str(path), "mine", 16)
    for number in range(4):
        recorder.arrived(number, 1, number * 1_000_000)
    for number, ended_s in ((2, 4), (0, 9), (3, 10), (1, 20)):
        end(recorder, number, ended_s, started=number != 3)
    recorder.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # The fourth was withdrawn.
    assert [row["agent"] for row in rows] == ["a0", "a1", "a2"]
    assert [row["t_arrival"] + row["llm_latency_s"] for row in rows] == [9, 20, 4]
    assert _core.Trace.read(path).calls == 3


def test_a_call_that_never_ends_does_not_hold_its_session_back_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentrt.engines.vllm.record.HELD_CALLS", 2)
    path = tmp_path / "live.jsonl"
    recorder = Recorder(str(path), "mine", 16)
    for number in range(5):
        recorder.arrived(number, 1, number * 1_000_000)
    for number in range(1, 5):
        end(recorder, number, 20)
    recorder.close()
    assert _core.Trace.read(path).calls == 4


def test_a_place_that_cannot_be_written_drops_lines_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recorder = Recorder(str(tmp_path / "file" / "live.jsonl"), "mine", 16)
    write(recorder, 6)
    assert (recorder.written, recorder.dropped) == (0, 6)
