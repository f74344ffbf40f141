"""Order and holds of waiting calls, by the answers vLLM allows a connector: "start it" or "ask me again next step".

vLLM asks the connector about each waiting request in the order of its queue. Whoever schedules (a :class:`Scheduling`)
is asked once a step for one :class:`Verdict` per waiting call. A call is passed over while it is held, or, where not
all can start in this step anyway, while one with a lower rank is still to be asked about.

Bounds, whatever the verdicts say: a call is never passed over later than ``budget_us`` after vLLM first asked about it;
nothing is passed over while nothing runs; a call that was admitted once is never passed over again (preemption); a call
that vLLM did not ask about for a whole step delays nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

__all__ = ["Gate", "Load", "Scheduling", "Service", "Verdict", "Waiting"]


class Load(NamedTuple):
    """How busy the engine is."""

    now_us: int
    running_calls: int
    pool_blocks: int
    block_tokens: int
    # Blocks that no running call uses.
    free_blocks: int
    # Full blocks of the prompts admitted so far, and of these, hits.
    prompt_blocks: int
    hit_blocks: int
    # Tokens that a step can compute; 0 where it is not known.
    step_tokens: int
    # Blocks that hold nothing.
    empty_blocks: int = 0


class Waiting(NamedTuple):
    """A call that waits."""

    call: int
    session: int
    agent: int
    arrived_us: int
    prompt_tokens: int
    # Leading tokens whose KV is in the pool, as of its last look-up.
    resident_tokens: int
    # Key of the deepest block of these, 0 without one: calls that share it begin alike.
    group: int = 0
    # Whom it is served for, 0 where nobody said.
    tenant: int = 0


class Service(NamedTuple):
    """What a call has got."""

    prefill_tokens: int
    decoded_tokens: int
    # Tokens held in the pool, integrated over time.
    kv_token_us: int


class Verdict(NamedTuple):
    """What is to become of a waiting call."""

    # Lowest first.
    rank: int = 0
    # Passed over until then, microseconds; 0: not held.
    hold_until_us: int = 0


class Scheduling(Protocol):
    """Who decides. One thread calls everything; an exception counts as a fault and starts the call."""

    def arrived(self, call: Waiting) -> None:
        """A call has begun to wait."""

    def schedule(self, load: Load, waiting: Sequence[Waiting]) -> Sequence[Verdict]:
        """One verdict per waiting call, which stand in the order of their arrival."""

    def admitted(self, call: Waiting, now_us: int) -> None:
        """A call runs from now on."""

    def ended(self, call: int, now_us: int, service: Service) -> None:
        """A call that ran is over."""

    def withdrawn(self, call: int, now_us: int) -> None:
        """A call that waited never runs."""


class _Entry:
    __slots__ = ("asked", "asked_before", "call", "first_asked_us", "known_steps", "verdict")

    def __init__(self, call: Waiting) -> None:
        self.call = call
        self.first_asked_us: int | None = None
        self.verdict = Verdict()
        self.asked = False
        self.asked_before = True
        self.known_steps = 0


class Gate:
    """Says of each waiting call whether it starts now.

    Args:
        scheduling: Who decides.
        budget_us: Longest time for which a call is passed over.
    """

    def __init__(self, scheduling: Scheduling, budget_us: int) -> None:
        self.scheduling = scheduling
        self.budget_us = budget_us
        # Some only want to hear of calls.
        self._orders = getattr(scheduling, "orders", True)
        self.held = 0
        self.passed_over = 0
        self.overruled = 0
        self._waiting: dict[int, _Entry] = {}
        self._fresh = False
        self._scarce = False
        self._by_rank: list[_Entry] = []
        self._next = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def arrived(self, call: Waiting) -> None:
        """A call waits from now on."""
        self._waiting[call.call] = _Entry(call)
        self.scheduling.arrived(call)

    def starts(self, call: int, resident_tokens: int, group: int, load: Load) -> bool:
        """Whether a waiting call starts now; vLLM has just looked up how much of its prompt is resident."""
        entry = self._waiting.get(call)
        if entry is None:
            return True
        entry.call = entry.call._replace(resident_tokens=resident_tokens, group=group)
        if entry.first_asked_us is None:
            entry.first_asked_us = load.now_us
        entry.asked = True
        if load.running_calls == 0 or not self._orders:
            return True
        if not self._fresh:
            self._ask(load)
        held = entry.verdict.hold_until_us > load.now_us
        if not held and not (self._scarce and self._is_preceded(entry)):
            return True
        if load.now_us - entry.first_asked_us >= self.budget_us:
            self.overruled += 1
            return True
        if held:
            self.held += 1
        else:
            self.passed_over += 1
        return False

    def _ask(self, load: Load) -> None:
        self._fresh = True
        entries = list(self._waiting.values())
        for entry in entries:
            entry.verdict = Verdict()
        self._by_rank, self._next = [], 0
        verdicts = self.scheduling.schedule(load, [entry.call for entry in entries])
        for entry, verdict in zip(entries, verdicts, strict=True):
            entry.verdict = verdict
        missing = [entry.call.prompt_tokens - entry.call.resident_tokens for entry in entries]
        blocks = sum(-(-tokens // load.block_tokens) for tokens in missing)
        self._scarce = blocks > load.free_blocks or (load.step_tokens > 0 and sum(missing) > load.step_tokens)
        self._by_rank = sorted(
            (e for e in entries if e.verdict.hold_until_us <= load.now_us and (e.asked or e.asked_before)),
            key=lambda entry: entry.verdict.rank,
        )

    def _is_preceded(self, entry: _Entry) -> bool:
        by_rank = self._by_rank
        while self._next < len(by_rank):
            best = by_rank[self._next]
            if not best.asked and best.call.call in self._waiting:
                return best.verdict.rank < entry.verdict.rank
            self._next += 1
        return False

    def admitted(self, call: int, now_us: int) -> None:
        """A call has its blocks."""
        entry = self._waiting.pop(call, None)
        if entry is not None:
            self.scheduling.admitted(entry.call, now_us)

    def ended(self, call: int, now_us: int, service: Service) -> None:
        """A call is over, or was withdrawn while it waited."""
        if self._waiting.pop(call, None) is not None:
            self.scheduling.withdrawn(call, now_us)
        else:
            self.scheduling.ended(call, now_us, service)

    def step_ended(self) -> None:
        """The next question begins a new step."""
        if not self._fresh:
            return
        self._fresh = False
        for entry in self._waiting.values():
            # A newcomer may have come after vLLM had gone through its queue.
            entry.asked_before = entry.asked or entry.known_steps == 0
            entry.known_steps += 1
            entry.asked = False

    def clear(self) -> None:
        """Nothing waits that is known of."""
        self._waiting.clear()
        self._by_rank = []
        self._fresh = False
