"""The wheel in ``dist/`` installs into new environments without Rust and replays, on every CPython of the machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import ROOT

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def _interpreter(version: str) -> str | None:
    """A working CPython of this version: shims that point nowhere do not count."""
    found = [shutil.which(f"python{version}")]
    found += [str(path) for path in sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]
    for python in filter(None, found):
        done = subprocess.run([python, "-c", "import sys, ensurepip; print(sys.version_info[:2])"], capture_output=True)
        if done.returncode == 0 and done.stdout.decode().strip() == f"({version.replace('.', ', ')})":
            return python
    return None


@pytest.fixture(scope="module")
def wheel() -> Path:
    wheels = sorted((ROOT / "dist").glob("agentrt-*.whl"))
    if not wheels:
        pytest.skip("no wheel in dist/; run `make wheel`")
    return wheels[-1]


def test_one_wheel_serves_every_python_from_3_10(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_wheel_replays_in_a_new_environment_without_rust(version: str, wheel: Path, tmp_path: Path) -> None:
    python = _interpreter(version)
    if python is None:
        pytest.skip(f"no CPython {version} on this machine")
    venv = tmp_path / "venv"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CARGO", "RUST", "PYTHON", "VIRTUAL_ENV"))}
    environment["PATH"] = f"{venv / 'bin'}:/usr/bin:/bin"

    def run(*command: object) -> str:
        done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if uv:
        run(uv, "venv", "--quiet", "--python", python, venv)
        run(uv, "pip", "install", "--quiet", "--python", venv / "bin" / "python", "--only-binary", ":all:", wheel)
    else:
        run(python, "-m", "venv", venv)
        run(venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:", wheel)

    run("agentrt", "generate", "pipeline", "--sessions", 4, "-o", "tiny.jsonl.gz")
    run("agentrt", "replay", "tiny.jsonl.gz", "--policy", "lru,min", "--capacity", "20%", "--json", "out.json")
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [row["policy"] for row in results] == ["lru", "min"]
    run(venv / "bin" / "python", "-c", "import agentrt; print(agentrt.build_info())")
