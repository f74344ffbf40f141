"""Block pools: layouts, addresses, and descriptions that cannot be right."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from agentrt.transfer import BlockPool, CopyPlan, Int8Encoding, PoolError, SimulatedDriver, Space


def test_layers_first_array_has_one_buffer_per_layer() -> None:
    array = np.zeros((3, 5, 4, 8), np.float32)
    pool = BlockPool.from_array(array, "layers_blocks")
    assert (pool.layers, pool.num_blocks, pool.block_bytes, pool.stride_bytes) == (3, 5, 128, 128)
    assert pool.bases.tolist() == [array[layer].ctypes.data for layer in range(3)]
    assert pool.space is Space.PAGEABLE
    assert pool.dtype == "float32"


def test_blocks_first_array_keeps_all_layers_of_a_block_side_by_side() -> None:
    array = np.zeros((5, 3, 4, 8), np.float32)
    pool = BlockPool.from_array(array, "blocks_layers")
    assert (pool.layers, pool.num_blocks, pool.block_bytes, pool.stride_bytes) == (3, 5, 128, 384)
    assert np.diff(pool.bases).tolist() == [128, 128]


def test_keys_and_values_apart_are_two_buffers_of_a_layer() -> None:
    layers = [np.zeros((2, 7, 16), np.float16) for _ in range(3)]
    pool = BlockPool.from_arrays(layers, block_axis=1)
    assert (pool.layers, pool.buffers_per_layer, pool.num_blocks, pool.block_bytes) == (3, 2, 7, 32)
    assert pool.bases[2] == layers[1].ctypes.data


def test_a_strided_view_of_blocks_is_a_pool_too() -> None:
    array = np.zeros((2, 10, 32), np.uint8)
    pool = BlockPool.from_array(array[:, ::2, :16], "layers_blocks")
    assert (pool.num_blocks, pool.block_bytes, pool.stride_bytes) == (5, 16, 64)


def test_view_shows_the_pool_without_copying() -> None:
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(3, 2, 4)
    view = BlockPool.from_array(array, "blocks_layers").view()
    assert np.array_equal(view, array.swapaxes(0, 1))
    view[1, 2] = 99
    assert (array[2, 1] == 99).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_bytes": 0}, "block_bytes must be positive: 0"),
        ({"num_blocks": -1}, "num_blocks must be positive: -1"),
        ({"stride_bytes": 8}, "stride of 8 bytes is shorter than a block: 16"),
        ({"layers": 3}, "2 buffers cannot be shared by layers: 3"),
        ({"owner": None}, "raw addresses need an owner"),
        ({"bases": [0, 4096]}, "base address 0"),
        ({"bases": [4096, 4104]}, "buffers overlap"),
        ({"device": 0}, "device must be given for device memory and only there: 0"),
    ],
)
def test_impossible_descriptions_are_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "bases": [4096, 8192],
        "block_bytes": 16,
        "stride_bytes": 16,
        "num_blocks": 4,
        "layers": 2,
        "space": "pageable",
        "owner": "somebody",
    }
    BlockPool.from_pointers(**good)
    with pytest.raises(PoolError, match=message):
        BlockPool.from_pointers(**(good | change))


def test_blocks_whose_bytes_are_scattered_are_refused() -> None:
    with pytest.raises(PoolError, match="not contiguous"):
        BlockPool.from_array(np.zeros((2, 4, 8, 8), np.uint8)[..., ::2], "layers_blocks")


def test_layers_of_different_shape_are_refused() -> None:
    with pytest.raises(PoolError, match="differ in shape"):
        BlockPool.from_arrays([np.zeros((4, 8)), np.zeros((5, 8))])


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (np.zeros((2, 4, 8), np.uint8), np.zeros((3, 4, 8), np.uint8), "differ in layers"),
        (np.zeros((2, 4, 8), np.uint8), np.zeros((2, 4, 16), np.uint8), "differ in size: 8 to 16"),
        (np.zeros((2, 4, 8), np.float16), np.zeros((2, 4, 4), np.float32), "differ in dtype: float16 to float32"),
    ],
)
def test_pools_that_do_not_fit_each_other_make_no_plan(source: Any, target: Any, message: str) -> None:
    with pytest.raises(PoolError, match=message):
        CopyPlan(BlockPool.from_array(source, "layers_blocks"), BlockPool.from_array(target, "layers_blocks"))


def test_encoded_pools_are_checked_against_their_plain_partner() -> None:
    encoding = Int8Encoding(row=8, dtype="float16")
    assert encoding.encoded_bytes(64) == 4 * 12
    plain = BlockPool.from_array(np.zeros((1, 4, 32), np.float16), "layers_blocks")
    with pytest.raises(PoolError, match="encoded blocks need 48 bytes, the pool's have: 32"):
        CopyPlan(plain, BlockPool.from_array(np.zeros((4, 1, 32), np.uint8), "blocks_layers", encoding=encoding))
    other = Int8Encoding(row=8, dtype="bfloat16")
    coded = BlockPool.from_array(np.zeros((4, 1, 48), np.uint8), "blocks_layers", encoding=other)
    with pytest.raises(PoolError, match="the encoding is for bfloat16"):
        CopyPlan(plain, coded)
    with pytest.raises(PoolError, match="whole number of 16-byte rows: 40"):
        encoding.rows(40)


def test_a_pool_keeps_its_memory_alive_and_lets_it_go() -> None:
    array = np.zeros((1, 4, 16), np.uint8)
    memory = weakref.ref(array)
    pool = BlockPool.from_array(array, "layers_blocks")
    del array
    gc.collect()
    assert memory() is not None
    del pool
    gc.collect()
    assert memory() is None


def test_allocated_memory_is_freed_with_its_pool() -> None:
    driver = SimulatedDriver()
    pool = BlockPool.allocate(layers=2, num_blocks=3, block_bytes=64, space="pinned", driver=driver)
    assert pool.total_bytes == 2 * 3 * 64
    assert len(driver._memory) == 1
    del pool
    gc.collect()
    assert not driver._memory


def test_torch_tensors_on_the_cpu_are_pools() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    source = torch.randn(2, 6, 16).to(torch.bfloat16)
    target = torch.zeros(8, 2, 16, dtype=torch.bfloat16)
    src, dst = BlockPool.from_array(source, "layers_blocks"), BlockPool.from_array(target, "blocks_layers")
    assert src.dtype == dst.dtype == "bfloat16"
    CopyPlan(src, dst).copy([(1, 7), (5, 0)]).wait()
    assert torch.equal(target[7], source[:, 1])
    assert torch.equal(target[0], source[:, 5])
    assert not target[1:7].any()
    with pytest.raises(PoolError, match="memory must be on the CPU or a CUDA device: meta"):
        BlockPool.from_array(torch.zeros(2, 3, 4, device="meta"), "layers_blocks")
