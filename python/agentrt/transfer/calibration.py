"""Which backend is fastest for which copy on this machine: measured once, kept in a file, read by every plan.

The table has a cell per (direction, block bytes, number of blocks) with the rate of each backend in stream time, from
its first driver call to its last byte. It is saved per (GPU, driver, host) under the user's cache folder, written
atomically, with a version; another version is ignored. `AGENTRT_CALIBRATION` overrides the path, and `off` makes
plans use the built-in rules.

A backend whose bytes differ from the reference during calibration is left out of the table and reported, whatever its
speed.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agentrt.transfer.device_code import cache_folder, write_atomically
from agentrt.transfer.errors import TransferError
from agentrt.transfer.pool import BlockPool, Space

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from agentrt.transfer.driver import DeviceInfo, Driver

VERSION = 1
#: Coarse first, so that a short budget still covers the range.
SIZES = tuple(kib << 10 for kib in (4, 64, 1024, 16, 256, 8, 32, 128, 512, 2048))
COUNTS = (16, 256, 4096, 64, 1024, 4)


@dataclass(frozen=True)
class Cell:
    """Rates of the backends, in GB/s, for one kind of copy."""

    direction: str
    block_bytes: int
    count: int
    gb_per_s: dict[str, float]


@dataclass
class Calibration:
    """A measured table."""

    device: str
    driver_version: int
    host: str
    cells: list[Cell] = field(default_factory=list)
    #: Backends that failed the byte check, and on what.
    wrong: dict[str, str] = field(default_factory=dict)

    def best(self, direction: str, block_bytes: int, count: int, usable: Iterable[str]) -> str | None:
        """The fastest usable backend in the nearest cell (by ratio, in size and count), or None without one."""
        names = set(usable)
        fitting = [cell for cell in self.cells if cell.direction == direction and names.intersection(cell.gb_per_s)]
        if not fitting or block_bytes <= 0 or count <= 0:
            return None

        def distance(cell: Cell) -> float:
            return abs(math.log2(cell.block_bytes / block_bytes)) + abs(math.log2(cell.count / count))

        rates = min(fitting, key=distance).gb_per_s
        return max(names.intersection(rates), key=lambda name: rates[name])

    def to_json(self) -> str:
        """The file's content."""
        cells = [vars(cell) for cell in self.cells]
        body = {"version": VERSION, "device": self.device, "driver_version": self.driver_version, "host": self.host}
        return json.dumps({**body, "wrong": self.wrong, "cells": cells}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Inverse of `to_json`; raises `TransferError` on anything else."""
        try:
            body: dict[str, Any] = json.loads(text)
            if body["version"] != VERSION:
                raise TransferError(f"calibration has version {body['version']}, this agentrt reads: {VERSION}")
            cells = [
                Cell(
                    str(c["direction"]),
                    int(c["block_bytes"]),
                    int(c["count"]),
                    {str(k): float(v) for k, v in c["gb_per_s"].items()},
                )
                for c in body["cells"]
            ]
            return cls(str(body["device"]), int(body["driver_version"]), str(body["host"]), cells, dict(body["wrong"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TransferError(f"not a calibration: {error!r}") from error

    def save(self, path: Path | None = None) -> Path:
        """Writes the file, by default where plans on this machine look for it."""
        path = path or calibration_path(self.device, self.driver_version)
        write_atomically(path, self.to_json().encode())
        return path


def calibration_path(device: str, driver_version: int) -> Path:
    """Where the table of a device lies, `AGENTRT_CALIBRATION` first."""
    override = os.environ.get("AGENTRT_CALIBRATION", "")
    if override and override != "off":
        return Path(override)
    name = "-".join(re.sub(r"\W+", "_", part) for part in (device, str(driver_version), platform.node() or "host"))
    return cache_folder() / "calibration" / f"v{VERSION}-{name}.json"


def load_calibration(info: DeviceInfo) -> Calibration | None:
    """The saved table of a device, or None.

    A file named by `AGENTRT_CALIBRATION` must be readable, one in the cache need not be.
    """
    override = os.environ.get("AGENTRT_CALIBRATION", "")
    if override == "off":
        return None
    path = calibration_path(info.name, info.driver_version)
    try:
        table = Calibration.from_json(path.read_text())
    except (OSError, TransferError) as error:
        if override:
            raise TransferError(f"AGENTRT_CALIBRATION cannot be used: {path}: {error}") from error
        return None
    return table


def calibrate(
    device: int = 0,
    *,
    driver: Driver | None = None,
    directions: Sequence[str] = ("h2d", "d2h", "d2d"),
    sizes: Sequence[int] = SIZES,
    counts: Sequence[int] = COUNTS,
    budget_s: float = 30.0,
    pool_bytes: int = 512 << 20,
    repeats: int = 3,
    save: bool = True,
) -> Calibration:
    """Measures every backend in every cell, checks its bytes first, saves the table and returns it.

    Takes twice `pool_bytes` of device memory, twice as much page-locked memory at most, and about `budget_s` seconds;
    a table cut short by its budget is still used, with the nearest measured cell.
    """
    from agentrt.transfer.driver import default_driver

    driver = driver or default_driver()
    info = driver.info(device)
    table = Calibration(info.name, info.driver_version, platform.node() or "host")
    deadline = time.monotonic() + budget_s
    rng = np.random.default_rng(0)
    for size in sizes:
        for direction in directions:
            if time.monotonic() > deadline:
                break
            _calibrate_size(table, driver, device, direction, size, counts, pool_bytes, repeats, deadline, rng)
    if save:
        table.save()
    return table


def _calibrate_size(
    table: Calibration,
    driver: Driver,
    device: int,
    direction: str,
    size: int,
    counts: Sequence[int],
    pool_bytes: int,
    repeats: int,
    deadline: float,
    rng: np.random.Generator,
) -> None:
    from agentrt.transfer.plan import CopyPlan

    # Twice as many blocks as pairs: taking every other one keeps runs from merging, which is what these cells are
    # about.
    num_blocks = min(2 * max(counts), pool_bytes // size)
    usable = [count for count in counts if 2 * count <= num_blocks]
    if not usable:
        return

    def pool(space: Space) -> BlockPool:
        return BlockPool.allocate(
            layers=1, num_blocks=num_blocks, block_bytes=size, space=space, device=device, driver=driver
        )

    src = pool(Space.PINNED if direction[0] == "h" else Space.DEVICE)
    dst = pool(Space.PINNED if direction[2] == "h" else Space.DEVICE)
    plan = CopyPlan(src, dst, driver=driver, calibration=Calibration("", 0, ""))
    names = [name for name in plan.available if name not in table.wrong and name != "dma_2d"]
    filling = pool(Space.PINNED)
    filling.view()[:] = rng.integers(0, 256, filling.total_bytes, dtype=np.uint8).reshape(filling.view().shape)
    everything = [(block, block) for block in range(num_blocks)]
    CopyPlan(filling, src, driver=driver, calibration=Calibration("", 0, "")).copy(
        everything, backend=_trusted(filling, src)
    ).wait()
    reading = pool(Space.PINNED)
    back = CopyPlan(dst, reading, driver=driver, calibration=Calibration("", 0, ""))
    for name in list(names):
        pairs = _pairs(rng, num_blocks, max(usable))
        plan.copy(pairs, backend=name).wait()
        back.copy(everything, backend=_trusted(dst, reading)).wait()
        if not np.array_equal(reading.view()[0, pairs[:, 1]], filling.view()[0, pairs[:, 0]]):
            table.wrong[name] = f"{direction}, {size} bytes x {len(pairs)}"
            names.remove(name)
    for count in usable:
        rates: dict[str, float] = {}
        for name in names:
            seconds = []
            for _ in range(repeats):
                pairs = _pairs(rng, num_blocks, count)
                seconds.append(plan.copy(pairs, backend=name).seconds)
            rates[name] = count * size / min(seconds) / 1e9
        if rates:
            table.cells.append(Cell(direction, size, count, rates))
        if time.monotonic() > deadline:
            return


def _trusted(src: BlockPool, dst: BlockPool) -> str:
    """Backend for filling and reading back: the copy engine where a device takes part, else the host's."""
    return "merged" if Space.DEVICE in (src.space, dst.space) else "rust"


def _pairs(rng: np.random.Generator, num_blocks: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    places = num_blocks // 2
    return np.stack([2 * rng.permutation(places)[:count], 2 * rng.permutation(places)[:count]], axis=1).astype(np.int64)
