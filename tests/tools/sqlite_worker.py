"""A process that reads and writes through a shared store until it is killed; used by test_sqlite.py.

The world is a directory of counter files. A write appends one byte to a file, so a version is a file size and cannot
be half-written; a read returns it. Each checked answer prints a line; a stale one prints `STALE`.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from agentrt.tools import Memo, ToolRuntime
from agentrt.tools.sqlite_store import SqliteStore


def main(store: str, world: str, seed: int, seconds: float, settle_s: float) -> None:
    rng = random.Random(seed)
    memo = Memo(SqliteStore(store, settle_s=settle_s), verify_rate=0.0, settle_s=settle_s)
    runtime = ToolRuntime(memo=memo)
    directory = Path(world)

    def size(name: str) -> int:
        return (directory / name).stat().st_size

    def read(name: str) -> int:
        return size(name)

    def write(name: str) -> None:
        with (directory / name).open("ab", buffering=0) as file:
            time.sleep(rng.random() * 0.002)
            file.write(b"x")
            time.sleep(rng.random() * 0.002)

    read_tool = runtime.wrap(read, version="1", reads=["file/{name}"], writes=())
    write_tool = runtime.wrap(write, version="1", reads=(), writes=["file/{name}"])
    end = time.monotonic() + seconds
    answers = 0
    while time.monotonic() < end:
        name = rng.choice("abc")
        if rng.random() < 0.1:
            write_tool(name)
            continue
        low = size(name)
        value = read_tool(name)
        high = size(name)
        answers += 1
        if not low <= value <= high:
            print(f"STALE {name}: {value} not in {low}..{high}", flush=True)
    print(f"answers {answers} hits {memo.stats.hits}", flush=True)
    runtime.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]))
