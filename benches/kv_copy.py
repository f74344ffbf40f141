"""How fast do KV blocks move between host and device? One command, one table, under eight minutes.

    python benches/kv_copy.py                     # the whole plan, within --budget-s 480
    python benches/kv_copy.py --quick             # two minutes, fewer cells
    python benches/kv_copy.py --json results.json
    python benches/kv_copy.py --host              # host to host only: the backends of machines without a GPU
    python benches/kv_copy.py --dry-run           # the whole control flow on host memory, no GPU, numbers meaningless

Every method is checked byte for byte on random data, untouched blocks included, before it is timed; one that fails
the check is reported and never timed. The bulk-copy kernel runs first in a process of its own with a time limit, so
that a hang ends there. Rates are bytes that arrive per second of stream time, in GB/s: from the first driver call of
a copy to its last byte, host submission included. The wall column adds the library's checks, from the Python call to
completion. C is the best contiguous page-locked copy of the same direction in the same run, timed the same way.

Sections, each skipped when the budget is spent: ring check, ceilings, calibration, sweep, layers, CTAs, latency,
interference, int8, graph, both directions, bars.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agentrt.transfer import (
    BackendUnavailableError,
    BlockPool,
    Calibration,
    CopyPlan,
    Int8Encoding,
    SimulatedDriver,
    Space,
    calibrate,
    device_code,
)
from agentrt.transfer.driver import (
    FLAG_OVERLAP,
    ORDER_ANY,
    ORDER_STREAM,
    Allocation,
    CudaDriver,
    Driver,
    default_driver,
)

KIB, MIB = 1 << 10, 1 << 20
NO_TABLE = Calibration("", 0, "")


@dataclass
class Scale:
    """Sizes of a run."""

    arena: int
    contiguous: tuple[int, ...]
    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    cell_bytes: int
    repeats: int
    ctas: tuple[int, ...]
    calibration_s: float
    layered: tuple[tuple[int, int], ...]
    decode_bytes: int
    gemm: int


FULL = Scale(
    arena=1 << 30,
    contiguous=(1 * MIB, 16 * MIB, 256 * MIB, 1024 * MIB),
    sizes=tuple(KIB << n for n in range(2, 12)),
    counts=(16, 256, 1024, 4096, 16384),
    cell_bytes=256 * MIB,
    repeats=4,
    ctas=(1, 2, 4, 8, 16, 32, 66, 132),
    calibration_s=60,
    layered=((64, 32 * KIB), (160, 8 * KIB)),
    decode_bytes=4 << 30,
    gemm=8192,
)
QUICK = Scale(
    arena=512 * MIB,
    contiguous=(16 * MIB, 256 * MIB),
    sizes=(4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB, 256 * KIB, 2048 * KIB),
    counts=(16, 1024, 4096),
    cell_bytes=128 * MIB,
    repeats=3,
    ctas=(1, 4, 8, 32, 132),
    calibration_s=25,
    layered=((64, 32 * KIB), (160, 8 * KIB)),
    decode_bytes=2 << 30,
    gemm=8192,
)
DRY = Scale(
    arena=256 * KIB,
    contiguous=(64 * KIB,),
    sizes=(1 * KIB, 4 * KIB),
    counts=(4, 16),
    cell_bytes=64 * KIB,
    repeats=1,
    ctas=(1, 8),
    calibration_s=0.5,
    layered=((4, 1 * KIB),),
    decode_bytes=64 * KIB,
    gemm=16,
)


@dataclass
class Row:
    """One line of the table."""

    section: str
    direction: str
    method: str
    block_bytes: int = 0
    count: int = 0
    ctas: int = 0
    gb_per_s: float = 0.0
    of_c: float = 0.0
    wall_gb_per_s: float = 0.0
    note: str = ""


#: Runs a copy of these pairs, with at most that many CTAs, to its end; returns seconds on its stream.
Run = Callable[[Any, "int | None"], float]


@dataclass
class Bench:
    """The state of a run: memory, results, and what is left of the budget."""

    driver: Driver
    scale: Scale
    dry: bool
    deadline: float
    device: int = 0
    rows: list[Row] = field(default_factory=list)
    #: C by direction, and the best the SMs reach over contiguous memory.
    ceiling: dict[str, float] = field(default_factory=dict)
    sm_ceiling: dict[str, float] = field(default_factory=dict)
    table: Calibration = field(default_factory=lambda: NO_TABLE)
    wrong: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    ring: str = ""
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    arenas: dict[str, list[Allocation]] = field(default_factory=dict)
    _checked: dict[tuple[Any, ...], bool] = field(default_factory=dict)
    _staging: BlockPool | None = None

    def __post_init__(self) -> None:
        self.stream = self.driver.stream_create(self.device)
        self.other_stream = self.driver.stream_create(self.device)
        size = self.scale.arena
        self.arenas = {
            side: [Allocation(self.driver, size, space, self.device) for _ in range(2)]
            for side, space in (("h", Space.PINNED), ("d", Space.DEVICE))
        }
        self.random = self.rng.integers(0, 256, size, dtype=np.uint8)
        for arena in self.arenas["h"]:
            self.host_bytes(arena)[:] = self.random
        for arena in self.arenas["d"]:
            self.driver.copy(self.device, arena.address, self.arenas["h"][0].address, size, self.stream)
        self.driver.stream_synchronize(self.device, self.stream)

    # ---- memory ------------------------------------------------------------------------------------------------------

    def host_bytes(self, arena: Allocation) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A host arena as bytes."""
        return self.pool("h", 0, arena.nbytes, arena=arena).view()[0, 0]

    def pool(
        self,
        side: str,
        which: int,
        block_bytes: int,
        layers: int = 1,
        layout: str = "layers_blocks",
        encoding: Int8Encoding | None = None,
        arena: Allocation | None = None,
    ) -> BlockPool:
        """A pool over a whole arena."""
        arena = arena or self.arenas[side][which]
        blocks = arena.nbytes // (block_bytes * layers)
        first = layout == "layers_blocks"
        step, stride = (blocks * block_bytes, block_bytes) if first else (block_bytes, layers * block_bytes)
        return BlockPool.from_pointers(
            [arena.address + layer * step for layer in range(layers)],
            block_bytes=block_bytes,
            stride_bytes=stride,
            num_blocks=blocks,
            layers=layers,
            space=Space.PINNED if side == "h" else Space.DEVICE,
            device=None if side == "h" else self.device,
            encoding=encoding,
            owner=arena,
        )

    def pools(self, direction: str, block_bytes: int, **shape: Any) -> tuple[BlockPool, BlockPool]:
        """Source and destination of a direction; the device side is layers-first, the host side as given."""
        layouts = {"h": shape.get("host_layout", "layers_blocks"), "d": "layers_blocks"}
        layers = shape.get("layers", 1)
        source, target = direction[0], direction[2]
        return (
            self.pool(source, 0, block_bytes, layers, layouts[source]),
            self.pool(target, 1, block_bytes, layers, layouts[target]),
        )

    def pairs(self, src: BlockPool, dst: BlockPool, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Random pairs that never continue each other: every other block, shuffled on both sides."""
        a = 2 * self.rng.permutation(src.num_blocks // 2)[:count]
        b = 2 * self.rng.permutation(dst.num_blocks // 2)[:count]
        return np.stack([a, b], axis=1).astype(np.int64)

    # ---- results -----------------------------------------------------------------------------------------------------

    def add(
        self, section: str, direction: str, method: str, seconds: tuple[float, float], nbytes: int, **more: Any
    ) -> Row:
        """Records a rate; `seconds` are stream and wall time."""
        rate, wall = (nbytes / s / 1e9 if s > 0 else 0.0 for s in seconds)
        ceiling = self.ceiling.get(direction, 0.0)
        row = Row(
            section,
            direction,
            method,
            gb_per_s=rate,
            of_c=rate / ceiling if ceiling else 0.0,
            wall_gb_per_s=wall,
            **more,
        )
        self.rows.append(row)
        return row

    def out_of_time(self, what: str, reserve_s: float = 0.0) -> bool:
        """True when the budget does not reach for this; it is then listed as skipped."""
        if time.monotonic() + reserve_s < self.deadline:
            return False
        if what not in self.skipped:
            self.skipped.append(what)
        return True

    # ---- methods -----------------------------------------------------------------------------------------------------

    def timed(self, work: Callable[[], float], repeats: int | None = None) -> tuple[float, float]:
        """Best stream and wall time of some runs after a warm-up: what the path can do, without the host's hiccups."""
        work()
        stream = wall = float("inf")
        for _ in range(repeats or self.scale.repeats):
            start = time.perf_counter()
            stream = min(stream, work())
            wall = min(wall, time.perf_counter() - start)
        return stream, wall

    def on_stream(self, submit: Callable[[], None], stream: int) -> float:
        """Stream seconds of raw driver calls."""
        driver, device = self.driver, self.device
        first, last = driver.event_create(device), driver.event_create(device)
        driver.event_record(device, first, stream)
        submit()
        driver.event_record(device, last, stream)
        driver.event_wait(device, last)
        seconds = driver.event_seconds(device, first, last)
        driver.event_destroy(device, first)
        driver.event_destroy(device, last)
        return seconds

    def methods(self, plan: CopyPlan, variants: bool = True) -> dict[str, Run]:
        """Every way to run a plan."""
        found: dict[str, Run] = {}
        driver = self.driver

        def backend(plan: CopyPlan, name: str) -> Run:
            return lambda pairs, ctas: plan.copy(pairs, self.stream, backend=name, max_ctas=ctas).seconds

        for name in plan.available:
            if name != "bulk" or not self.ring:
                found[name] = backend(plan, name)
        auto = CopyPlan(plan.src, plan.dst, driver=driver, calibration=self.table)
        found["auto"] = backend(auto, "auto")
        if not variants:
            return found
        if "dma_batch" in found:

            def batch(order: int, flags: int) -> Run:
                def run(pairs: Any, ctas: int | None) -> float:
                    if isinstance(driver, CudaDriver):
                        driver.batch_options(order, flags)
                    try:
                        return plan.copy(pairs, self.stream, backend="dma_batch").seconds
                    finally:
                        if isinstance(driver, CudaDriver):
                            driver.batch_options(ORDER_STREAM, 0)

                return run

            def pieces(pairs: Any, ctas: int | None) -> float:
                def submit() -> None:
                    for n in range(0, len(pairs), 256):
                        plan.copy(pairs[n : n + 256], self.stream, backend="dma_batch")

                return self.on_stream(submit, self.stream)

            found["dma_batch any order"] = batch(ORDER_ANY, 0)
            found["dma_batch overlap"] = batch(ORDER_STREAM, FLAG_OVERLAP)
            found["dma_batch by 256"] = pieces
        block = plan.src.block_bytes
        specs: dict[str, tuple[str, device_code.KernelSpec]] = {}
        if "triton" in found:
            specs["triton 8 B"] = ("triton", device_code.copy_spec(block, 8))
            specs["triton 16 KiB tile"] = ("triton", device_code.copy_spec(block, 16, tile=16 * KIB, warps=8))
            specs["triton 64 KiB tile"] = ("triton", device_code.copy_spec(block, 16, tile=64 * KIB, warps=32))
        if "bulk" in found:
            specs["bulk 4 warps"] = ("bulk", device_code.bulk_spec(block, warps=4))
        for label, (name, spec) in specs.items():
            # A kernel backend with other compile-time constants.
            other = CopyPlan(plan.src, plan.dst, driver=driver, calibration=NO_TABLE)
            other._path(name).kernel = driver.load(spec, self.device)
            found[label] = backend(other, name)
        return found

    def correct(self, key: tuple[Any, ...], plan: CopyPlan, run: Run) -> bool:
        """Byte-for-byte check of a method on random data, untouched blocks included; each key once."""
        if key not in self._checked:
            try:
                problem = self.check(plan, run)
            except Exception as error:  # noqa: BLE001 - a method that fails is a result
                problem = f"{type(error).__name__}: {error}"
            if problem:
                self.wrong.append(f"{' '.join(map(str, key))}: {problem}")
            self._checked[key] = not problem
        return self._checked[key]

    def check(self, plan: CopyPlan, run: Run) -> str:
        """What is wrong with a method; empty if nothing is. Looks at a window of the first blocks of both pools."""
        bytes_per_block = plan.src.block_bytes * len(plan.src.bases)
        window = min(plan.src.num_blocks, plan.dst.num_blocks, max(8, min(128, 16 * MIB // bytes_per_block)))
        half = window // 2
        pairs = np.stack([2 * self.rng.permutation(half), 2 * self.rng.permutation(half)], axis=1).astype(np.int64)
        # Half of the pairs, so that every kind of neighbour stays untouched.
        pairs = pairs[: max(1, half * 3 // 4)]
        source = self.content(plan.src, window)
        # Other bytes than before in every target, so that a copy that does nothing is found out.
        self.fill(plan.dst, window, 0xA5)
        run(pairs, None)
        expected = np.full_like(source, 0xA5)
        expected[:, pairs[:, 1]] = source[:, pairs[:, 0]]
        good = np.array_equal(self.content(plan.dst, window), expected)
        kept = np.array_equal(self.content(plan.src, window), source)
        # Random bytes again, for the next check that reads them.
        self.fill(plan.dst, window, None)
        return "" if good and kept else "source was changed" if good else "bytes differ from the reference"

    def staging(self, nbytes: int) -> BlockPool:
        """Page-locked scratch memory, kept from call to call."""
        if self._staging is None or self._staging.block_bytes < nbytes:
            self._staging = BlockPool.allocate(
                layers=1, num_blocks=1, block_bytes=nbytes, space=Space.PINNED, driver=self.driver, device=self.device
            )
        return self._staging

    def content(self, pool: BlockPool, window: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Bytes [buffers, window, block] of the first blocks, from wherever they are."""
        if pool.space is not Space.DEVICE:
            return pool.view()[:, :window].copy()
        # Device pools are layers-first here: the first blocks of a buffer are one run.
        run = window * pool.block_bytes
        staged = self.staging(run * len(pool.bases))
        for buffer, base in enumerate(pool.bases.tolist()):
            self.driver.copy(self.device, int(staged.bases[0]) + buffer * run, base, run, self.stream)
        self.driver.stream_synchronize(self.device, self.stream)
        return staged.view()[0, 0, : run * len(pool.bases)].reshape(len(pool.bases), window, pool.block_bytes).copy()

    def fill(self, pool: BlockPool, window: int, value: int | None) -> None:
        """Sets the first blocks to a value, or to random bytes, by the plainest means."""
        shape = (len(pool.bases), window, pool.block_bytes)
        nbytes = shape[0] * shape[1] * shape[2]
        data = np.full(nbytes, value, np.uint8) if value is not None else self.random[:nbytes]
        if pool.space is not Space.DEVICE:
            pool.view()[:, :window] = data.reshape(shape)
            return
        staged, run = self.staging(nbytes), window * pool.block_bytes
        staged.view()[0, 0, :nbytes] = data
        for buffer, base in enumerate(pool.bases.tolist()):
            self.driver.copy(self.device, base, int(staged.bases[0]) + buffer * run, run, self.stream)
        self.driver.stream_synchronize(self.device, self.stream)


# ---- sections --------------------------------------------------------------------------------------------------------


def ring_check(bench: Bench) -> None:
    """The bulk kernel in a process of its own: a kernel that hangs takes only that process with it."""
    command = [sys.executable, __file__, "--child-ring-check", "--device", str(bench.device)]
    command += ["--dry-run"] if bench.dry else []
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        if result.returncode:
            bench.ring = (result.stderr.strip().splitlines() or ["failed without a word"])[-1]
    except subprocess.TimeoutExpired:
        bench.ring = "hung for 90 s"
    bench.rows.append(Row("ring check", "h2d", "bulk", note=bench.ring or "bytes are right"))


def child_ring_check(driver: Driver, device: int) -> int:
    """What the child does: both directions, several sizes, with padding of the grid."""
    for size in (4 * KIB, 20 * KIB):
        for spaces in ((Space.PINNED, Space.DEVICE), (Space.DEVICE, Space.PINNED)):
            host, src, dst, back = (
                BlockPool.allocate(layers=2, num_blocks=64, block_bytes=size, space=space, driver=driver, device=device)
                for space in (Space.PINNED, *spaces, Space.PINNED)
            )
            host.view()[:] = np.random.default_rng(size).integers(0, 256, host.view().shape, dtype=np.uint8)
            everything = [(n, n) for n in range(64)]
            options: dict[str, Any] = {"driver": driver, "calibration": NO_TABLE}
            fill = CopyPlan(host, src, **options) if src.space is Space.DEVICE else None
            if fill is not None:
                fill.copy(everything, backend="merged").wait()
            else:
                src.view()[:] = host.view()
            plan = CopyPlan(src, dst, **options)
            if "bulk" not in plan.available:
                print(f"bulk is not available: {plan.unavailable['bulk']}", file=sys.stderr)
                return 1
            plan.copy([(n, 63 - n) for n in range(64)], backend="bulk").wait()
            if dst.space is Space.DEVICE:
                CopyPlan(dst, back, **options).copy(everything, backend="merged").wait()
            else:
                back.view()[:] = dst.view()
            if not np.array_equal(back.view()[:, ::-1], host.view()):
                print(f"bytes are wrong: {size} byte blocks, {plan.direction}", file=sys.stderr)
                return 1
    return 0


def ceilings(bench: Bench) -> None:
    """Contiguous copies, one way and both ways, by the copy engine and by all SMs."""
    driver, device = bench.driver, bench.device
    usable = [size for size in bench.scale.contiguous if size <= bench.scale.arena]
    for direction in ("h2d", "d2h", "d2d"):
        src, dst = bench.arenas[direction[0]][0].address, bench.arenas[direction[2]][1].address
        for size in usable:

            def work(src: int = src, dst: int = dst, size: int = size) -> float:
                return bench.on_stream(lambda: driver.copy(device, dst, src, size, bench.stream), bench.stream)

            row = bench.add(
                "ceiling", direction, "contiguous memcpy", bench.timed(work), size, block_bytes=size, count=1
            )
            bench.ceiling[direction] = max(bench.ceiling.get(direction, 0.0), row.gb_per_s)
    for row in bench.rows:
        if row.section == "ceiling":
            row.of_c = row.gb_per_s / bench.ceiling[row.direction]
    size = usable[-1]

    def both() -> float:
        start = time.perf_counter()
        driver.copy(device, bench.arenas["d"][0].address, bench.arenas["h"][0].address, size, bench.stream)
        driver.copy(device, bench.arenas["h"][1].address, bench.arenas["d"][1].address, size, bench.other_stream)
        driver.stream_synchronize(device, bench.stream)
        driver.stream_synchronize(device, bench.other_stream)
        return time.perf_counter() - start

    row = bench.add("ceiling", "both", "contiguous memcpy", bench.timed(both), 2 * size, block_bytes=size, count=2)
    row.of_c = row.gb_per_s / bench.ceiling["h2d"]
    bench.ceiling["both"] = row.gb_per_s
    block = min(32 * KIB, bench.scale.arena // 16)
    multiprocessors = driver.info(device).multiprocessors
    for direction in ("h2d", "d2h", "d2d"):
        plan = CopyPlan(*bench.pools(direction, block), driver=driver, calibration=NO_TABLE)
        for backend in ("triton", "bulk"):
            if backend not in plan.available or (backend == "bulk" and bench.ring):
                continue
            count = min(bench.scale.cell_bytes, bench.scale.arena) // block
            pairs = np.stack([np.arange(count), np.arange(count)], axis=1)

            def run(pairs: Any, ctas: int | None, plan: CopyPlan = plan, backend: str = backend) -> float:
                return plan.copy(pairs, bench.stream, backend=backend, max_ctas=ctas).seconds

            if bench.correct(("ceiling", direction, backend), plan, run):
                seconds = bench.timed(lambda: run(pairs, multiprocessors))  # noqa: B023 - called at once
                row = bench.add(
                    "ceiling",
                    direction,
                    f"{backend}, all SMs",
                    seconds,
                    count * block,
                    block_bytes=block,
                    count=count,
                    ctas=multiprocessors,
                )
                bench.sm_ceiling[direction] = max(bench.sm_ceiling.get(direction, 0.0), row.gb_per_s)


def calibration(bench: Bench) -> None:
    """The table behind `auto`, measured in this run and not saved."""
    scale = bench.scale
    left = max(0.0, bench.deadline - time.monotonic())
    bench.table = calibrate(
        bench.device,
        driver=bench.driver,
        sizes=[
            size
            for size in (4 * KIB, 64 * KIB, 16 * KIB, 8 * KIB, 32 * KIB, 256 * KIB, 1024 * KIB)
            if size in scale.sizes or not bench.dry
        ],
        counts=[count for count in (16, 1024, 4096, 256, 64, 4) if not bench.dry or count <= 16],
        budget_s=min(scale.calibration_s, left / 4),
        pool_bytes=scale.arena // 2,
        repeats=2,
        save=False,
    )
    if bench.ring:
        for cell in bench.table.cells:
            cell.gb_per_s.pop("bulk", None)
    bench.wrong += [f"calibration: {name}: {what}" for name, what in bench.table.wrong.items()]
    bench.rows.append(Row("calibration", "all", "auto", count=len(bench.table.cells), note="cells measured"))


def sweep(bench: Bench) -> None:
    """Block size x count x direction x method."""
    scale = bench.scale
    for direction in ("h2d", "d2h", "d2d"):
        for size in scale.sizes:
            if bench.out_of_time(f"sweep {direction} from {size} bytes", 15 if not bench.dry else 0):
                break
            plan = CopyPlan(*bench.pools(direction, size), driver=bench.driver, calibration=NO_TABLE)
            methods = bench.methods(plan)
            torch_way = staged_by_torch(bench, plan)
            if torch_way is not None:
                methods["torch index + copy"] = torch_way
            for count in scale.counts:
                if count * size > scale.cell_bytes or 2 * count > plan.src.num_blocks:
                    continue
                pairs = bench.pairs(plan.src, plan.dst, count)
                for name, run in methods.items():
                    if name == "dma_2d" or (name == "merged" and count > 4096):
                        continue
                    if bench.correct((direction, size, name), plan, run):
                        seconds = bench.timed(lambda: run(pairs, None))  # noqa: B023 - called at once
                        bench.add("sweep", direction, name, seconds, count * size, block_bytes=size, count=count)


def staged_by_torch(bench: Bench, plan: CopyPlan) -> Run | None:
    """What a framework does without a copy library: gather, then one copy; or one copy, then scatter."""
    if bench.dry or plan.direction == "d2d":
        return None
    import torch

    size, words = plan.src.block_bytes, plan.src.block_bytes // 8
    stream = torch.cuda.ExternalStream(bench.stream, device=bench.device)
    device_pool = plan.dst if plan.direction == "h2d" else plan.src
    flat = _cuda_tensor(torch, int(device_pool.bases[0]), device_pool.total_bytes // 8, bench.device)
    blocks = flat.view(device_pool.num_blocks, words)
    host_pool = plan.src if plan.direction == "h2d" else plan.dst
    host = host_pool.view()[0].view(np.int64)
    most = max(count for count in bench.scale.counts if count * size <= bench.scale.cell_bytes)
    staging = torch.empty(max(most, 64), words, dtype=torch.int64, pin_memory=True)

    def run(pairs: Any, ctas: int | None) -> float:
        n = len(pairs)
        start = time.perf_counter()
        with torch.cuda.stream(stream):
            if plan.direction == "h2d":
                np.take(host, pairs[:, 0], axis=0, out=staging[:n].numpy())
                index = torch.from_numpy(pairs[:, 1].copy()).to(blocks.device)
                blocks.index_copy_(0, index, staging[:n].to(blocks.device, non_blocking=True))
                stream.synchronize()
            else:
                index = torch.from_numpy(pairs[:, 0].copy()).to(blocks.device)
                staging[:n].copy_(blocks.index_select(0, index), non_blocking=True)
                stream.synchronize()
                host[pairs[:, 1]] = staging[:n].numpy()
        return time.perf_counter() - start

    return run


def _cuda_tensor(torch: Any, address: int, words: int, device: int) -> Any:
    """A torch view of device memory, by the interface NumPy-like CUDA libraries share."""

    class Memory:
        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            return {"shape": (words,), "typestr": "<i8", "data": (address, False), "version": 3}

    return torch.as_tensor(Memory(), device=f"cuda:{device}")


def layers(bench: Bench) -> None:
    """Whole blocks of many layers: device caches layer-first, host tier layer-first or block-first."""
    for n_layers, size in bench.scale.layered:
        for host_layout in ("blocks_layers", "layers_blocks"):
            for direction in ("h2d", "d2h"):
                if bench.out_of_time(f"layers {n_layers} x {size}", 90 if not bench.dry else 0):
                    return
                pools = bench.pools(direction, size, layers=n_layers, host_layout=host_layout)
                plan = CopyPlan(*pools, driver=bench.driver, calibration=NO_TABLE)
                count = max(1, min(32, plan.src.num_blocks // 2))
                pairs = bench.pairs(plan.src, plan.dst, count)
                for name, run in bench.methods(plan, variants=False).items():
                    if bench.correct(("layers", n_layers, size, host_layout, direction, name), plan, run):
                        seconds = bench.timed(lambda: run(pairs, None))  # noqa: B023 - called at once
                        note = f"{n_layers} layers, host {host_layout}"
                        bench.add(
                            "layers",
                            direction,
                            name,
                            seconds,
                            count * n_layers * size,
                            block_bytes=size,
                            count=count,
                            note=note,
                        )


def ctas(bench: Bench) -> None:
    """How many CTAs a kernel needs."""
    for direction in ("h2d", "d2h"):
        for size in [size for size in (4 * KIB, 8 * KIB, 16 * KIB) if size in bench.scale.sizes]:
            if bench.out_of_time(f"CTAs {direction} {size}", 75 if not bench.dry else 0):
                return
            plan = CopyPlan(*bench.pools(direction, size), driver=bench.driver, calibration=NO_TABLE)
            count = min(4096, bench.scale.cell_bytes // size, plan.src.num_blocks // 2)
            pairs = bench.pairs(plan.src, plan.dst, count)
            for name, run in bench.methods(plan).items():
                if not name.startswith(("triton", "bulk")) or not bench.correct((direction, size, name), plan, run):
                    continue
                for limit in bench.scale.ctas:
                    seconds = bench.timed(lambda: run(pairs, limit))  # noqa: B023 - called at once
                    bench.add("ctas", direction, name, seconds, count * size, block_bytes=size, count=count, ctas=limit)


def latency(bench: Bench) -> None:
    """Four blocks of 32 KiB, submission to completion."""
    size = max(size for size in bench.scale.sizes if size <= 32 * KIB)
    for direction in ("h2d", "d2h"):
        plan = CopyPlan(*bench.pools(direction, size), driver=bench.driver, calibration=NO_TABLE)
        pairs = bench.pairs(plan.src, plan.dst, 4)
        for name, run in bench.methods(plan).items():
            if not bench.correct((direction, size, name), plan, run):
                continue
            times, on_stream = [], []
            for _ in range(200 if not bench.dry else 3):
                start = time.perf_counter()
                on_stream.append(run(pairs, None))
                times.append(time.perf_counter() - start)
            middle, slow = np.percentile(times, [50, 99])
            seconds = (float(np.median(on_stream)), float(middle))
            row = bench.add("latency", direction, name, seconds, 4 * size, block_bytes=size, count=4)
            row.note = f"p50 {middle * 1e6:.1f} us, p99 {slow * 1e6:.1f} us"


def interference(bench: Bench) -> None:
    """A bandwidth-bound decode-like chain and a large matrix product, alone and while blocks move."""
    size = 8 * KIB if 8 * KIB in bench.scale.sizes else min(bench.scale.sizes)
    for label, compute in loads(bench):
        compute()
        alone = min(compute() for _ in range(3))
        bench.rows.append(Row("interference", "-", label, note=f"alone {alone * 1e3:.3f} ms"))
        for direction in ("h2d", "d2h"):
            plan = CopyPlan(*bench.pools(direction, size), driver=bench.driver, calibration=NO_TABLE)
            count = min(4096, bench.scale.cell_bytes // size, plan.src.num_blocks // 2)
            pairs = bench.pairs(plan.src, plan.dst, count)
            for name in ("dma_batch", "triton", "bulk"):
                if bench.out_of_time(f"interference {label} {direction} {name}", 40 if not bench.dry else 0):
                    return
                if name not in plan.available or (name == "bulk" and bench.ring):
                    continue

                def run(pairs: Any, limit: int | None, plan: CopyPlan = plan, name: str = name) -> float:
                    return plan.copy(pairs, bench.stream, backend=name, max_ctas=limit).seconds

                if not bench.correct((direction, size, name), plan, run):
                    continue
                one, _ = bench.timed(lambda: run(pairs, None), 2)  # noqa: B023 - called at once
                # Enough copies to outlast the load by half, all in one stream and so in order.
                copies = max(2, min(400, int(1.5 * alone / one) + 2))
                handles = [plan.copy(pairs, bench.stream, backend=name) for _ in range(copies)]
                slowed = compute()
                overlapped = not handles[-1].done()
                for handle in handles:
                    handle.wait()
                busy = sum(handle.seconds for handle in handles)
                row = bench.add(
                    "interference", direction, name, (busy, busy), copies * count * size, block_bytes=size, count=count
                )
                row.note = f"{label} {100 * (slowed / alone - 1):+.1f} %" + (
                    "" if overlapped else " (copies ended first)"
                )


def loads(bench: Bench) -> Iterator[tuple[str, Callable[[], float]]]:
    """(name, run once and return seconds)."""
    if bench.dry:

        def small() -> float:
            start = time.perf_counter()
            _ = np.ones((16, 16)) @ np.ones((16, 16))
            return time.perf_counter() - start

        yield "decode chain", small
        yield "gemm", small
        return
    import torch

    def timed_on(stream: Any, work: Callable[[], Any]) -> float:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            first.record()
            work()
            last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    stream = torch.cuda.Stream()
    layers_of = max(1, bench.scale.decode_bytes // (8192 * 8192 * 2))
    weights = [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(layers_of)]
    vector = torch.randn(8192, 4, device="cuda", dtype=torch.bfloat16)
    chain = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        weights[0] @ vector  # the library's workspace is made outside the capture
    stream.synchronize()
    with torch.cuda.graph(chain, stream=stream):
        x = vector
        for weight in weights:
            x = torch.tanh(weight @ x)

    def decode() -> None:
        for _ in range(10):
            chain.replay()

    yield "decode chain", lambda: timed_on(stream, decode)
    del weights
    a = torch.randn(bench.scale.gemm, bench.scale.gemm, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(bench.scale.gemm, bench.scale.gemm, device="cuda", dtype=torch.bfloat16)
    stream.wait_stream(torch.cuda.current_stream())

    def products() -> None:
        for _ in range(10):
            torch.matmul(a, b)

    yield "gemm", lambda: timed_on(stream, products)


def int8(bench: Bench) -> None:
    """Lossy transport: plain bytes that arrive per second, and the error."""
    row_elements, rows = 128, 64
    encoding = Int8Encoding(row=row_elements, dtype="bfloat16")
    plain_bytes = rows * row_elements * 2
    if bench.dry:
        rows = 4
        plain_bytes = rows * row_elements * 2
    coded_bytes = encoding.encoded_bytes(plain_bytes)
    plain = bench.pool("d", 0, plain_bytes)
    coded = bench.pool("h", 1, coded_bytes, encoding=encoding)
    back = bench.pool("d", 1, plain_bytes)
    # Ordinary numbers: random bytes would hold infinities, which this transport does not carry.
    from agentrt.kernels import reference

    count = min(2048, bench.scale.cell_bytes // plain_bytes, plain.num_blocks // 2, coded.num_blocks // 2)
    values = bench.rng.normal(size=(count, rows * row_elements)).astype(np.float32)
    host = bench.pool("h", 0, plain_bytes)
    host.view()[0, :count] = reference.from_float32(values, "bfloat16")
    original = host.view()[0, :count].copy()
    line = [(n, n) for n in range(count)]
    try:
        CopyPlan(host, plain, driver=bench.driver, calibration=NO_TABLE).copy(line, bench.stream).wait()
        out = CopyPlan(plain, coded, driver=bench.driver, calibration=NO_TABLE)
        home = CopyPlan(coded, back, driver=bench.driver, calibration=NO_TABLE)
        down = bench.timed(lambda: out.copy(line, bench.stream).seconds)
        up = bench.timed(lambda: home.copy(line, bench.stream).seconds)
        check = bench.pool("h", 0, plain_bytes)
        CopyPlan(back, check, driver=bench.driver, calibration=NO_TABLE).copy(line, bench.stream).wait()
    except BackendUnavailableError as error:
        bench.rows.append(Row("int8", "-", "int8", note=str(error)))
        return
    wanted = reference.to_float32(original, "bfloat16").reshape(count, rows, row_elements)
    got = reference.to_float32(check.view()[0, :count], "bfloat16").reshape(count, rows, row_elements)
    error = float((np.abs(got - wanted).max(-1) / np.abs(wanted).max(-1)).max())
    if error > reference.INT8_ERROR_BOUND:
        bench.wrong.append(f"int8: error {error:.4f} of the row's absmax")
    for direction, seconds in (("d2h", down), ("h2d", up)):
        row = bench.add("int8", direction, "int8", seconds, count * plain_bytes, block_bytes=plain_bytes, count=count)
        row.note = f"plain bytes; error {100 * error:.2f} % of absmax"
    bench.host_bytes(bench.arenas["h"][0])[:] = bench.random


def graph(bench: Bench) -> None:
    """A kernel copy inside a CUDA graph, replayed with new pairs."""
    size = min(bench.scale.sizes)
    plan = CopyPlan(*bench.pools("h2d", size), driver=bench.driver, calibration=NO_TABLE)
    if "triton" not in plan.available:
        bench.rows.append(Row("graph", "h2d", "triton", note=plan.unavailable["triton"]))
        return
    count = min(1024, bench.scale.cell_bytes // size, plan.src.num_blocks // 2)
    fixed = plan.graph_copy(count)
    with replayer(bench, fixed.enqueue) as (stream, replay):

        def run(pairs: Any, _: int | None) -> float:
            start = time.perf_counter()
            fixed.set_pairs(pairs)
            replay()
            fixed.launched(stream).wait()
            return time.perf_counter() - start

        if bench.correct(("graph", size), plan, run):
            changing = iter([bench.pairs(plan.src, plan.dst, count - n) for n in range(bench.scale.repeats + 1)])
            seconds = bench.timed(lambda: run(next(changing), None))
            bench.add(
                "graph",
                "h2d",
                "triton",
                seconds,
                count * size,
                block_bytes=size,
                count=count,
                note="new pairs each replay",
            )


@contextlib.contextmanager
def replayer(bench: Bench, enqueue: Callable[[Any], None]) -> Iterator[tuple[int, Callable[[], None]]]:
    """(stream, replay) of a graph that holds what `enqueue` queues."""
    if bench.dry:
        yield bench.stream, lambda: enqueue(bench.stream)
        return
    import torch

    stream = torch.cuda.Stream()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        enqueue(stream)

    def replay() -> None:
        with torch.cuda.stream(stream):
            captured.replay()

    yield int(stream.cuda_stream), replay


def both_directions(bench: Bench) -> None:
    """Eviction and prefetch at once, by `auto` and by each engine."""
    for size in [size for size in (16 * KIB, 64 * KIB, 256 * KIB) if size in bench.scale.sizes] or [
        min(bench.scale.sizes)
    ]:
        if bench.out_of_time(f"both directions {size}", 15 if not bench.dry else 0):
            return
        up = CopyPlan(bench.pool("h", 0, size), bench.pool("d", 0, size), driver=bench.driver, calibration=bench.table)
        down = CopyPlan(
            bench.pool("d", 1, size), bench.pool("h", 1, size), driver=bench.driver, calibration=bench.table
        )
        count = min(2048, bench.scale.cell_bytes // size, up.src.num_blocks // 2)
        pairs = bench.pairs(up.src, up.dst, count)
        for name in ("auto", "dma_batch", "triton"):
            if name != "auto" and not (name in up.available and name in down.available):
                continue

            def run(up: CopyPlan = up, down: CopyPlan = down, name: str = name, pairs: Any = pairs) -> float:
                start = time.perf_counter()
                a = up.copy(pairs, bench.stream, backend=name)
                b = down.copy(pairs, bench.other_stream, backend=name)
                a.wait()
                b.wait()
                return time.perf_counter() - start

            row = bench.add("both", "both", name, bench.timed(run), 2 * count * size, block_bytes=size, count=count)
            row.of_c = row.gb_per_s / bench.ceiling["h2d"]


def bars(bench: Bench) -> None:
    """The targets, against this run's own ceilings."""

    def best(section: str, direction: str, keep: Callable[[Row], bool], worst_cell: bool) -> float | None:
        cells: dict[tuple[int, int], float] = {}
        for row in bench.rows:
            if row.section == section and row.direction == direction and keep(row):
                key = (row.block_bytes, row.count)
                cells[key] = max(cells.get(key, 0.0), row.of_c)
        return None if not cells else min(cells.values()) if worst_cell else max(cells.values())

    def bar(what: str, value: float | None, target: float, at_most: bool = False) -> None:
        if value is None:
            note = "not measured"
        else:
            met = value <= target if at_most else value >= target
            note = f"{value:.3f} against {'<=' if at_most else '>='} {target}: {'met' if met else 'missed'}"
        bench.rows.append(Row("bar", "", what, note=note))

    for direction in ("h2d", "d2h"):
        value = best(
            "sweep",
            direction,
            lambda r: r.method == "auto" and r.block_bytes >= 32 * KIB and r.block_bytes * r.count >= 8 * MIB,
            True,
        )
        bar(f"auto {direction}, blocks >= 32 KiB, batch >= 8 MiB, of C", value, 0.95)
    for sizes, target in (((8 * KIB, 16 * KIB), 0.90), ((4 * KIB,), 0.80)):
        label = " and ".join(f"{size // KIB}" for size in sizes)
        value = best("ctas", "h2d", lambda r: r.ctas <= 8 and r.block_bytes in sizes and r.count >= 1024, True)  # noqa: B023
        bar(f"kernel h2d {label} KiB, <= 8 CTAs, of C", value, target)
        cap = bench.sm_ceiling.get("h2d")
        if value is not None and cap:
            bar(f"kernel h2d {label} KiB, <= 8 CTAs, of what all SMs reach", value * bench.ceiling["h2d"] / cap, target)
    bar(
        "auto d2h, blocks >= 16 KiB, count >= 256, of C",
        best("sweep", "d2h", lambda r: r.method == "auto" and r.block_bytes >= 16 * KIB and r.count >= 256, True),
        0.95,
    )
    bar(
        "best kernel d2d, blocks >= 16 KiB, count >= 1024, of device memcpy",
        best(
            "sweep",
            "d2d",
            lambda r: r.method.startswith(("triton", "bulk", "auto")) and r.block_bytes >= 16 * KIB and r.count >= 1024,
            True,
        ),
        0.90,
    )
    regrets = []
    cells: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in bench.rows:
        if row.section == "sweep" and row.method in ("auto", "merged", "dma_batch", "triton", "bulk"):
            cells.setdefault((row.direction, row.block_bytes, row.count), {})[row.method] = row.gb_per_s
    for rates in cells.values():
        others = [rate for name, rate in rates.items() if name != "auto"]
        if "auto" in rates and others and max(others) > 0:
            regrets.append(1 - rates["auto"] / max(others))
    bar("regret of auto against the best backend, worst cell", max(regrets) if regrets else None, 0.05, at_most=True)
    slow = [
        float(r.note.split("%")[0].split()[-1]) / 100
        for r in bench.rows
        if r.section == "interference" and "decode chain" in r.note and "%" in r.note
    ]
    bar("decode slowdown while copying, worst method", max(slow) if slow else None, 0.05, at_most=True)
    both = [row.of_c for row in bench.rows if row.section == "both" and row.method == "auto"]
    bar("auto both directions at once, of C one way", max(both) if both else None, 1.4)


def host_rows(arena: int) -> list[Row]:
    """Scattered blocks from one host array to another, by each way there is, checked before they are timed."""
    rng = np.random.default_rng(0)
    source, target = rng.integers(0, 256, arena, dtype=np.uint8), np.zeros(arena, np.uint8)
    rows: list[Row] = []

    def best(work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    def whole() -> None:
        target[: arena // 2] = source[: arena // 2]

    ceiling = arena // 2 / best(whole) / 1e9
    rows.append(Row("host", "h2h", "numpy, one contiguous copy", arena // 2, 1, 0, ceiling, 1.0))
    for size in (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 2048 * KIB):
        blocks = arena // size
        count = blocks // 2
        src, dst = source.reshape(1, blocks, size), target.reshape(1, blocks, size)
        pairs = np.stack([2 * rng.permutation(count), 2 * rng.permutation(count)], axis=1).astype(np.int64)
        plan = CopyPlan(BlockPool.from_array(src, "layers_blocks"), BlockPool.from_array(dst, "layers_blocks"))
        ways: dict[str, Callable[[], object]] = {
            "rust": lambda plan=plan, pairs=pairs: plan.copy(pairs, backend="rust"),  # type: ignore[misc]
            "reference (numpy loop)": lambda plan=plan, pairs=pairs: plan.copy(pairs, backend="reference"),  # type: ignore[misc]
            "numpy index assignment": lambda a=src, b=dst, p=pairs: b[0].__setitem__(p[:, 1], a[0][p[:, 0]]),  # type: ignore[misc]
        }
        with contextlib.suppress(ImportError):
            import torch

            a, b, p = (torch.from_numpy(x) for x in (src[0].view(np.int64), dst[0].view(np.int64), pairs))
            ways["torch index_copy_, int64"] = lambda a=a, b=b, p=p: b.index_copy_(0, p[:, 1], a[p[:, 0]])  # type: ignore[misc]
        for name, work in ways.items():
            target[:] = 0xA5
            work()
            right = np.array_equal(dst[0, pairs[:, 1]], src[0, pairs[:, 0]]) and bool((dst[0, 1::2] == 0xA5).all())
            rate = count * size / best(work) / 1e9 if right else 0.0
            rows.append(
                Row("host", "h2h", name, size, count, 0, rate, rate / ceiling, note="" if right else "WRONG BYTES")
            )
    return rows


SECTIONS: tuple[tuple[str, Callable[[Bench], None], float], ...] = (
    ("ring check", ring_check, 0),
    ("ceilings", ceilings, 0),
    ("calibration", calibration, 0),
    ("latency", latency, 0),
    ("ctas", ctas, 0),
    ("interference", interference, 0),
    ("int8", int8, 0),
    ("graph", graph, 0),
    ("both", both_directions, 0),
    ("layers", layers, 0),
    ("sweep", sweep, 0),
)


def environment(driver: Driver, device: int) -> dict[str, str]:
    """What a reader needs to compare runs."""
    info = driver.info(device)
    found = {
        "device": f"{info.name}, sm_{info.sm}, {info.multiprocessors} SMs",
        "driver": f"CUDA {info.driver_version // 1000}.{info.driver_version % 1000 // 10}",
        "host": f"{platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}",
        "python": platform.python_version(),
        "numa": _numa_node(device),
    }
    for name in ("torch", "triton"):
        with contextlib.suppress(Exception):
            from importlib.metadata import version

            found[name] = version(name)
    found["nvrtc"] = "missing" if device_code.nvrtc_missing() else ".".join(map(str, device_code.nvrtc_version()))
    found["command"] = " ".join(["python", "benches/kv_copy.py", *sys.argv[1:]])
    return found


def _numa_node(device: int) -> str:
    with contextlib.suppress(Exception):
        import torch

        p = torch.cuda.get_device_properties(device)
        path = Path(f"/sys/bus/pci/devices/{p.pci_domain_id:04x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0/numa_node")
        return path.read_text().strip()
    return "unknown"


def table(rows: list[Row]) -> str:
    """All rows, aligned."""
    form = "{:<13}{:<5}{:<66}{:>9}{:>7}{:>5}{:>9}{:>7}{:>9}  {}"
    head = form.format("section", "dir", "method", "block", "count", "CTAs", "GB/s", "of C", "wall", "note")
    lines = [head, "-" * len(head)]
    for row in rows:
        size = f"{row.block_bytes / KIB:g} KiB" if row.block_bytes else ""
        rate = f"{row.gb_per_s:.2f}" if row.gb_per_s else ""
        share = f"{row.of_c:.3f}" if row.of_c else ""
        wall = f"{row.wall_gb_per_s:.2f}" if row.wall_gb_per_s else ""
        count, limit = str(row.count or ""), str(row.ctas or "")
        lines.append(
            form.format(
                row.section, row.direction, row.method, size, count, limit, rate, share, wall, row.note
            ).rstrip()
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cells, about two minutes")
    parser.add_argument("--json", type=Path, help="also write every row to this file")
    parser.add_argument(
        "--budget-s", type=float, default=480.0, help="seconds after which sections are skipped (default 480)"
    )
    parser.add_argument("--device", type=int, default=0, help="CUDA device (default 0)")
    parser.add_argument(
        "--dry-run", action="store_true", help="the whole control flow on host memory; numbers mean nothing"
    )
    parser.add_argument(
        "--sections", nargs="*", choices=[name for name, _, _ in SECTIONS], help="only these (ceilings always run)"
    )
    parser.add_argument("--host", action="store_true", help="only copies between host pools, no GPU needed")
    parser.add_argument("--child-ring-check", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.host:
        print(table(host_rows(8 * MIB if options.dry_run else 256 * MIB)))
        return 0
    try:
        driver: Driver = SimulatedDriver() if options.dry_run else default_driver()
    except BackendUnavailableError as error:
        print(f"{error}\nUse --dry-run to see the control flow without a GPU.", file=sys.stderr)
        return 2
    if options.child_ring_check:
        return child_ring_check(driver, options.device)
    if not options.dry_run:
        import torch

        torch.cuda.set_device(options.device)
        torch.cuda.init()
    scale = DRY if options.dry_run else QUICK if options.quick else FULL
    begin = time.monotonic()
    facts = environment(driver, options.device)
    for key, value in facts.items():
        print(f"{key:>8}: {value}")
    bench = Bench(driver, scale, options.dry_run, begin + options.budget_s, options.device)
    for name, section, reserve in SECTIONS:
        if options.sections and name not in (*options.sections, "ceilings"):
            continue
        if name != "ceilings" and bench.out_of_time(name, reserve):
            continue
        start = time.monotonic()
        try:
            section(bench)
        except Exception as error:  # noqa: BLE001 - one section must not cost the others
            bench.wrong.append(f"{name}: {type(error).__name__}: {error}")
        print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr)
    bars(bench)
    print(table(bench.rows))
    for title, lines in (("failed", bench.wrong), ("skipped for lack of time", bench.skipped)):
        if lines:
            print(f"\n{title}:\n  " + "\n  ".join(lines))
    print(
        f"\n{time.monotonic() - begin:.0f} s" + (", dry run: no figure above means anything" if options.dry_run else "")
    )
    if options.json:
        body = {
            "environment": facts,
            "rows": [asdict(row) for row in bench.rows],
            "failed": bench.wrong,
            "skipped": bench.skipped,
        }
        options.json.write_text(json.dumps(body, indent=1))
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
