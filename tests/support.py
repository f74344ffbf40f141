"""Helpers of several test folders."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def trace_line(**changes: Any) -> str:
    """One line of the agentrt format with some fields changed, and those named by ``drop`` left out."""
    dropped = changes.pop("drop", [])
    line: dict[str, Any] = {
        "workload": "tiny", "session_id": "s0", "step": 0, "agent": "planner", "instance": None, "parent": None,
        "t_arrival": None, "t_scope": "none", "llm_latency_s": None, "tool_name": None, "tool_latency_s": None,
        "prompt_tokens": 64, "output_tokens": 16, "rec_prompt_tokens": None, "block_size": 16,
        "blocks": [[0, 4]], "out_blocks": [[4, 1]], "fidelity": "recorded",
    }  # fmt: skip
    line.update(changes)
    for name in dropped:
        del line[name]
    return json.dumps(line)


def tiny_lines(sessions: int = 6, calls: int = 5) -> list[str]:
    """Sessions of two agents that extend their own prompts; small enough to reason about."""
    lines = []
    next_block = 0
    for session in range(sessions):
        prompts: dict[str, list[list[int]]] = {}
        for step in range(calls):
            agent = ("planner", "worker")[step % 2]
            runs = prompts.setdefault(agent, [])
            runs.append([next_block, 6])
            next_block += 6
            n = sum(length for _, length in runs)
            out = [next_block, 2]
            next_block += 2
            lines.append(
                trace_line(session_id=f"s{session}", step=step, agent=agent, blocks=list(runs), out_blocks=[out],
                           prompt_tokens=16 * n + 5, output_tokens=40, tool_name="search" if step % 3 == 0 else None)
            )  # fmt: skip
            runs.append(out)
    return lines
