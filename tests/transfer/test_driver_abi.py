"""The ctypes driver against a stand-in library compiled with NVIDIA's own header."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from agentrt.transfer import BlockPool, CopyFaultError, CopyPlan, device_code
from agentrt.transfer import driver as driver_module
from agentrt.transfer.driver import CudaDriver

if TYPE_CHECKING:
    from collections.abc import Callable


class Stats(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "launches",
            "batches",
            "copies",
            "copies_2d",
            "contexts",
            "grid",
            "threads",
            "shared",
            "max_shared",
            "alive",
        )
    ]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[CudaDriver, Stats, ctypes.CDLL]]:
    headers = [path.parent for entry in sys.path for path in Path(entry or ".").glob("nvidia/*/include/cuda.h")]
    compiler = shutil.which("cc")
    if not headers or not compiler:
        pytest.skip("cuda.h (pip install nvidia-cuda-runtime) or a C compiler is missing")
    copy_2d, attributes = driver_module._Copy2D, driver_module._BatchAttributes
    layout = {
        "ATTRIBUTES_BYTES": ctypes.sizeof(attributes),
        "ATTRIBUTES_FLAGS": attributes.flags.offset,
        "COPY2D_BYTES": ctypes.sizeof(copy_2d),
        "COPY2D_SRC": copy_2d.src_device.offset,
        "COPY2D_DST": copy_2d.dst_device.offset,
        "COPY2D_HEIGHT": copy_2d.height.offset,
    }

    def make(*options: str) -> tuple[CudaDriver, Stats, ctypes.CDLL]:
        library = tmp_path_factory.mktemp("stub") / "libcuda.so"
        source = Path(__file__).with_name("stub_libcuda.c")
        definitions = [f"-D{name}={value}" for name, value in layout.items()]
        command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-I{headers[0]}", *definitions, *options]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        stub = ctypes.CDLL(str(library))
        stub.stub_stats.restype = ctypes.POINTER(Stats)
        stub.stub_set.argtypes = [ctypes.c_size_t, ctypes.c_int]
        return CudaDriver(str(library)), stub.stub_stats().contents, stub

    return make


def world(driver: CudaDriver) -> tuple[CopyPlan, CopyPlan]:
    host = BlockPool.allocate(layers=3, num_blocks=40, block_bytes=64, space="pinned", driver=driver)
    cache = BlockPool.allocate(
        layers=3, num_blocks=40, block_bytes=64, space="device", layout="layers_blocks", driver=driver
    )
    host.view()[:] = np.random.default_rng(31).integers(0, 256, host.view().shape, dtype=np.uint8)
    return CopyPlan(host, cache, driver=driver), CopyPlan(cache, host, driver=driver)


def test_every_engine_backend_moves_the_right_bytes_through_the_real_signatures(
    build: Callable[..., tuple[CudaDriver, Stats, ctypes.CDLL]],
) -> None:
    driver, stats, stub = build()
    stub.stub_set(64, 0)
    assert driver.has_batch
    info = driver.info(0)
    assert (info.name, info.sm, info.multiprocessors, info.driver_version) == ("Stub", 90, 132, 13000)
    up, down = world(driver)
    view = up.src.view()
    kernels = [name for name in ("triton", "bulk") if name in up.available]
    for backend in ("merged", "dma_batch", "dma_2d", *kernels):
        wanted = view[:, [3, 9, 4]].copy()
        handle = up.copy([(3, 5), (9, 6), (4, 0)], backend=backend)
        # The stand-in reports "not ready" once.
        assert not handle.done()
        assert up.dst.in_flight == frozenset()
        assert handle.done()
        assert handle.seconds >= 0
        down.copy([(5, 30), (6, 31), (0, 32)], backend=backend, after=handle).wait()
        assert np.array_equal(view[:, 30:33], wanted)
        view[:, 30:33] = 0
    assert stats.batches == 2
    assert stats.copies_2d == 6
    assert stats.launches == 2 * len(kernels)
    # Contexts are popped as often as they are pushed.
    assert stats.contexts == 0
    del handle
    gc.collect()
    assert stats.alive == 0


def test_kernels_are_launched_as_they_were_compiled(
    build: Callable[..., tuple[CudaDriver, Stats, ctypes.CDLL]],
) -> None:
    driver, stats, stub = build()
    up, _ = world(driver)
    if not {"triton", "bulk"} <= set(up.available):
        pytest.skip(f"no compiler for the kernels: {up.unavailable}")
    stub.stub_set(64, 0)
    pairs = [(n, n) for n in range(40)]
    up.copy(pairs, backend="triton").wait()
    code = device_code.compile_kernel(device_code.copy_spec(64, 16), 90)
    # 40 pairs of 64 bytes fit one tile: one work item for each of three buffers.
    assert (stats.grid, stats.threads, stats.shared) == (3, code.threads, code.shared_bytes)
    up.copy(pairs, backend="bulk", max_ctas=2).wait()
    spec = device_code.bulk_spec(64)
    assert (stats.grid, stats.threads) == (2, 256)
    assert stats.shared == stats.max_shared or stats.shared <= 48 << 10
    assert stats.shared == 8 * int(spec.options["RING"]) * int(spec.options["SLOT"])


def test_a_driver_of_cuda_12_takes_the_older_batch_call(
    build: Callable[..., tuple[CudaDriver, Stats, ctypes.CDLL]],
) -> None:
    driver, stats, _ = build("-DCUDA_12")
    assert driver.has_batch
    up, down = world(driver)
    wanted = up.src.view()[:, [3, 9]].copy()
    up.copy([(3, 5), (9, 6)], backend="dma_batch").wait()
    down.copy([(5, 20), (6, 21)], backend="dma_batch").wait()
    assert np.array_equal(up.src.view()[:, 20:22], wanted)
    assert stats.batches == 2


def test_an_error_of_the_driver_reaches_the_caller_by_name(
    build: Callable[..., tuple[CudaDriver, Stats, ctypes.CDLL]],
) -> None:
    driver, stats, stub = build()
    up, _ = world(driver)
    stub.stub_set(64, 3)  # the start event and one copy succeed
    with pytest.raises(CopyFaultError, match="cuMemcpyAsync failed: CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
        up.copy([(3, 5), (9, 6), (4, 0)], backend="merged")
    assert up.dst.torn == {0, 5, 6}
    assert stats.contexts == 0
    assert caught.value.blocks == (5, 6, 0)
    gc.collect()
    assert stats.alive == 0
