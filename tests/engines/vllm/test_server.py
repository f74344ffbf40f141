"""`agentrt serve` and `agentrt record` in front of real servers: identity over HTTP, metrics, the recording.

Two servers of several processes with a model of two layers run side by side, and after them some with two workers or
two engines; each is given the same calls.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from benches.e2e.run import predict
from benches.e2e.worker import write_model

pytestmark = pytest.mark.slow

BLOCK = 32
BLOCKS = 80
SESSIONS = 4
CALLS = 48
START_S = 500


class Server:
    """A server started by the command line."""

    def __init__(self, command: list[str], folder: Path) -> None:
        model = folder / "model"
        write_model(model, "tiny")
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{found.getsockname()[1]}"
        port = self.address.rpartition(":")[2]
        options = {
            "--served-model-name": "tiny", "--load-format": "dummy", "--dtype": "float32", "--block-size": str(BLOCK),
            "--max-model-len": "2048", "--num-gpu-blocks-override": str(BLOCKS + 1), "--max-num-seqs": "4",
            "--host": "127.0.0.1", "--port": port,
        }  # fmt: skip
        flags = ["--enforce-eager", "--skip-tokenizer-init"]
        self.log = folder / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agentrt", command[0], str(model), *command[1:],
                 *(part for option in options.items() for part in option), *flags],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
                    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
                },
            )  # fmt: skip

    def get(self, path: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address + path, data, {"Content-Type": "application/json", **(headers or {})}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text: str = answer.read().decode()
            return text

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while not self.answers():
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail("the server did not start; its last lines:\n" + self.log.read_text()[-3000:])
            time.sleep(0.5)

    def answers(self) -> bool:
        """Whether it is up."""
        try:
            self.get("/health")
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    def metrics(self) -> dict[str, float]:
        """Counters by name, added up over engines."""
        page = self.get("/metrics")
        calls = re.findall(r"^agentrt_calls_total\{[^}]*\} (\S+)$", page, re.MULTILINE)
        self.calls_of_engines = [float(n) for n in calls]
        # On a busy machine any hook may be slow; nothing else may go wrong.
        assert not re.search(r'^agentrt_faults_total\{.*kind="(?!\w+: slow)', page, re.MULTILINE), page
        found = re.findall(r"^([\w:]+)_total\{[^}]*\} (\S+)$", page, re.MULTILINE)
        sums: dict[str, float] = {}
        for name, value in found:
            sums[name] = sums.get(name, 0) + float(value)
        return sums

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def drive(server: Server) -> list[str]:
    """Three agents in turn in each of four sessions, whose conversation grows; returns the answers."""
    rng = random.Random(0)
    anchors = [[rng.randrange(100, 30_000) for _ in range(256)] for _ in range(3)]
    said: list[list[int]] = [[] for _ in range(SESSIONS)]
    answers = []
    for step in range(CALLS):
        session, turn = step % SESSIONS, step // SESSIONS
        body: dict[str, Any] = {
            "model": "tiny", "prompt": anchors[turn % 3] + said[session], "max_tokens": 2, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True, "vllm_xargs": {"agent_id": f"agent-{turn % 3}"},
        }  # fmt: skip
        if turn and not session:
            # Of somebody else's, whom nobody has heard of.
            body["vllm_xargs"]["ended_sessions"] = [f"other-{turn}", "another"]
        # Both ways of naming the session.
        headers = {"X-Session-ID": f"run-{session}"} if session % 2 else {}
        if not headers:
            body["session_id"] = f"run-{session}"
        answers.append(json.dumps(json.loads(server.get("/v1/completions", body, headers))["choices"][0]["token_ids"]))
        said[session] += [rng.randrange(100, 30_000) for _ in range(64)]
    return answers


def matches(counted: dict[str, float]) -> None:
    """What agentrt counts is what vLLM counts and what was sent."""
    assert counted["agentrt_calls"] == CALLS
    assert counted["agentrt_prompt_tokens"] == counted["vllm:prefix_cache_queries"]
    assert counted["agentrt_hit_tokens"] == counted["vllm:prefix_cache_hits"]
    assert counted["agentrt_sessions_inferred"] == counted["agentrt_agents_inferred"] == 0
    assert counted["agentrt_sessions_ended"] == 2 * (CALLS // SESSIONS - 1)
    assert counted["agentrt_hook_seconds"] > 0


class Runs:
    """Both servers after the same calls."""

    def __init__(self, folder: Path) -> None:
        self.trace = folder / "traffic.jsonl"
        (folder / "serve").mkdir()
        (folder / "record").mkdir()
        self.serving = Server(["serve"], folder / "serve")
        self.recording = Server(["record", "--to", str(self.trace)], folder / "record")
        try:
            for server in (self.serving, self.recording):
                server.wait()
            self.answers = drive(self.serving), drive(self.recording)
            self.counted = self.serving.metrics(), self.recording.metrics()
        finally:
            self.serving.stop()
            self.recording.stop()


@pytest.fixture(scope="module")
def runs(vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("servers"))


def test_the_served_answers_are_those_of_a_server_that_only_observes(runs: Runs) -> None:
    assert runs.answers[0] == runs.answers[1]
    assert len(runs.answers[0]) == CALLS


def test_what_is_counted_is_on_the_metrics_page_and_equals_what_vllm_counts(runs: Runs) -> None:
    for counted in runs.counted:
        matches(counted)
    serving, recording = runs.counted
    assert serving["agentrt_blocks_ranked"] > 0
    assert recording["agentrt_blocks_ranked"] == 0


def test_the_recording_names_everybody_and_replays_to_the_measured_hits(runs: Runs) -> None:
    rows = [json.loads(line) for line in runs.trace.read_text().splitlines()]
    assert len(rows) == CALLS
    assert len({row["session_id"] for row in rows}) == SESSIONS
    assert {row["agent"] for row in rows} == {f"agent-{n}" for n in range(3)}
    measured = runs.counted[1]["agentrt_hit_tokens"] / runs.counted[1]["agentrt_prompt_tokens"]
    assert predict(runs.trace, BLOCKS, {"it": "lru"})["it"] == pytest.approx(measured, abs=0.01)


def served(folder: Path, *options: str) -> tuple[list[str], dict[str, float], list[float]]:
    """Answers and counters of a server after the same calls, and how many of these each engine had."""
    folder.mkdir()
    server = Server(["serve", *options], folder)
    try:
        server.wait()
        return drive(server), server.metrics(), server.calls_of_engines
    finally:
        server.stop()


def test_two_engines_answer_as_one_does(runs: Runs, tmp_path: Path) -> None:
    answers, counted, calls = served(tmp_path / "data", "--data-parallel-size", "2")
    assert answers == runs.answers[0]
    matches(counted)
    assert counted["agentrt_blocks_ranked"] > 0
    assert len(calls) == 2
    assert min(calls) > 0


def test_two_workers_of_one_engine_answer_as_without_agentrts_order(vllm: None, tmp_path: Path) -> None:
    # Each worker makes up its own weights, so these are not the answers of one worker.
    two = ("--tensor-parallel-size", "2")
    answers, counted, calls = served(tmp_path / "acting", *two)
    matches(counted)
    assert counted["agentrt_blocks_ranked"] > 0
    assert len(calls) == 1
    assert answers == served(tmp_path / "observing", *two, "--policy", "observe")[0]
