"""What an adapter of a framework does, written down for the next one.

A framework needs no more than this, and its users no more than one line:

1. **Say whose call it is.** Before a tool runs, :meth:`ToolAdapter.scope_of` turns what the framework knows (run or
   thread id, agent or node, tenant) into a :class:`agentrt.tools.Scope`. It must be the same for every call of one
   run, and its trust domain must come from the application, never from model output.
2. **Pass the call through.** :meth:`ToolAdapter.protect` gives back the framework's own tool objects with the function
   inside replaced, *after* the framework has validated and converted the arguments, so that results, errors, messages
   and callbacks look exactly as before. What it cannot wrap it refuses by name: a tool that slips past is a hole.
   Place the wrapper where a call can be *skipped*; observers (callbacks, spans) are too late.
3. **Say no in the framework's words.** :meth:`ToolAdapter.refusal` turns a denied call into what the framework shows a
   model as a failed tool, so that the run goes on.
4. **Report text that moves.** Results are labelled by the runtime. Where text crosses runs or agents without a tool
   (hand-overs, sub-agents, summaries, shared memory), call `Taint.flow`, `Taint.summary`; within one run the default
   `spread="session"` needs no reports.
5. **Say when a run ends** (`ToolRuntime.end_session`), so that what runs ahead for it stops.
6. **Say whose the model's requests are**: :mod:`agentrt.frameworks.runs` has the words, and tells of ends.

Calls run ahead never pass through the framework: no callback, message or span shows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from agentrt.safety.guard import DeniedError
from agentrt.tools import Scope, ToolRuntime

__all__ = ["ToolAdapter"]


class ToolAdapter(Protocol):
    """The three functions of an adapter; :mod:`agentrt.frameworks.langgraph` is one."""

    def scope_of(self, native: Any) -> Scope:
        """Whose call this is, from the framework's own context."""

    def protect(
        self, tools: Sequence[Any], runtime: ToolRuntime, declarations: Mapping[str, Mapping[str, Any]]
    ) -> list[Any]:
        """The framework's tools with their calls passing through `runtime`."""

    def refusal(self, denied: DeniedError) -> Exception:
        """A denied call as the framework's own kind of tool failure."""
