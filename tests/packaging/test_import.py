"""``import agentrt`` is light, and the package says what it is."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

import agentrt


def _modules_after(statement: str) -> set[str]:
    code = f"import sys\nbefore = set(sys.modules)\n{statement}\nprint(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_import_loads_numpy_and_the_standard_library_alone() -> None:
    third_party = {name for name in _modules_after("import agentrt") if name not in sys.stdlib_module_names}
    # numpy's own import machinery may show up; everything else must stay out.
    assert {name for name in third_party if not name.startswith("_")} <= {"agentrt", "numpy"}


def test_replay_api_needs_no_command_line_packages() -> None:
    assert not {"click", "rich", "rich_click"} & _modules_after("import agentrt.replay")


def test_version_is_the_same_everywhere() -> None:
    assert agentrt.__version__ == importlib.metadata.version("agentrt")
    assert agentrt.build_info().startswith(f"agentrt {agentrt.__version__} (")


def test_both_commands_exist() -> None:
    script = Path(sysconfig.get_path("scripts")) / "agentrt"
    for command in ([str(script)], [sys.executable, "-m", "agentrt"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"agentrt {agentrt.__version__}"


def test_kernels_are_part_of_the_package() -> None:
    assert _modules_after("import agentrt.kernels") >= {"agentrt"}
