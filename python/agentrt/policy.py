"""Policies in Python: the protocol that a runtime and the replay both drive.

The same class works in both: pass an object (or the class) in ``agentrt.Runtime(policies=(...))``, pass the class to
``agentrt.replay.run(policies=[...])``. What a policy names is checked by the core, what it raises is counted and
logged once; see docs/policies/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from agentrt._core import ReplayCall as PolicyCall

__all__ = ["Policy", "PolicyCall"]


@runtime_checkable
class Policy(Protocol):
    """What a policy hears and decides. Block keys are integers; equal keys mean equal full prefixes.

    Source: the plug-in interface of arXiv 2605.27744, reduced to what is decided on the engine's hot path.
    """

    def call_start(self, call: PolicyCall, /) -> object:
        """A call starts: ``call.prompt`` is in use until it finishes; its first ``call.hit`` blocks are resident."""

    def call_finish(self, call: PolicyCall, /) -> object:
        """A call has finished: ``call.output`` is resident, nothing uses ``call.released`` any more (root first)."""

    def evict(self, n: int, time_us: int, /) -> Sequence[int] | None:
        """Names up to ``n`` victims, children before parents; None leaves the decision to the next policy.

        Blocks in use, absent, or with a resident child are skipped and counted; the next policy names what is missing.
        """
