"""Which backend `auto` takes, and the calibration behind it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from agentrt.transfer import (
    BackendUnavailableError,
    BlockPool,
    Calibration,
    CopyPlan,
    SimulatedDriver,
    Space,
    TransferError,
    calibrate,
    load_calibration,
)
from agentrt.transfer.calibration import Cell, calibration_path

if TYPE_CHECKING:
    from pathlib import Path


def pools(driver: SimulatedDriver, size: int, direction: str, blocks: int = 128) -> tuple[BlockPool, BlockPool]:
    made = [
        BlockPool.allocate(
            layers=1,
            num_blocks=blocks,
            block_bytes=size,
            space=Space.PINNED if side == "h" else Space.DEVICE,
            driver=driver,
        )
        for side in (direction[0], direction[2])
    ]
    return made[0], made[1]


def scattered(count: int) -> list[tuple[int, int]]:
    return [(2 * n, 2 * ((n * 7) % count)) for n in range(count)]


@pytest.mark.parametrize(
    ("direction", "size", "count", "options", "backend"),
    [
        ("h2d", 4096, 32, {}, "triton"),
        ("h2d", 4096, 8, {}, "dma_batch"),
        ("h2d", 4096, 2, {}, "merged"),
        ("h2d", 65536, 32, {}, "dma_batch"),
        ("d2h", 4096, 32, {}, "dma_batch"),
        ("d2d", 4096, 32, {}, "triton"),
        ("d2h", 4096, 32, {"has_batch": False}, "merged"),
        ("h2d", 4096, 32, {"sm": 75}, "dma_batch"),
        ("h2d", 4096, 32, {"has_kernels": False, "has_batch": False}, "merged"),
    ],
)
def test_without_a_calibration_the_built_in_rules_decide(
    direction: str, size: int, count: int, options: dict[str, Any], backend: str
) -> None:
    driver = SimulatedDriver(**options)
    plan = CopyPlan(*pools(driver, size, direction), driver=driver)
    assert plan.copy(scattered(count)).backend == backend


def test_blocks_side_by_side_are_one_plain_copy() -> None:
    driver = SimulatedDriver()
    plan = CopyPlan(*pools(driver, 4096, "h2d"), driver=driver)
    handle = plan.copy([(n, n + 3) for n in range(100)])
    assert handle.backend == "merged"
    assert driver.log[-1] == ("copy_many", 1)


def test_the_nearest_measured_cell_decides_among_what_is_usable() -> None:
    table = Calibration(
        "gpu",
        13000,
        "host",
        [
            Cell("h2d", 4096, 16, {"dma_batch": 5.0, "triton": 2.0}),
            Cell("h2d", 4096, 4096, {"dma_batch": 5.0, "triton": 30.0, "bulk": 40.0}),
            Cell("h2d", 1 << 20, 64, {"dma_batch": 50.0, "triton": 45.0}),
        ],
    )
    everything = {"dma_batch", "triton", "bulk", "merged"}
    assert table.best("h2d", 4096, 20, everything) == "dma_batch"
    assert table.best("h2d", 5000, 9000, everything) == "bulk"
    assert table.best("h2d", 5000, 9000, {"triton", "merged"}) == "triton"
    assert table.best("h2d", 1 << 21, 100, everything) == "dma_batch"
    assert table.best("d2h", 4096, 16, everything) is None
    assert table.best("h2d", 4096, 16, {"merged"}) is None
    driver = SimulatedDriver()
    plan = CopyPlan(*pools(driver, 4096, "h2d"), driver=driver, calibration=table)
    assert plan.copy(scattered(16)).backend == "dma_batch"


def test_calibration_measures_saves_and_is_found_again() -> None:
    driver = SimulatedDriver(name="Some GPU 80GB")
    assert load_calibration(driver.info(0)) is None
    table = calibrate(driver=driver, sizes=(4096, 16384), counts=(4, 16), pool_bytes=1 << 20, repeats=1)
    assert {(c.direction, c.block_bytes, c.count) for c in table.cells} == {
        (d, s, n) for d in ("h2d", "d2h", "d2d") for s in (4096, 16384) for n in (4, 16)
    }
    assert all(set(c.gb_per_s) == {"merged", "dma_batch", "triton", "bulk"} for c in table.cells)
    assert not table.wrong
    path = calibration_path("Some GPU 80GB", 13000)
    assert path.name.startswith("v1-Some_GPU_80GB-13000-")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    found = load_calibration(driver.info(0))
    assert found == table
    plan = CopyPlan(*pools(driver, 4096, "h2d"), driver=driver)
    assert plan.calibration == table


def test_a_backend_with_wrong_bytes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimulatedDriver()
    original = driver.copy_batch

    def skips_one(device: int, dsts: Any, srcs: Any, sizes: Any, stream: int) -> None:
        original(device, dsts[1:], srcs[1:], sizes[1:], stream)

    monkeypatch.setattr(driver, "copy_batch", skips_one)
    table = calibrate(driver=driver, sizes=(4096,), counts=(16,), pool_bytes=1 << 20, repeats=1, save=False)
    assert list(table.wrong) == ["dma_batch"]
    assert all("dma_batch" not in cell.gb_per_s for cell in table.cells)


def test_a_budget_cuts_the_calibration_short() -> None:
    table = calibrate(
        driver=SimulatedDriver(), sizes=(4096,), counts=(4, 16), pool_bytes=1 << 20, budget_s=0, save=False
    )
    assert len(table.cells) <= 1


def test_the_environment_overrides_the_saved_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = SimulatedDriver().info(0)
    table = Calibration(info.name, 13000, "elsewhere", [Cell("h2d", 4096, 16, {"merged": 1.0})])
    path = table.save(tmp_path / "mine.json")
    monkeypatch.setenv("AGENTRT_CALIBRATION", str(path))
    assert load_calibration(info) == table
    monkeypatch.setenv("AGENTRT_CALIBRATION", "off")
    assert load_calibration(info) is None
    monkeypatch.setenv("AGENTRT_CALIBRATION", str(tmp_path / "missing.json"))
    with pytest.raises(TransferError, match="AGENTRT_CALIBRATION cannot be used"):
        load_calibration(info)


@pytest.mark.parametrize("damage", ["", "{", "[]", json.dumps({"version": 99}), json.dumps({"version": 1, "cells": 3})])
def test_a_damaged_or_foreign_table_in_the_cache_is_ignored(damage: str) -> None:
    info = SimulatedDriver().info(0)
    path = calibration_path(info.name, info.driver_version)
    path.parent.mkdir(parents=True)
    path.write_text(damage)
    assert load_calibration(info) is None


@pytest.mark.parametrize(
    ("options", "size", "backend", "reason"),
    [
        ({"sm": 80}, 4096, "bulk", "need compute capability 9.0, this device has: 8.0"),
        ({}, 4104, "bulk", "multiples of 16"),
        ({"has_batch": False}, 4096, "dma_batch", "older than CUDA 12.8"),
        ({"has_kernels": False}, 4096, "triton", "cannot launch kernels"),
        ({}, 4096, "rust", "does not serve these pools"),
        ({}, 4096, "warp_drive", "unknown, use one of"),
    ],
)
def test_a_backend_asked_for_in_vain_says_why(options: dict[str, Any], size: int, backend: str, reason: str) -> None:
    driver = SimulatedDriver(**options)
    plan = CopyPlan(*pools(driver, size, "h2d", 16), driver=driver)
    with pytest.raises(BackendUnavailableError, match=reason):
        plan.copy([(0, 1)], backend=backend)
    assert not plan.dst.in_flight


def test_without_a_driver_device_pools_make_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentrt.transfer.driver._default", None)
    monkeypatch.setattr("agentrt.transfer.driver.CudaDriver.__init__.__defaults__", ("libcuda-missing.so",))
    driver = SimulatedDriver()
    with pytest.raises(BackendUnavailableError, match="no CUDA driver on this machine"):
        CopyPlan(*pools(driver, 4096, "h2d"))


def test_default_stream_takes_no_batches() -> None:
    driver = SimulatedDriver()
    plan = CopyPlan(*pools(driver, 4096, "d2h"), driver=driver)
    assert plan.copy(scattered(32), stream=0).backend == "merged"
    with pytest.raises(BackendUnavailableError, match="default stream"):
        plan.copy(scattered(32), stream=0, backend="dma_batch")


def test_a_kernel_launches_no_more_ctas_than_it_may() -> None:
    driver = SimulatedDriver()
    grids: list[int] = []
    original = driver.launch

    def spy(device: int, kernel: Any, grid: int, *rest: Any) -> None:
        grids.append(grid)
        original(device, kernel, grid, *rest)

    driver.launch = spy  # type: ignore[method-assign,assignment]
    plan = CopyPlan(*pools(driver, 65536, "h2d"), driver=driver)
    for limit in (None, 3, 500):
        plan.copy(scattered(64), backend="triton", max_ctas=limit).wait()
    plan.copy(scattered(64), backend="bulk").wait()
    # 64 blocks of two 32 KiB tiles are 128 work items.
    assert grids == [8, 3, 128, 4]
    with pytest.raises(ValueError, match="max_ctas must be at least 1: 0"):
        plan.copy(scattered(4), max_ctas=0)


def test_staging_tables_are_reused_only_after_their_copy() -> None:
    driver = SimulatedDriver()
    plan = CopyPlan(*pools(driver, 64, "h2d"), driver=driver)
    view = plan.src.view()
    view[:] = np.arange(128, dtype=np.uint8)[None, :, None]
    before = len(driver._memory)
    driver.paused = True
    handles = [plan.copy([(2 * n, n)], backend="triton") for n in range(5)]
    assert len(driver._memory) == before + 10
    for handle in handles:
        handle.wait()
    driver.paused = False
    for n in range(5, 20):
        plan.copy([(2 * n, n)], backend="triton").wait()
    assert len(driver._memory) == before + 10
    CopyPlan(plan.dst, plan.src, driver=driver).copy([(n, 100 + n) for n in range(20)]).wait()
    assert (view[0, 100:120, 0] == 2 * np.arange(20)).all()
