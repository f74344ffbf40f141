"""The examples of docs/transfer.md run as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_the_guides_examples_run() -> None:
    text = (Path(__file__).parents[2] / "docs" / "transfer.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    result = subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(blocks)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("rust 32768 ")
