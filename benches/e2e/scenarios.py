"""Small scenarios for the scheduling policies: sessions with pauses and tenants, sent by the clock.

Prompts are made of the engine's blocks: the agent's system prompt, which its calls in all sessions share, then a part
of its own in the session, which grows from call to call.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from benches.e2e.workloads import ENGINE_BLOCK, SCALED_BLOCK, Call

PER_BLOCK = ENGINE_BLOCK // SCALED_BLOCK


@dataclass(frozen=True)
class Paced:
    """A session: its calls, and the seconds it pauses before each."""

    calls: list[Call]
    pauses_s: list[float]
    tenant: str = ""
    #: The tool that runs after each call; empty where nobody says.
    tools: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Scenario:
    """One policy's case."""

    policy: str
    #: What is to get better: of the result, lower is better.
    metric: str
    #: Sessions at a time.
    concurrency: int
    pool_blocks: int
    sessions: Callable[[random.Random], list[Paced]]
    about: str


def _blocks(owner: str, n: int) -> list[int]:
    """Numbers of so many engine blocks that are the owner's alone."""
    # Not hash(): it differs from process to process.
    base = int.from_bytes(owner.encode()[-6:], "big") * 1_000_003 % (1 << 40) << 16
    return [base + i for i in range(n * PER_BLOCK)]


def _call(session: str, agent: str, step: int, system: int, own: int) -> Call:
    blocks = (*_blocks(f"@{agent}", system), *_blocks(f"{session}{agent}", own))
    return Call(session, agent, step, blocks)


def _turns(rng: random.Random, predictable: bool, sessions: int = 6, rounds: int = 6) -> list[Paced]:
    made = []
    for s in range(sessions):
        agents = [("a", "b", "c", "d")[i % 4] if predictable else rng.choice("abcd") for i in range(4 * rounds)]
        calls = [_call(f"s{s}", agent, i, 8, 24) for i, agent in enumerate(agents)]
        made.append(Paced(calls, [rng.uniform(0.4, 0.6) for _ in calls]))
    return made


def _growing(sessions: int, calls: int, least: int, grows: int, name: str = "s") -> list[list[Call]]:
    return [[_call(f"{name}{s}", "a", i, 4, least + grows * i) for i in range(calls)] for s in range(sessions)]


def _burst(rng: random.Random) -> list[Paced]:
    return [Paced(calls, [0.0] * len(calls)) for calls in _growing(24, 8, 12, 4)]


def _tenants(rng: random.Random) -> list[Paced]:
    heavy = [Paced(calls, [0.0] * len(calls), "heavy") for calls in _growing(12, 8, 16, 2, "h")]
    light = [Paced(calls, [0.0] * len(calls), "light") for calls in _growing(3, 8, 16, 2, "l")]
    mixed = heavy + light
    rng.shuffle(mixed)
    return mixed


def _tools(rng: random.Random) -> list[Paced]:
    made = []
    for calls in _growing(24, 8, 12, 4):
        tools = ["slow" if rng.random() < 0.3 else "fast" for _ in calls]
        waits = {"slow": lambda: rng.uniform(0.4, 0.8), "fast": lambda: rng.uniform(0.01, 0.05)}
        # A pause follows the call that used the tool.
        made.append(Paced(calls, [0.0, *(waits[tool]() for tool in tools[:-1])], tools=tools))
    return made


SCENARIOS = {
    "speculation": Scenario(
        "speculation", "ttft_ms", 3, 192, lambda rng: _turns(rng, predictable=True),
        "three sessions of four agents in turn, half a second between calls, a pool of one and a half sessions",
    ),
    "speculation, no order": Scenario(
        "speculation", "ttft_ms", 3, 192, lambda rng: _turns(rng, predictable=False),
        "the same with agents drawn at random",
    ),
    "batch_shaping": Scenario(
        "batch_shaping", "session_s", 24, 220, _burst,
        "24 sessions of eight calls at once, a pool of five",
    ),
    "fairness": Scenario(
        "fairness", "light_session_s", 15, 400, _tenants,
        "a tenant with twelve sessions beside one with three",
    ),
    "tool_gap": Scenario(
        "tool_gap", "session_s", 24, 220, _tools,
        "24 sessions at once whose tools take 0.03 s or 0.6 s, a pool of five",
    ),
}  # fmt: skip
