"""agentrt: a runtime layer between agent frameworks and LLM serving engines."""

from __future__ import annotations

import importlib as _importlib
import warnings as _warnings
from typing import TYPE_CHECKING as _TYPE_CHECKING

from agentrt._core import (
    Prediction,
    Prefetch,
    Prefill,
    Runtime,
    Scheduler,
    Session,
    Workload,
    block_key,
    build_info,
    is_debug_build,
)
from agentrt.api import EventKind, act, configure, default_runtime, observe, predict, score, workload
from agentrt.errors import AgentRTError
from agentrt.policy import Policy, PolicyCall

if _TYPE_CHECKING:
    from agentrt import errors, replay, report, safety, tools, transfer
    from agentrt.tools import tool

__all__ = [
    "AgentRTError",
    "EventKind",
    "Policy",
    "PolicyCall",
    "Prediction",
    "Prefetch",
    "Prefill",
    "Runtime",
    "Scheduler",
    "Session",
    "Workload",
    "act",
    "block_key",
    "build_info",
    "configure",
    "default_runtime",
    "errors",
    "observe",
    "predict",
    "replay",
    "report",
    "safety",
    "score",
    "tool",
    "tools",
    "transfer",
    "workload",
]
__version__ = build_info().split()[1]

# Parts that load when they are first used, so that `import agentrt` stays light.
_LAZY = ("replay", "report", "safety", "tools", "transfer")


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
