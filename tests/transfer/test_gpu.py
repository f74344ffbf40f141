"""The same promises on a real device: bytes, ordering, graphs. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from agentrt.kernels import reference
from agentrt.transfer import BlockPool, Calibration, CopyPlan, Int8Encoding, PrefetchExecutor, calibrate
from agentrt.transfer.driver import driver_or_reason

_DRIVER, _REASON = driver_or_reason()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_DRIVER is None, reason=_REASON or "a driver is there")]

BACKENDS = ["merged", "dma_batch", "dma_2d", "triton", "bulk", "auto"]
DTYPES = ["float16", "bfloat16", "float8_e4m3fn", "int8", "float32"]


@pytest.fixture
def torch() -> Any:
    found = pytest.importorskip("torch", reason="torch is not installed")
    if not found.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return found


def random_bytes(torch: Any, shape: tuple[int, ...], dtype: str, device: str) -> Any:
    *lead, last = shape
    raw = torch.randint(0, 256, (*lead, last * getattr(torch, dtype).itemsize), dtype=torch.uint8)
    return raw.pin_memory() if device == "cpu" else raw.cuda()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
def test_bytes_are_exact(torch: Any, backend: str, direction: str) -> None:
    layers, blocks = 3, 12
    on_host = {"h": True, "d": False}
    src_on_host, dst_on_host = on_host[direction[0]], on_host[direction[2]]
    tried = 0
    for dtype in DTYPES:
        for shape in [(16, 2, 64), (1, 1, 16), (5, 3, 33), (128, 8, 128)]:
            host_side, device_side = (blocks, layers, *shape), (layers, blocks, *shape)
            src = random_bytes(
                torch, host_side if src_on_host else device_side, dtype, "cpu" if src_on_host else "cuda"
            )
            dst = random_bytes(
                torch, host_side if dst_on_host else device_side, dtype, "cpu" if dst_on_host else "cuda"
            )
            torch.cuda.synchronize()
            by_block = src if src_on_host else src.transpose(0, 1)
            expected = (dst if dst_on_host else dst.transpose(0, 1)).clone()
            pairs = [(3, 0), (4, 1), (5, 2), (11, 7), (11, 9), (0, 11), (-1, 5)]
            for source, target in pairs:
                if source >= 0:
                    expected[target] = by_block[source].to(expected.device)
            torch.cuda.synchronize()
            kind = getattr(torch, dtype)
            plan = CopyPlan(
                BlockPool.from_array(src.view(kind), "blocks_layers" if src_on_host else "layers_blocks"),
                BlockPool.from_array(dst.view(kind), "blocks_layers" if dst_on_host else "layers_blocks"),
                calibration=Calibration("", 0, ""),
            )
            if backend != "auto" and backend not in plan.available:
                continue
            tried += 1
            handle = plan.copy(pairs, backend=backend)
            assert handle.wait()
            assert handle.gb_per_s > 0
            got = dst if dst_on_host else dst.transpose(0, 1)
            assert torch.equal(got.cpu(), expected.cpu()), (dtype, shape)
    if not tried:
        pytest.skip(plan.unavailable[backend])


@pytest.mark.parametrize("backend", ["dma_batch", "triton"])
def test_a_copy_waits_for_a_slow_writer_and_the_next_writer_for_the_copy(torch: Any, backend: str) -> None:
    cache = torch.zeros(2, 64, 32768, dtype=torch.uint8, device="cuda")
    host = torch.zeros(64, 2, 32768, dtype=torch.uint8).pin_memory()
    src, dst = BlockPool.from_array(cache, "layers_blocks"), BlockPool.from_array(host, "blocks_layers")
    plan = CopyPlan(src, dst)
    if backend not in plan.available:
        pytest.skip(plan.unavailable[backend])
    plan.copy([(0, 0)], backend=backend).wait()  # compiled and loaded before the race starts
    writer, written = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(writer):
        torch.cuda._sleep(50_000_000)
        cache.fill_(7)
        written.record()
    handle = plan.copy([(n, n) for n in range(64)], after=written, backend=backend)
    assert src.in_flight == frozenset(range(64))
    handle.wait(writer)
    with torch.cuda.stream(writer):
        cache.fill_(9)
    handle.wait()
    writer.synchronize()
    assert bool((host == 7).all())


def test_a_graph_replays_with_new_pairs(torch: Any) -> None:
    host = random_bytes(torch, (32, 2, 4096), "uint8", "cpu")
    cache = torch.zeros(2, 32, 4096, dtype=torch.uint8, device="cuda")
    plan = CopyPlan(BlockPool.from_array(host, "blocks_layers"), BlockPool.from_array(cache, "layers_blocks"))
    if "triton" not in plan.available:
        pytest.skip(plan.unavailable["triton"])
    fixed = plan.graph_copy(capacity=8)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        fixed.enqueue(stream)
    for pairs in ([(1, 2), (3, 4)], [(n, 31 - n) for n in range(8)], [(9, 0)]):
        expected = cache.clone()
        for source, target in pairs:
            expected[:, target] = host[source].cuda()
        torch.cuda.synchronize()
        fixed.set_pairs(pairs)
        with torch.cuda.stream(stream):
            graph.replay()
        fixed.launched(stream).wait()
        assert torch.equal(cache, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_int8_transport_stays_within_its_stated_error(torch: Any, dtype: str) -> None:
    kind, rows, row = getattr(torch, dtype), 64, 128
    encoding = Int8Encoding(row=row, dtype=dtype)
    plain = torch.randn(2, 8, rows * row, device="cuda").to(kind)
    back = torch.zeros_like(plain)
    size = encoding.encoded_bytes(rows * row * kind.itemsize)
    host = BlockPool.from_array(
        torch.zeros(8, 2, size, dtype=torch.uint8).pin_memory(), "blocks_layers", encoding=encoding
    )
    torch.cuda.synchronize()
    pairs = [(n, 7 - n) for n in range(8)]
    out = CopyPlan(BlockPool.from_array(plain, "layers_blocks"), host).copy(pairs)
    assert out.backend == "int8"
    CopyPlan(host, BlockPool.from_array(back, "layers_blocks")).copy([(b, a) for a, b in pairs], after=out).wait()
    wanted, got = (t.float().reshape(2, 8, rows, row) for t in (plain, back))
    assert bool(((got - wanted).abs().amax(-1) <= reference.INT8_ERROR_BOUND * wanted.abs().amax(-1)).all())


def test_calibration_trusts_only_backends_with_the_right_bytes(torch: Any) -> None:
    table = calibrate(sizes=(4096, 65536), counts=(16, 256), pool_bytes=64 << 20, budget_s=60, repeats=1, save=False)
    assert not table.wrong
    assert len(table.cells) == 12


def test_prefetch_brings_blocks_back_byte_identical(torch: Any) -> None:
    host = random_bytes(torch, (64, 4, 16, 64), "bfloat16", "cpu")
    cache = torch.zeros(4, 64, 16, 128, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    plan = CopyPlan(BlockPool.from_array(host, "blocks_layers"), BlockPool.from_array(cache, "layers_blocks"))
    executor = PrefetchExecutor(plan, bytes_per_s=10**9)
    executor.request([(n, 63 - n, float(n)) for n in range(64)])
    ready: list[tuple[int, int]] = []
    for _ in range(10_000):
        ready += executor.step().ready
        if len(ready) == 64:
            break
    assert sorted(ready) == [(n, 63 - n) for n in range(64)]
    assert torch.equal(cache.transpose(0, 1).cpu(), host.flip(0))
    assert executor.totals.ready == host.numel()
