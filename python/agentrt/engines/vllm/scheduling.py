"""The scheduling policies of the core (``batch_shaping``, ``agent_fairness``, ..) behind the adapter's gate.

vLLM's adapter can say: arrivals, admissions, service (at the end of a call), tenants, hits, the pool, and of a waiting
call what was resident of its prompt when vLLM last asked about it. :mod:`agentrt.engines.vllm.planning` adds silent
sessions and idle capacity.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import agentrt
from agentrt.engines.vllm.gate import Load, Service, Verdict, Waiting

__all__ = ["CoreScheduling"]

UNKNOWN = ("tools", "preemptions", "host_tier", "idle_capacity")
ORDERING = {"batch_shaping", "fairness", "agent_fairness", "tool_gap"}


class CoreScheduling:
    """Asks ``agentrt.Scheduler``.

    Args:
        runtime: Whose policies decide.
        workload: Whose sessions call.
        block_tokens: Tokens in a block of the pool.
        supplies: What of ``UNKNOWN`` the adapter does report.
    """

    def __init__(
        self, runtime: agentrt.Runtime, workload: agentrt.Workload, block_tokens: int, supplies: Collection[str] = ()
    ) -> None:
        self.workload = workload
        self.scheduler = agentrt.Scheduler(runtime, block_tokens, [name for name in UNKNOWN if name not in supplies])
        self.orders = not ORDERING.isdisjoint(runtime.policies)

    def arrived(self, call: Waiting) -> None:
        """A call has begun to wait."""
        session = self.workload.session(call.session)
        self.scheduler.arrived(session, call.agent, call.call, call.prompt_tokens, call.tenant, call.arrived_us / 1e6)

    def schedule(self, load: Load, waiting: Sequence[Waiting]) -> list[Verdict]:
        """One verdict per waiting call."""
        order, holds = self.scheduler.order(
            [call.call for call in waiting],
            [call.resident_tokens for call in waiting],
            [call.group for call in waiting],
            running_calls=load.running_calls,
            pinned_blocks=max(load.pool_blocks - load.free_blocks, 0),
            free_blocks=load.empty_blocks,
            budget_tokens=load.step_tokens,
            prompt_blocks=load.prompt_blocks,
            hit_blocks=load.hit_blocks,
            time=load.now_us / 1e6,
        )
        ranks = {at: rank for rank, at in enumerate(order.tolist())}
        return [Verdict(ranks[i], int(hold * 1e6)) for i, hold in enumerate(holds.tolist())]

    def admitted(self, call: Waiting, now_us: int) -> None:
        """A call runs from now on."""
        self.scheduler.admitted(call.call, call.resident_tokens, time=now_us / 1e6)

    def ended(self, call: int, now_us: int, service: Service) -> None:
        """A call that ran is over."""
        prefill, decoded, held = service
        self.scheduler.served([call], [prefill], [decoded], [held], time=now_us / 1e6)
        self.scheduler.ended(call, now_us / 1e6)

    def withdrawn(self, call: int, now_us: int) -> None:
        """A call that waited never runs."""
        self.scheduler.withdrawn(call, now_us / 1e6)

    def idle(self, load: Load) -> list[agentrt.Prefill]:
        """What to prefill while the engine has nothing else to do."""
        return self.scheduler.idle(
            running_calls=load.running_calls,
            pinned_blocks=0,
            free_blocks=load.empty_blocks,
            budget_tokens=load.step_tokens,
            time=load.now_us / 1e6,
        )

    def gaps(
        self,
        load: Load,
        silent: Sequence[tuple[int, int, int, int]],
        resident_tokens: Sequence[int],
        host_bytes_per_s: int,
    ) -> list[str]:
        """What becomes of the blocks of silent sessions: (session, agent, tool, since when)."""
        answers, _ = self.scheduler.gaps(
            [self.workload.session(session) for session, *_ in silent],
            [agent for _, agent, *_ in silent],
            [tool for *_, tool, _ in silent],
            [started_us / 1e6 for *_, started_us in silent],
            resident_tokens,
            running_calls=load.running_calls,
            pinned_blocks=max(load.pool_blocks - load.free_blocks, 0),
            free_blocks=load.empty_blocks,
            host_bytes_per_s=host_bytes_per_s,
            time=load.now_us / 1e6,
        )
        return list(answers)
