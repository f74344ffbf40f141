"""Tools: memoized results, speculative calls, and the guard that decides which calls run.

>>> import agentrt
>>> @agentrt.tool(reads=["db/users/{user_id}"], writes=())
... def get_user(user_id: int) -> dict:
...     return {"id": user_id}
>>> get_user(7) == get_user(user_id=7)
True

Policies: docs/policies/tool_memo.md, tool_speculation.md, safety.md. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from agentrt.tools.canonical import NotCanonicalError
from agentrt.tools.memo import Memo
from agentrt.tools.runtime import (
    SpeculationRefusedError,
    ToolRuntime,
    bind_to_runtime,
    current_runtime,
    set_default_runtime,
)
from agentrt.tools.spec import Scope, ToolSpec, current_scope, scope
from agentrt.tools.speculation import Speculator
from agentrt.tools.store import MemoryStore, StoreUnavailableError

__all__ = [
    "Memo",
    "MemoryStore",
    "NotCanonicalError",
    "Scope",
    "SpeculationRefusedError",
    "Speculator",
    "StoreUnavailableError",
    "ToolRuntime",
    "ToolSpec",
    "current_runtime",
    "current_scope",
    "scope",
    "set_default_runtime",
    "tool",
]

F = TypeVar("F", bound=Callable[..., Any])


@overload
def tool(function: F, /) -> F: ...
@overload
def tool(*, runtime: ToolRuntime | None = None, **declarations: Any) -> Callable[[F], F]: ...


def tool(function: Any = None, /, *, runtime: ToolRuntime | None = None, **declarations: Any) -> Any:
    """Declares a tool: what it reads and writes, and how long its results stay true.

    Undeclared is taken at its worst: such a tool may write anything, so it always runs and everything kept is
    forgotten. See :meth:`ToolSpec.of` for the declarations.

    Args:
        function: The tool, where the decorator is used without arguments.
        runtime: The runtime to use; by default the active or process-wide one at the time of the call.
        **declarations: As for :meth:`ToolSpec.of`.
    """
    chosen = (lambda: runtime) if runtime is not None else current_runtime

    def decorate(target: Callable[..., Any]) -> Callable[..., Any]:
        return bind_to_runtime(ToolSpec.of(target, **declarations), chosen)

    return decorate if function is None else decorate(function)
