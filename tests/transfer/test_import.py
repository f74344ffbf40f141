"""`agentrt.transfer` needs NumPy alone."""

from __future__ import annotations

import subprocess
import sys


def test_import_brings_neither_torch_nor_triton() -> None:
    code = (
        "import sys, agentrt.transfer, agentrt.kernels\n"
        "heavy = {'torch', 'triton', 'cuda'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
