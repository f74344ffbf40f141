"""LangGraph and LangChain tools through agentrt: one line where the tools are made.

    tools = protect([search, read_page], runtime, {"search": {"reads": ["web"], "writes": ()}})
    graph.add_node("tools", ToolNode(tools))

Works for `ToolNode`, `create_agent` and anything else that takes LangChain tools, synchronous and asynchronous. The
function inside each tool is replaced, so LangChain still validates arguments, calls callbacks and builds messages; a
result from the memo or one run ahead looks like any other. A denied call becomes a tool message with status "error".

Session: `configurable.thread_id`. Agent: the path of graph nodes that leads to the call (`researcher/tools`). Trust
domain: what `domain(config)` says, "default" without it.

Tested with langgraph 1.2.22, langchain-core 1.7.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agentrt.safety.guard import DeniedError
from agentrt.tools import Scope, ToolRuntime, ToolSpec, scope

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig
    from langchain_core.tools import BaseTool

__all__ = ["protect", "refusal", "scope_of"]

# Arguments that LangChain passes besides the model's: they do not change what a tool answers.
_PLUMBING = frozenset({"config", "callbacks", "run_manager"})


def scope_of(config: RunnableConfig | None, domain: Callable[[Any], str] | None = None) -> Scope:
    """Whose call a runnable's config belongs to."""
    config = config or {}
    configurable = config.get("configurable") or {}
    metadata = config.get("metadata") or {}
    session = configurable.get("thread_id") or metadata.get("thread_id") or "default"
    # "researcher:<id>|tools:<id>": the nodes on the way, without the ids of this run.
    path = str(metadata.get("langgraph_checkpoint_ns") or metadata.get("langgraph_node") or "default")
    agent = "/".join(part.partition(":")[0] for part in path.split("|"))
    return Scope(str(session), agent, domain(config) if domain is not None else "default")


def refusal(denied: DeniedError) -> Exception:
    """A denied call as LangChain's kind of tool failure."""
    from langchain_core.tools import ToolException

    failure: Exception = ToolException(str(denied))
    return failure


def protect(
    tools: Sequence[BaseTool | Callable[..., Any]],
    runtime: ToolRuntime,
    declarations: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    domain: Callable[[Any], str] | None = None,
) -> list[BaseTool]:
    """Copies of LangChain tools whose calls pass through `runtime`.

    Args:
        tools: Tools, or functions to be made into tools.
        runtime: Memo, speculation and safety.
        declarations: Per tool name what :meth:`agentrt.tools.ToolSpec.of` takes: reads, writes and so on. A function
            that was made with :func:`agentrt.tool` brings its own. Undeclared tools always run.
        domain: The trust domain of a call, from its config (a tenant id the application put there).

    Raises:
        TypeError: for a tool that is not built on a function; it would slip past.
        ValueError: for a declaration of a tool that is not there.
    """
    from langchain_core.tools import BaseTool, StructuredTool, Tool
    from langchain_core.tools import tool as make_tool

    remaining = dict(declarations or {})
    protected: list[BaseTool] = []
    for given in tools:
        native = given if isinstance(given, BaseTool) else make_tool(given)
        if not isinstance(native, (StructuredTool, Tool)):
            raise TypeError(f"not built on a function, so its calls cannot pass through agentrt: {native.name}")
        declared = remaining.pop(native.name, {})
        changes: dict[str, Any] = {}
        for field in ("func", "coroutine"):
            function = getattr(native, field)
            if function is not None:
                changes[field] = _through(function, native.name, runtime, declared, domain)
        if not native.handle_tool_error:
            # A refusal is an answer to the model, not the end of the run.
            changes["handle_tool_error"] = True
        protected.append(native.model_copy(update=changes))
    if remaining:
        raise ValueError(f"declared, but not among the tools: {min(remaining)}")
    return protected


def _through(
    function: Callable[..., Any],
    name: str,
    runtime: ToolRuntime,
    declared: Mapping[str, Any],
    domain: Callable[[Any], str] | None,
) -> Callable[..., Any]:
    spec: ToolSpec | None = getattr(function, "spec", None)
    if not isinstance(spec, ToolSpec) or declared:
        plumbing = _PLUMBING & inspect.signature(function).parameters.keys()
        options: dict[str, Any] = {"name": name, **declared}
        options["ignore"] = frozenset(options.get("ignore", ())) | plumbing
        spec = ToolSpec.of(spec.function if isinstance(spec, ToolSpec) else function, **options)
    if runtime.guard is not None:
        runtime.guard.register(spec)
    chosen = spec

    def here() -> Scope:
        from langchain_core.runnables.config import var_child_runnable_config

        return scope_of(var_child_runnable_config.get(), domain)

    wrapper: Callable[..., Any]
    if spec.is_async:

        async def call_async(*args: Any, **kwargs: Any) -> Any:
            whose = here()
            with scope(whose.session, whose.agent, whose.domain):
                try:
                    return await runtime.acall(chosen, *args, **kwargs)
                except DeniedError as denied:
                    raise refusal(denied) from denied

        wrapper = call_async
    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            whose = here()
            with scope(whose.session, whose.agent, whose.domain):
                try:
                    return runtime.call(chosen, *args, **kwargs)
                except DeniedError as denied:
                    raise refusal(denied) from denied

        wrapper = call
    # LangChain reads the signature (for injected arguments) through the wrapper.
    return functools.update_wrapper(wrapper, function)
