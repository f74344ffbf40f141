"""Runs `interpreted_kernels.py` in a process where Triton's interpreter is on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_triton_kernels_are_byte_exact_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("triton", reason="triton is not installed")
    here = Path(__file__)
    root = here.parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--import-mode=importlib"]
    options = [
        "-o",
        "pythonpath=.",
        "-o",
        "addopts=",
        "--rootdir",
        str(root),
        str(here.with_name("interpreted_kernels.py")),
    ]
    result = subprocess.run(
        [*command, *options],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= 90, result.stdout
