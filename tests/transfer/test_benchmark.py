"""The benchmark's control flow, from the first check to the last bar, on host memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agentrt.transfer.driver import driver_or_reason

SCRIPT = Path(__file__).parents[2] / "benches" / "kv_copy.py"


def test_dry_run_goes_through_every_section_and_checks_every_method(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, "-W", "error", str(SCRIPT), "--dry-run", "--json", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    body = json.loads(file.read_text())
    assert body["failed"] == body["skipped"] == []
    sections = {row["section"] for row in body["rows"]}
    wanted = "ring check, ceiling, calibration, latency, ctas, interference, int8, graph, both, layers, sweep, bar"
    assert sections == set(wanted.split(", "))
    for direction in ("h2d", "d2h", "d2d"):
        methods = {row["method"] for row in body["rows"] if row["section"] == "sweep" and row["direction"] == direction}
        assert {"merged", "dma_batch", "triton", "triton 8 B", "bulk", "auto"} <= methods
    assert "dry run: no figure above means anything" in result.stdout
    assert body["environment"]["device"].startswith("simulated device")


def test_a_method_with_wrong_bytes_is_reported_and_not_timed(tmp_path: Path) -> None:
    sabotage = tmp_path / "sabotage.py"
    sabotage.write_text(
        "import runpy, sys\n"
        "from agentrt.transfer import SimulatedDriver\n"
        "copy_batch = SimulatedDriver.copy_batch\n"
        "def lossy(self, device, dsts, srcs, sizes, stream):\n"
        "    copy_batch(self, device, dsts, srcs, sizes - 1, stream)\n"
        "SimulatedDriver.copy_batch = lossy\n"
        f"sys.argv = ['kv_copy.py', '--dry-run', '--sections', 'sweep', '--json', {str(tmp_path / 'rows.json')!r}]\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, str(sabotage)], capture_output=True, text=True, timeout=100)
    assert result.returncode == 1, result.stderr
    body = json.loads((tmp_path / "rows.json").read_text())
    assert any("h2d 4096 dma_batch: bytes differ" in line for line in body["failed"])
    methods = {row["method"] for row in body["rows"] if row["section"] == "sweep"}
    assert "triton" in methods
    assert "dma_batch" not in methods


@pytest.mark.skipif(driver_or_reason()[0] is not None, reason="there is a CUDA driver")
def test_without_a_gpu_it_says_so_and_names_the_dry_run() -> None:
    result = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "no CUDA driver on this machine" in result.stderr
    assert "--dry-run" in result.stderr


def test_host_mode_checks_and_times_every_way_without_a_gpu() -> None:
    command = [sys.executable, "-W", "error", str(SCRIPT), "--host", "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "WRONG" not in result.stdout
    assert result.stdout.count("rust ") == 5
