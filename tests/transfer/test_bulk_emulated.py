"""The ring of the bulk-copy kernel on the host, its memory operations as early and late as hardware may make them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.transfer.naive import Shape, copied, memory, pool_over

from agentrt.transfer import device_code
from agentrt.transfer.backends import fill_table

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, bool]]:
    """(block bytes, pairs, grid, change to the source) -> (what went wrong, are the bytes right)."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("a C++ compiler is missing")
    built: dict[tuple[int, tuple[str, str] | None], ctypes.CDLL] = {}

    def library(block_bytes: int, change: tuple[str, str] | None) -> ctypes.CDLL:
        key = (block_bytes, change)
        if key not in built:
            folder = tmp_path_factory.mktemp("bulk")
            source = device_code.bulk_source()
            if change is not None:
                assert source.count(change[0]) == 1, change
                source = source.replace(*change)
            (folder / "kernel.cu").write_text(source)
            constants = device_code.bulk_spec(block_bytes).options
            definitions = [f"-D{name}={value}" for name, value in constants.items()]
            definitions.append(f'-DKERNEL="{folder / "kernel.cu"}"')
            shim = Path(__file__).with_name("emulate_bulk.cpp")
            output = folder / "bulk.so"
            command = [compiler, "-std=c++17", "-shared", "-fPIC", "-O1", *definitions, str(shim), "-o", str(output)]
            subprocess.run(command, check=True)
            built[key] = ctypes.CDLL(str(output))
            built[key].emulate.restype = ctypes.c_char_p
            built[key].emulate.argtypes = [
                ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_uint,
            ]  # fmt: skip
        return built[key]

    def run(
        block_bytes: int, pairs: list[tuple[int, int]], grid: int, change: tuple[str, str] | None = None
    ) -> tuple[str, bool]:
        rng = np.random.default_rng(71)
        blocks = 1 + max(max(pair) for pair in pairs)
        form = Shape(2, 1, blocks, blocks, block_bytes, "blocks_layers", "layers_blocks", gap=16)
        src, source = pool_over("blocks_layers", form, blocks, "pageable", None, rng)
        dst, target = pool_over("layers_blocks", form, blocks, "pageable", None, rng)
        expected = copied(source, target, pairs, range(2))
        guard = memory(dst).copy()
        rows = np.array(pairs, np.int64)
        words = np.zeros(2 * len(rows) + 4, np.int64)
        fill_table(words, rows[:, 0], rows[:, 1], src.bases, dst.bases)
        problem = library(block_bytes, change).emulate(
            words.ctypes.data, len(rows), 2, src.stride_bytes, dst.stride_bytes, grid
        )
        right = np.array_equal(target, expected)
        # Gaps and surroundings: as before.
        target[:] = 0
        np.lib.stride_tricks.as_strided(guard[16:], target.shape, target.strides)[:] = 0
        return problem.decode(), right and np.array_equal(memory(dst), guard)

    return run


@pytest.mark.parametrize("block_bytes", [16, 4096, 8208, 20480, 32768])
@pytest.mark.parametrize("grid", [1, 3, 4])
def test_ring_moves_every_byte_whatever_the_timing(
    emulate: Callable[..., tuple[str, bool]], block_bytes: int, grid: int
) -> None:
    count = 120 if block_bytes <= 4096 else 40
    pairs = [((7 * n) % count, n) for n in range(count)] + [(-1, 0), (0, -1), (3, -5)]
    # Padding between real pairs as well as after them: slots are skipped in the middle of the ring.
    pairs[5] = (-1, 5)
    pairs[count // 2] = (2, -1)
    assert emulate(block_bytes, pairs, grid) == ("", True)


def test_fewer_items_than_leaders_and_padding_alone_are_fine(emulate: Callable[..., tuple[str, bool]]) -> None:
    assert emulate(4096, [(1, 0)], 4) == ("", True)
    assert emulate(4096, [(-1, 0), (-1, -1)], 2) == ("", True)


@pytest.mark.parametrize(
    ("change", "symptom"),
    [
        (("            stores_read_but_one();\n", ""), ""),  # refills a slot that a store still reads
        (("k + RING - 1 < mine", "k + RING < mine"), ""),  # forgets the last load
        (("parity ^= 1u << s;", ""), "phase that is over"),  # waits for the wrong phase
        (("    stores_done();\n}", "}"), "ends before its stores are done"),
        (("item / chunks", "item / (chunks + 1)"), ""),
    ],
)
def test_the_emulation_notices_a_broken_ring(
    emulate: Callable[..., tuple[str, bool]], change: tuple[str, str], symptom: str
) -> None:
    pairs = [((7 * n) % 40, n) for n in range(40)]
    problem, right = emulate(20480, pairs, 1, change)
    assert not right or problem
    assert symptom in problem
