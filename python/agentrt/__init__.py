"""agentrt: a runtime layer between agent frameworks and LLM serving engines."""

from __future__ import annotations

import importlib as _importlib
import warnings as _warnings
from typing import TYPE_CHECKING as _TYPE_CHECKING

from agentrt._core import build_info, is_debug_build
from agentrt.errors import AgentRTError

if _TYPE_CHECKING:
    from agentrt import errors, replay, report, safety, tools
    from agentrt.tools import tool

__all__ = ["AgentRTError", "build_info", "errors", "replay", "report", "safety", "tool", "tools"]
__version__ = build_info().split()[1]

# Parts that load when they are first used, so that `import agentrt` stays light.
_LAZY = ("replay", "report", "safety", "tools")


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return _importlib.import_module(f"agentrt.{name}")
    if name == "tool":
        return _importlib.import_module("agentrt.tools").tool
    raise AttributeError(f"module 'agentrt' has no attribute {name!r}")


if is_debug_build():
    _warnings.warn(
        "agentrt was built without optimisation and is 10-50x slower; rebuild with `maturin develop --release`",
        RuntimeWarning,
        stacklevel=2,
    )
