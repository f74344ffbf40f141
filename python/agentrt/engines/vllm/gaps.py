"""Sessions between two calls, and what becomes of their blocks meanwhile: the policy ``tool_gap``.

vLLM does not know of tools. A session's silence is taken for one: from the end of its last call in flight to its next
call; which tool it is stays unknown unless the request says so (``tool``, beside ``agent_id``: what will run after it).

Nothing is held in vLLM: its blocks stay free. What the core names as victims is corrected here:

1. blocks of released sessions go first, deepest first, if nothing else needs them (the core refuses the others);
2. then what else the core names;
3. kept blocks are put aside and go only where the others do not suffice, in the order in which the core named them.

What demoting means: with vLLM's CPU tier beside (which has copies of all that was computed), the same as releasing;
vLLM loads it when the session calls. Without that tier nothing is demoted.

Memory: ``MOST`` sessions, the longest silent forgotten first. A question takes some 10 us a silent session.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from agentrt._core import block_keys
from agentrt.engines.vllm.callers import CALLERS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agentrt.engines.vllm.core import RuntimeCore
    from agentrt.engines.vllm.gate import Load
    from agentrt.engines.vllm.scheduling import CoreScheduling

__all__ = ["Gaps", "Released"]

MOST = 128
ROUNDS = 4
# The policy only asks whether there is a link.
HOST_BYTES_PER_S = 1 << 33

_NO_KEYS: NDArray[np.uint64] = np.zeros(0, np.uint64)


class Released:
    """Names the blocks of released sessions first: a policy of the runtime, before all others."""

    def __init__(self) -> None:
        self.keys: list[int] = []
        self.named = 0

    def call_start(self, call: object) -> None:
        """Nothing to learn."""

    def call_finish(self, call: object) -> None:
        """Nothing to learn."""

    def evict(self, n: int, time_us: int) -> list[int]:  # noqa: ARG002 - the protocol of policies
        """The next blocks to go."""
        victims = self.keys[-1 : -n - 1 : -1]
        del self.keys[len(self.keys) - len(victims) :]
        self.named += len(victims)
        return victims


class _Session:
    __slots__ = ("agent", "hashes", "kept", "keys", "live", "shared", "started_us", "tool")

    def __init__(self, shared: int) -> None:
        self.live = 0
        # Leading blocks that other sessions had before it.
        self.shared = shared
        self.agent = self.tool = 0
        # None while a call is in flight.
        self.started_us: int | None = None
        self.hashes: list[bytes] = []
        self.keys = _NO_KEYS
        self.kept = False


class Gaps:
    """Knows which sessions are silent and corrects victims accordingly.

    Args:
        scheduling: Who is asked.
        core: The runtime, whose first policy is ``released``.
        released: That policy.
        pool: vLLM's.
        block_size: Tokens of a block.
    """

    def __init__(
        self, scheduling: CoreScheduling, core: RuntimeCore, released: Released, pool: Any, block_size: int
    ) -> None:
        self.scheduling = scheduling
        self.core = core
        self.released = released
        self.pool = pool
        self.block_size = block_size
        self.decided = {"undecided": 0, "keep": 0, "demote": 0, "release": 0}
        self.spared_blocks = 0
        self.given_blocks = 0
        self._sessions: dict[int, _Session] = {}
        # Whose a block is: of the sessions that have it, the one that fell silent last.
        self._owners: dict[int, int] = {}

    def arrived(self, session: int, now_us: int) -> None:
        """A session calls: it is silent no more."""
        one = self._sessions.pop(session, None)
        if one is None:
            one = _Session(-1)
            if len(self._sessions) >= MOST:
                self._drop()
        # To the end: the longest silent stands first.
        self._sessions[session] = one
        one.live += 1
        if one.started_us is not None:
            self._disown(session, one)
            one.started_us = None
            if one.tool:
                self.core.tool_ended(session, one.tool, now_us)

    def _drop(self) -> None:
        for session, one in self._sessions.items():
            if one.started_us is not None:
                self.over(session)
                return

    def _disown(self, session: int, one: _Session) -> None:
        owners = self._owners
        for key in one.keys.tolist():
            if owners.get(key) == session:
                del owners[key]

    def withdrawn(self, session: int) -> None:
        """A call of it has ended that never ran."""
        one = self._sessions.get(session)
        if one is not None:
            one.live -= 1

    def ended(self, load: Load, session: int, agent: int, tool: int, request: Any, blocks: int, hit: int) -> None:
        """A call has ended and leaves so many full blocks; so many of its prompt were hits."""
        one = self._sessions.get(session)
        if one is None:
            return
        one.live -= 1
        if one.shared < 0:
            one.shared = hit
        if one.live > 0:
            return
        one.agent, one.tool, one.started_us = agent, tool, load.now_us
        one.hashes = request.block_hashes[:blocks]
        one.keys = block_keys(one.hashes, 0, blocks)
        one.kept = False
        self._owners.update(dict.fromkeys(one.keys.tolist(), session))
        if tool:
            self.core.tool_started(session, tool, load.now_us)
        # The policy learns of the gap; what becomes of it is asked when blocks have to go.
        self._answers(load, [(session, one)], [blocks])

    def over(self, session: int) -> None:
        """No more calls of this session."""
        one = self._sessions.pop(session, None)
        if one is not None:
            self._disown(session, one)

    def clear(self) -> None:
        """Nothing is resident."""
        self._sessions.clear()
        self.released.keys.clear()
        self._owners.clear()

    def _resident(self, one: _Session) -> int:
        """Leading blocks of its last call that vLLM still has."""
        low, high = 0, len(one.hashes)
        while low < high:
            middle = (low + high + 1) // 2
            if self.pool.get_cached_block(one.hashes[middle - 1], [0]):
                low = middle
            else:
                high = middle - 1
        return low

    def _answers(self, load: Load, silent: list[tuple[int, _Session]], resident_blocks: list[int]) -> list[str]:
        answers: list[str] = self.scheduling.gaps(
            load,
            [(session, one.agent, one.tool, one.started_us or 0) for session, one in silent],
            [n * self.block_size for n in resident_blocks],
            HOST_BYTES_PER_S if CALLERS.wanted else 0,
        )
        return answers

    def ask(self, load: Load) -> None:
        """Asks what becomes of the blocks of silent sessions."""
        silent = [(session, one) for session, one in self._sessions.items() if one.started_us is not None]
        resident = [self._resident(one) for _, one in silent]
        answers = self._answers(load, silent, resident)
        released: list[int] = []
        for (_, one), n, answer in zip(silent, resident, answers, strict=True):
            self.decided[answer] += 1
            one.kept = answer == "keep"
            if answer in ("release", "demote"):
                # Taken from the end.
                released += one.keys[max(one.shared, 0) : n].tolist()
        self.released.keys = released

    def evict(self, n: int, now_us: int) -> list[int]:
        """Victims, kept ones last."""
        act, time = self.core.runtime.act, now_us / 1e6
        owners, sessions = self._owners, self._sessions
        chosen: list[int] = []
        aside: list[int] = []
        for _ in range(ROUNDS):
            victims = act("evict", n - len(chosen), None, time).tolist()
            before = len(aside)
            for key in victims:
                session = sessions.get(owners.get(key, -1))
                (aside if session is not None and session.kept else chosen).append(key)
            if len(aside) == before or len(chosen) >= n:
                break
        if aside:
            spare = {owners[key] for key in aside}
            # To the core their chains ended above what has been put aside: what they hang on is not to go, either.
            chains = {key for session in spare for key in sessions[session].keys.tolist()}
            aside += (key for key in chosen if key in chains)
            chosen = [key for key in chosen if key not in chains]
            short = n - len(chosen)
            given, spared = (aside[:short], aside[short:]) if short > 0 else ([], aside)
            chosen += given
            self.given_blocks += len(given)
            self.spared_blocks += len(spared)
            self._spare(spare, given, now_us)
        return chosen

    def _spare(self, sessions: set[int], given: list[int], now_us: int) -> None:
        """Of what the core holds for gone, only the given is: it hears again of what these sessions have."""
        gone = np.array(given, np.uint64)
        for session in sessions:
            one = self._sessions[session]
            lost = np.isin(one.keys, gone)
            n = min(self._resident(one), int(lost.argmax()) if lost.any() else len(one.keys))
            self.core.restored(session, one.agent, now_us, one.keys[:n])
