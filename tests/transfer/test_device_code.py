"""The machine code of the kernels, without a GPU: 16-byte accesses, no spills, bounded registers, and NVRTC's cache."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from agentrt.transfer import BackendUnavailableError, device_code

if TYPE_CHECKING:
    from agentrt.transfer.device_code import DeviceCode

needs_triton = pytest.mark.skipif(bool(device_code.triton_missing()), reason=device_code.triton_missing())
needs_nvrtc = pytest.mark.skipif(bool(device_code.nvrtc_missing()), reason=device_code.nvrtc_missing())

#: Registers of one thread at which 16 warps still fit a CTA twice per SM.
MAX_REGISTERS = 64


class Usage(NamedTuple):
    registers: int
    stack: int
    local: int


def disassembler() -> str:
    """NVIDIA's cuobjdump, which comes with triton."""
    if device_code.triton_missing():
        found = shutil.which("cuobjdump")
    else:
        import triton

        path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        found = str(path) if path.exists() else shutil.which("cuobjdump")
    if found is None:
        pytest.skip("cuobjdump is missing (it comes with triton)")
    return found


def inspect(code: DeviceCode, folder: Path) -> tuple[Usage, str]:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(code.cubin)
    tool = disassembler()
    run = {"capture_output": True, "text": True, "check": True}
    usage = subprocess.run([tool, "--dump-resource-usage", str(cubin)], **run).stdout  # type: ignore[call-overload]
    sass = subprocess.run([tool, "--dump-sass", str(cubin)], **run).stdout  # type: ignore[call-overload]
    numbers = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert numbers is not None, usage
    return Usage(*map(int, numbers.groups())), sass


@needs_triton
@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("block_bytes", [4096, 32768])
def test_copy_kernel_moves_16_bytes_per_access_without_spills(block_bytes: int, sm: int, tmp_path: Path) -> None:
    spec = device_code.copy_spec(block_bytes, 16)
    code = device_code.compile_triton(spec, sm)
    # 32 KiB per step over 512 threads: four loads and four stores of 16 bytes each.
    assert code.ptx.count("ld.global.v2.b64") == 4
    assert code.ptx.count("st.global.v2.b64") == 4
    usage, sass = inspect(code, tmp_path)
    assert len(re.findall(r"LDG\.E\S*\.128", sass)) == 4
    assert len(re.findall(r"STG\.E\S*\.128", sass)) == 4
    assert usage.stack == usage.local == 0
    assert usage.registers <= MAX_REGISTERS
    assert code.entry == "kv_copy"
    assert code.threads == 512
    # Two scratch pointers, or none in older compilers; any further parameter would be launched as garbage.
    assert 0 <= code.scratch_pointers <= 2
    assert "reqntid 512" in code.ptx


@needs_triton
@pytest.mark.parametrize(("block_bytes", "align"), [(48, 16), (1000, 8), (12, 4), (6, 2), (7, 1)])
def test_copy_kernel_compiles_for_odd_blocks(block_bytes: int, align: int, tmp_path: Path) -> None:
    usage, sass = inspect(device_code.compile_triton(device_code.copy_spec(block_bytes, align), 90), tmp_path)
    assert usage.stack == usage.local == 0
    # Never an access wider than the addresses allow.
    if align < 16:
        assert not re.findall(r"(LDG|STG)\.E\S*\.128", sass)


@needs_triton
@pytest.mark.parametrize("kind", ["kv_encode_int8", "kv_decode_int8"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_int8_kernels_compile_without_spills(kind: str, dtype: str, tmp_path: Path) -> None:
    spec = device_code.int8_spec(kind, rows=128, row=128, dtype=dtype, align=16)  # type: ignore[arg-type]
    for sm in (80, 90, 100) if dtype == "bfloat16" else (90,):
        usage, sass = inspect(device_code.compile_triton(spec, sm), tmp_path)
        assert usage.stack == usage.local == 0
        assert usage.registers <= MAX_REGISTERS
        wide = "LDG" if kind == "kv_encode_int8" else "STG"
        assert re.search(wide + r"\.E\S*\.128", sass)


@needs_nvrtc
@pytest.mark.parametrize("sm", [90, 100])
@pytest.mark.parametrize("block_bytes", [16, 4096, 32768])
def test_bulk_kernel_compiles_to_bulk_copies_without_spills(block_bytes: int, sm: int, tmp_path: Path) -> None:
    spec = device_code.bulk_spec(block_bytes)
    code = device_code.compile_bulk(spec, sm)
    usage, sass = inspect(code, tmp_path)
    assert "UBLKCP" in sass
    assert usage.stack == usage.local == 0
    assert usage.registers <= MAX_REGISTERS
    # 227 KiB of shared memory per CTA, of which the barriers take a little.
    assert code.shared_bytes <= 220 << 10


@needs_nvrtc
def test_bulk_kernel_is_compiled_once_and_a_broken_cache_file_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = device_code.bulk_spec(4096)
    first = device_code.compile_bulk(spec, 90)
    (file,) = (device_code.cache_folder() / "cubin").iterdir()
    compile_again = device_code._compile_cuda
    monkeypatch.setattr(device_code, "_compile_cuda", lambda *_: pytest.fail("compiled although cached"))
    assert device_code.compile_bulk(spec, 90) == first
    monkeypatch.setattr(device_code, "_compile_cuda", compile_again)
    file.write_bytes(b"")
    assert device_code.compile_bulk(spec, 90).cubin == first.cubin
    assert file.read_bytes() == first.cubin
    device_code.compile_bulk(spec, 100)
    assert len(list(file.parent.iterdir())) == 2


@needs_nvrtc
def test_a_kernel_that_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_code, "bulk_source", lambda: "nonsense;")
    with pytest.raises(BackendUnavailableError, match=r"rejects the kernel.*nonsense"):
        device_code.compile_bulk(device_code.bulk_spec(4096), 90)


def test_bulk_copies_are_refused_before_hopper() -> None:
    with pytest.raises(BackendUnavailableError, match=r"need compute capability 9.0, this device has: 8.6"):
        device_code.compile_bulk(device_code.bulk_spec(4096), 86)


@pytest.mark.parametrize("block_bytes", [16, 48, 1000, 4096, 5120, 8192, 32768, 100_000, 2 << 20])
def test_tiles_cover_blocks_of_any_size(block_bytes: int) -> None:
    align = min(block_bytes & -block_bytes, 16)
    spec = device_code.copy_spec(block_bytes, align)
    options = spec.options
    chunk, pairs = int(options["CHUNK"]), int(options["PAIRS"])
    assert chunk * spec.items_per_block >= block_bytes > chunk * (spec.items_per_block - 1)
    assert chunk & (chunk - 1) == 0
    assert pairs & (pairs - 1) == 0
    assert spec.items(1, 3) == 3 * spec.items_per_block
    assert spec.items(pairs + 1, 1) == 2 * spec.items_per_block
    if block_bytes % 16 == 0:
        ring = device_code.bulk_spec(block_bytes).options
        assert int(ring["SLOT"]) % 128 == 0
        assert 2 <= int(ring["RING"]) <= 32
