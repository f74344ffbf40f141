"""From a kernel's source in `agentrt.kernels` to machine code for one architecture. Needs no GPU and no driver.

Triton kernels go through its ahead-of-time compiler with every argument unspecialised, so that no batch size ever
causes a second compilation, and are launched by the driver like any other machine code. The CUDA kernel goes through
NVRTC (a library, no compiler or headers on the machine) and lands in a cache on disk under sha256(source, options,
architecture, NVRTC version). NVRTC is asked for machine code rather than PTX: a driver older than the NVRTC would
reject newer PTX.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.resources
import importlib.util
import os
import re
import sys
import tempfile
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agentrt.transfer.errors import BackendUnavailableError

KernelKind = Literal["kv_copy", "kv_copy_bulk", "kv_encode_int8", "kv_decode_int8"]


@dataclass(frozen=True)
class KernelSpec:
    """One kernel with its compile-time constants. All take (table, n_pairs, n_buffers, src_stride, dst_stride)."""

    kind: KernelKind
    constants: tuple[tuple[str, int | str], ...]
    warps: int
    #: Bytes of one work item's share of a block row, for sizing the grid: pairs and bytes per item.
    pairs_per_item: int
    items_per_block: int

    @property
    def options(self) -> dict[str, int | str]:
        """The constants as a dictionary."""
        return dict(self.constants)

    def items(self, n_pairs: int, n_buffers: int) -> int:
        """Work items of a launch: a larger grid than this is idle."""
        return -(-n_pairs // self.pairs_per_item) * n_buffers * self.items_per_block


@dataclass(frozen=True)
class DeviceCode:
    """Machine code and how to launch it."""

    cubin: bytes
    entry: str
    threads: int
    shared_bytes: int
    #: Trailing pointer parameters the compiler added for scratch memory; unused here, passed as null.
    scratch_pointers: int
    #: Readable assembly, where the compiler offers it.
    ptx: str = ""


def power_of_two_at_least(value: int) -> int:
    """The smallest power of two not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def copy_spec(block_bytes: int, align: int, *, tile: int = 32 << 10, warps: int = 16) -> KernelSpec:
    """The Triton copy kernel, `tile` bytes per step and program.

    `align` is the largest power of two, up to 16, that divides every address and size.
    """
    word = min(align, 8)
    # Words narrower than 8 bytes make longer vectors of the same tile: keep the register count.
    tile = max(tile * word // 8, 16)
    chunk = min(power_of_two_at_least(block_bytes), tile)
    pairs = max(1, tile // chunk)
    return KernelSpec(
        "kv_copy",
        (("NBYTES", block_bytes), ("CHUNK", chunk), ("PAIRS", pairs), ("WORD", word), ("ALIGN", align)),
        warps,
        pairs,
        -(-block_bytes // chunk),
    )


def bulk_spec(block_bytes: int, *, warps: int = 8, shared_bytes: int = 192 << 10) -> KernelSpec:
    """The bulk-copy ring, filling `shared_bytes` with slots of at most 8 KiB."""
    slot = min(-(-block_bytes // 128) * 128, 8 << 10)
    ring = min(max(2, shared_bytes // (warps * slot)), 32)
    constants = (("BLOCK", block_bytes), ("SLOT", slot), ("RING", ring), ("WARPS", warps))
    return KernelSpec("kv_copy_bulk", constants, warps, 1, -(-block_bytes // slot))


def int8_spec(
    kind: Literal["kv_encode_int8", "kv_decode_int8"], rows: int, row: int, dtype: str, align: int
) -> KernelSpec:
    """The int8 transport kernels, in tiles of about 4096 elements."""
    width = power_of_two_at_least(row)
    tile = max(1, min(4096 // width, power_of_two_at_least(rows)))
    constants = (("ROWS", rows), ("ROW", row), ("WIDTH", width), ("TILE", tile), ("TYPE", dtype), ("ALIGN", align))
    return KernelSpec(kind, constants, 8, 1, -(-rows // tile))


def compile_kernel(spec: KernelSpec, sm: int) -> DeviceCode:
    """Machine code of a kernel for compute capability `sm` (80, 90, 100, ...)."""
    return compile_bulk(spec, sm) if spec.kind == "kv_copy_bulk" else compile_triton(spec, sm)


# ---- Triton ----------------------------------------------------------------------------------------------------------


@functools.cache
def triton_missing() -> str:
    """Why Triton kernels cannot be compiled here; empty if they can."""
    return "" if importlib.util.find_spec("triton") is not None else "triton is not installed"


def triton_function(kind: str) -> Any:
    """The kernel as Triton sees it, compilable even while Triton's interpreter is on."""
    from triton.runtime.jit import JITFunction

    from agentrt.kernels import kv_copy, kv_int8

    kernel = getattr(kv_copy if kind == "kv_copy" else kv_int8, kind)
    return kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn)


def compile_triton(spec: KernelSpec, sm: int) -> DeviceCode:
    """Ahead-of-time compilation of a Triton kernel."""
    if triton_missing():
        raise BackendUnavailableError(triton_missing())
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = triton_function(spec.kind)
    names: list[str] = list(function.arg_names)
    constants = {k: getattr(tl, str(v)) if k == "TYPE" else v for k, v in spec.constants}
    kinds = {"table": "*i64", "n_pairs": "i32", "n_buffers": "i32", "src_stride": "i64", "dst_stride": "i64"}
    source = ASTSource(
        fn=function,
        signature={name: kinds.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", sm, 32), options={"num_warps": spec.warps, "enable_fp_fusion": False}
    )
    metadata = compiled.metadata
    if getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "profile_scratch_size", 0):
        raise BackendUnavailableError("this Triton asks for scratch memory, which a copy kernel never needs")
    ptx: str = compiled.asm["ptx"]
    parameters = ptx[ptx.index(".entry") : ptx.index(")", ptx.index(".entry"))].count(".param")
    return DeviceCode(
        compiled.asm["cubin"], metadata.name, spec.warps * 32, metadata.shared, parameters - len(kinds), ptx
    )


# ---- NVRTC -----------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where compiled kernels and calibrations are kept: `AGENTRT_CACHE`, or `agentrt` under the user's cache folder."""
    override = os.environ.get("AGENTRT_CACHE")
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentrt"


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, never a part; two writers do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def bulk_source() -> str:
    """CUDA C++ of the bulk-copy kernel."""
    return (importlib.resources.files("agentrt.kernels") / "kv_copy_bulk.cu").read_text()


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC from the loader's path, or from NVIDIA's Python packages."""
    found = [
        Path(folder) for entry in sys.path for folder in Path(entry or ".").glob("nvidia/*/lib") if folder.is_dir()
    ]
    bundled = [str(path) for folder in found for path in sorted(folder.glob("libnvrtc.so.*"), reverse=True)]
    for name in [*bundled, "libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"]:
        try:
            # NVRTC opens its builtins by name, off the loader's path in a Python package: having them loaded already
            # helps.
            for builtins in Path(name).parent.glob("libnvrtc-builtins.so.*") if "/" in name else ():
                ctypes.CDLL(str(builtins))
            library = ctypes.CDLL(name)
        except OSError:
            continue
        signatures: dict[str, list[Any]] = {
            "nvrtcVersion": [POINTER(c_int), POINTER(c_int)],
            "nvrtcCreateProgram": [POINTER(c_void_p), c_char_p, c_char_p, c_int, c_void_p, c_void_p],
            "nvrtcCompileProgram": [c_void_p, c_int, POINTER(c_char_p)],
            "nvrtcGetProgramLogSize": [c_void_p, POINTER(c_size_t)],
            "nvrtcGetProgramLog": [c_void_p, c_char_p],
            "nvrtcGetCUBINSize": [c_void_p, POINTER(c_size_t)],
            "nvrtcGetCUBIN": [c_void_p, c_char_p],
            "nvrtcDestroyProgram": [POINTER(c_void_p)],
        }
        for function, arguments in signatures.items():
            getattr(library, function).argtypes = arguments
        return library
    raise BackendUnavailableError("NVRTC is not installed: pip install nvidia-cuda-nvrtc")


def nvrtc_missing() -> str:
    """Why the CUDA kernel cannot be compiled here; empty if it can."""
    try:
        _nvrtc()
    except BackendUnavailableError as error:
        return str(error)
    return ""


def nvrtc_version() -> tuple[int, int]:
    """Major and minor version of the NVRTC in use."""
    major, minor = c_int(), c_int()
    _nvrtc().nvrtcVersion(byref(major), byref(minor))
    return major.value, minor.value


def compile_bulk(spec: KernelSpec, sm: int, *, cache: bool = True) -> DeviceCode:
    """Machine code of the bulk-copy kernel, from the cache on disk or by NVRTC (under a second)."""
    if sm < 90:
        raise BackendUnavailableError(f"bulk copies need compute capability 9.0, this device has: {sm / 10}")
    options = [f"--gpu-architecture=sm_{sm}", "--std=c++17", *(f"-D{name}={value}" for name, value in spec.constants)]
    source = bulk_source()
    identity = "\0".join([source, *options, str(nvrtc_version())])
    path = cache_folder() / "cubin" / f"{hashlib.sha256(identity.encode()).hexdigest()}.cubin"
    cubin = path.read_bytes() if cache and path.is_file() else b""
    # A truncated file (full disk, killed machine) is compiled again.
    if not cubin.startswith(b"\x7fELF"):
        cubin = _compile_cuda(source, options)
        if cache:
            # A read-only home costs a second per process, nothing else.
            with contextlib.suppress(OSError):
                write_atomically(path, cubin)
    constants = spec.options
    shared = int(constants["SLOT"]) * int(constants["RING"]) * int(constants["WARPS"])
    return DeviceCode(cubin, spec.kind, spec.warps * 32, shared, 0)


def _compile_cuda(source: str, options: list[str]) -> bytes:
    nvrtc = _nvrtc()
    program = c_void_p()
    code = nvrtc.nvrtcCreateProgram(byref(program), source.encode(), b"kv_copy_bulk.cu", 0, None, None)
    if code:
        raise BackendUnavailableError(f"nvrtcCreateProgram failed: error {code}")
    try:
        arguments = (c_char_p * len(options))(*[option.encode() for option in options])
        if nvrtc.nvrtcCompileProgram(program, len(options), arguments):
            size = c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise BackendUnavailableError(
                f"NVRTC {nvrtc_version()} rejects the kernel: {re.sub(chr(10), ' ', log.value.decode())[:500]}"
            )
        size = c_size_t()
        nvrtc.nvrtcGetCUBINSize(program, byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))
