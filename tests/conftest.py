"""What several test folders share: the command line as a subprocess, a tiny trace, the recorded traces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import ROOT, Run, tiny_lines


@pytest.fixture(scope="session")
def agentrt_cli(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs ``agentrt`` away from the source tree, as a user would."""
    cwd = tmp_path_factory.mktemp("cwd")

    def run(*arguments: object, cwd: Path = cwd, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "agentrt", *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def tiny_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six sessions, thirty calls, in the agentrt format."""
    path = tmp_path_factory.mktemp("traces") / "tiny.jsonl"
    path.write_text("\n".join(tiny_lines()) + "\n")
    return path


@pytest.fixture(scope="session")
def recorded_traces() -> list[Path]:
    """The recorded workloads, from $AGENTRT_TRACES or beside the repository; skips where there are none."""
    folder = Path(os.environ.get("AGENTRT_TRACES", ROOT.parent / "shared" / "traces"))
    paths = sorted(folder.glob("*.jsonl.gz"))
    if not paths:
        pytest.skip(f"no recorded traces in {folder}; set AGENTRT_TRACES")
    return paths
