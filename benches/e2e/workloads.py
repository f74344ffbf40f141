"""Workloads for a real engine: calls of a trace as prompts of token ids.

Every block of a trace becomes ``tokens_per_block`` tokens that only depend on the block's number, so equal prefixes
stay equal prefixes and everything else differs. What a recorded answer added to the next prompt is part of that prompt;
what the engine answers itself is not fed back.
"""

from __future__ import annotations

import gzip
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORDED = ("whowhen_magentic", "marble_research", "taubench_airline")
GENERATED = ("coding_team", "research_tree")


@dataclass(frozen=True)
class Call:
    """One call: who, and the numbers of the prompt's blocks."""

    session: str
    agent: str
    blocks: list[int]


def _rows(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


def sessions(name: str, traces: Path, seed: int = 0) -> list[list[Call]]:
    """The workload's sessions in a seeded order; a name of a recorded trace or of a generator."""
    path = traces / f"{name}.jsonl.gz"
    if path.exists():
        rows = _rows(path)
    else:
        import agentrt._core as core

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "generated.jsonl"
            core.Trace.generate(name, seed=seed).write(file)
            rows = _rows(file)
    by_session: dict[str, list[Call]] = {}
    shared: dict[tuple[str, int], int] = {}
    for row in rows:
        blocks = [b for first, n in row["blocks"] for b in range(first, first + n)]
        if row.get("sys_key"):
            # Calls with equal system prompts share their first blocks, whatever numbers a session gave them.
            for i in range(min(row["sys_blocks"], len(blocks))):
                blocks[i] = shared.setdefault((row["sys_key"], i), -1 - len(shared))
        by_session.setdefault(row["session_id"], []).append(Call(row["session_id"], row["agent"], blocks))
    order = sorted(by_session)
    random.Random(seed).shuffle(order)
    return [by_session[session] for session in order]


def tokens(call: Call, tokens_per_block: int, longest: int) -> list[int]:
    """The call's prompt; what is beyond ``longest`` tokens is cut off."""
    prompt: list[int] = []
    for block in call.blocks[: longest // tokens_per_block]:
        rng = random.Random(block)
        prompt += [rng.randrange(1000, 31_000) for _ in range(tokens_per_block)]
    return prompt or [1000]
