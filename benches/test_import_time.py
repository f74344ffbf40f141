"""Import time of the package: the promise is 100 ms in a fresh interpreter, numpy included."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from pytest_benchmark.fixture import BenchmarkFixture


def _import(statement: str) -> None:
    subprocess.run([sys.executable, "-c", statement], check=True)


def _median_s(statement: str, rounds: int = 9) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        _import(statement)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def test_import_agentrt(benchmark: BenchmarkFixture) -> None:
    _import("import agentrt")  # bytecode is compiled once
    bare = _median_s("pass")
    benchmark.extra_info["numpy_alone_ms"] = round((_median_s("import numpy") - bare) * 1e3, 1)
    benchmark.extra_info["interpreter_ms"] = round(bare * 1e3, 1)
    benchmark.pedantic(_import, args=("import agentrt",), rounds=15)
    benchmark.extra_info["import_agentrt_ms"] = round((benchmark.stats.stats.median - bare) * 1e3, 1)
