"""Many threads on one runtime: nothing is lost, nobody waits, nothing breaks."""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections.abc import Callable

import numpy as np
import pytest

import agentrt
from agentrt import errors

THREADS = 8
BATCHES = 60
EVENTS = 512


def _hammer(runtime: agentrt.Runtime) -> tuple[int, list[BaseException]]:
    """Eight threads report events while four ask; returns the BusyErrors seen and everything unexpected."""
    workload = runtime.workload("w")
    start = threading.Barrier(THREADS + 4)
    done = threading.Event()
    busy = [0]
    unexpected: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            start.wait()
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - panics are BaseExceptions, and what this test is after
                unexpected.append(error)

        return run

    def feed(thread: int) -> Callable[[], None]:
        kinds = np.tile(np.array([0, 2], np.uint8), EVENTS // 2)
        # Sessions of their own, 16 a thread, in both of the events of a call.
        sessions = np.repeat(np.arange(EVENTS // 2) % 16 + 16 * thread, 2).astype(np.uint64)
        agents = np.repeat(np.arange(EVENTS // 2) // 16 % 4, 2).astype(np.uint16)

        def work() -> None:
            for batch in range(BATCHES):
                times = np.arange(EVENTS, dtype=np.uint64) + np.uint64(batch * EVENTS)
                workload.observe(kinds, sessions, agents, sessions, times)

        return work

    def ask(which: int) -> Callable[[], None]:
        blocks = np.arange(10_000, dtype=np.uint64)
        rows = np.zeros((24, 4), np.float32)

        def work() -> None:
            while not done.is_set():
                session = workload.session(which)
                runtime.score(blocks)
                workload.predict_into(session.key, 4, rows)
                for prediction in session.predict(4):
                    assert 0 <= prediction.probability <= 1
                likely = session.score_agents([0, 1, 2, 3], 1.0)
                assert ((likely >= 0) & (likely <= 1)).all()
                try:
                    runtime.act("evict", 4)
                    runtime.stats()
                    runtime.repairs()
                except errors.BusyError:
                    busy[0] += 1

        return work

    feeders = [threading.Thread(target=guarded(feed(i))) for i in range(THREADS)]
    askers = [threading.Thread(target=guarded(ask(i))) for i in range(4)]
    for thread in feeders + askers:
        thread.start()
    for thread in feeders:
        thread.join()
    done.set()
    for thread in askers:
        thread.join()
    return busy[0], unexpected


def _check(runtime: agentrt.Runtime) -> None:
    _, unexpected = _hammer(runtime)
    assert unexpected == []
    stats = runtime.stats()
    assert stats["events"] == THREADS * BATCHES * EVENTS
    assert stats["calls"] == THREADS * BATCHES * EVENTS // 2
    assert stats["sessions"] == THREADS * 16
    # Agents follow each other in a ring: had steps been mixed up or lost, this would not be so certain.
    for session in range(THREADS * 16):
        first, *others = runtime.workload("w").session(session).predict(1)
        assert first.agent_id == 0
        assert first.probability > 0.95 * (first.probability + sum(p.probability for p in others))


def test_eight_threads_lose_no_event() -> None:
    _check(agentrt.Runtime(1000))


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"),
    reason="this interpreter has a global lock; run the suite with a free-threaded one, for example python3.14t",
)
def test_eight_threads_lose_no_event_without_the_global_lock() -> None:
    assert not sys._is_gil_enabled()  # type: ignore[attr-defined, unused-ignore]  # importing agentrt left it off
    _check(agentrt.Runtime(1000))


def test_batches_with_blocks_are_applied_or_refused_as_a_whole() -> None:
    runtime = agentrt.Runtime(1000)
    workload = runtime.workload("w")
    n = 4096
    fields = (
        np.tile(np.array([0, 1, 2], np.uint8), n),
        np.repeat(np.arange(n, dtype=np.uint64), 3),
        np.zeros(3 * n, np.uint16),
        np.repeat(np.arange(n, dtype=np.uint64), 3),
        np.arange(3 * n, dtype=np.uint64),
        np.array([0, *np.tile([1, 2, 2], n).reshape(n, 3).__add__(2 * np.arange(n)[:, None]).ravel()], np.uint32),
        np.repeat(np.arange(1, n + 1, dtype=np.uint64), 2),
    )
    refused = [0] * 4
    start = threading.Barrier(4)
    unexpected: list[BaseException] = []

    def feed(thread: int) -> None:
        start.wait()
        for _ in range(8):
            try:
                workload.observe(*fields)
            except errors.BusyError:  # noqa: PERF203 - each batch stands for itself
                refused[thread] += 1
            except BaseException as error:  # noqa: BLE001 - as above
                unexpected.append(error)

    threads = [threading.Thread(target=feed, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert unexpected == []
    assert runtime.stats()["events"] == (32 - sum(refused)) * 3 * n
    assert runtime.stats()["prompt_blocks"] == (32 - sum(refused)) * n
