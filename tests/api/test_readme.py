"""What README and examples show is what runs."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

from tests.support import ROOT


def test_the_scheduler_of_the_readme_runs_in_25_lines() -> None:
    section = (ROOT / "README.md").read_text().partition("## Use it from your own scheduler")[2].partition("\n## ")[0]
    (snippet,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(snippet.splitlines()) <= 25
    for call in (".call_start(", ".score(", ".predict(", ".act("):
        assert call in snippet
    scope: dict[str, Any] = {}
    exec(snippet, scope)
    runtime, cache = scope["runtime"], scope["cache"]
    assert len(cache) == runtime.stats()["resident_blocks"] == runtime.pool_blocks
    assert runtime.stats()["hit_blocks"] > 0
    assert runtime.stats()["missing_victims"] == 0
    assert len(scope["worth"]) == len(scope["prompt"])
    assert 0 < scope["upcoming"][0].probability <= 1


def test_the_example_scheduler_keeps_more_than_lru() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "toy_scheduler.py")], capture_output=True, text=True, check=True
    )
    rates = {name: float(rate) for name, rate in re.findall(r"^(\w+) +([\d.]+) %", done.stdout, re.MULTILINE)}
    assert rates.keys() == {"lru", "kv_cache"}
    assert rates["kv_cache"] > rates["lru"]
