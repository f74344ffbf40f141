"""LangGraph and LangChain through agentrt: one line where the model is made, and one where the tools are.

    runs = Runs()
    model = identify(ChatOpenAI(base_url="http://localhost:8000/v1", ...), runs)
    with runs.start() as run:
        graph.invoke(state, {"configurable": {"thread_id": run.name}})

vLLM then learns which run and which node each request is of, and which runs are over. Works for chat models that pass
`extra_body` on, as those of langchain-openai do, and stay chat models: tools bound to them, structured output, streams.

    tools = protect([search, read_page], runtime, {"search": {"reads": ["web"], "writes": ()}})
    graph.add_node("tools", ToolNode(tools))

The latter works for `ToolNode`, `create_agent` and anything else that takes LangChain tools, synchronous and
asynchronous. The function inside each tool is replaced, so LangChain still validates arguments, calls callbacks and
builds messages; a result from the memo or one run ahead looks like any other. A denied call becomes a tool message with
status "error".

Session: `configurable.thread_id`. Agent: the path of graph nodes that leads to the call (`researcher/tools`). Trust
domain: what `domain(config)` says, "default" without it.

Tested with langgraph 1.2.22, langchain-core 1.7; `identify` with langchain-openai 1.7.4, too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from agentrt.frameworks.runs import Runs
from agentrt.safety.guard import DeniedError
from agentrt.tools import Scope, ToolRuntime, ToolSpec, scope

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.runnables import RunnableConfig
    from langchain_core.tools import BaseTool

    Model = TypeVar("Model", bound=BaseChatModel)

__all__ = ["identify", "protect", "refusal", "scope_of"]

# Arguments that LangChain passes besides the model's: they do not change what a tool answers.
_PLUMBING = frozenset({"config", "callbacks", "run_manager"})


def scope_of(config: RunnableConfig | None, domain: Callable[[Any], str] | None = None) -> Scope:
    """Whose call a runnable's config belongs to."""
    config = config or {}
    session, agent = _thread(config), _path(config)
    return Scope(session or "default", agent or "default", domain(config) if domain is not None else "default")


def _thread(config: Mapping[str, Any]) -> str | None:
    configurable, metadata = config.get("configurable") or {}, config.get("metadata") or {}
    thread = configurable.get("thread_id") or metadata.get("thread_id")
    return str(thread) if thread else None


def _path(config: Mapping[str, Any]) -> str:
    metadata = config.get("metadata") or {}
    # "researcher:<id>|tools:<id>": the nodes on the way, without the ids of this run.
    path = str(metadata.get("langgraph_checkpoint_ns") or metadata.get("langgraph_node") or "")
    return "/".join(part.partition(":")[0] for part in path.split("|"))


# What a chat model may do with messages; its arguments are messages, stop words, the manager of its run.
_CALLS = ("_generate", "_agenerate", "_stream", "_astream")


def identify(model: Model, runs: Runs | None = None) -> Model:
    """A copy of a chat model whose requests say whose they are: `configurable.thread_id` and the path of graph nodes.

    Outside of graphs nothing is said, and without a thread id the session is not named; vLLM's side infers what is
    missing. What the model or the caller puts into `extra_body` stays, and wins.

    Args:
        model: A chat model that passes `extra_body` on to the server.
        runs: Whose ends its requests tell; `runs.start(thread_id).end()` ends one, as leaving its `with` block does.

    Raises:
        TypeError: for a model without a field `extra_body`; its server would never hear of it.
    """
    from langchain_core.language_models import BaseChatModel

    kind, told = type(model), runs if runs is not None else Runs()
    if "extra_body" not in kind.model_fields:
        raise TypeError(f"{kind.__name__} has no extra_body, so its requests cannot say whose they are; use ChatOpenAI")

    def through(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(kind, name))
        def call(self: Any, messages: Any, stop: Any = None, run_manager: Any = None, **options: Any) -> Any:
            own, asked = getattr(self, "extra_body", None) or {}, options.pop("extra_body", None) or {}
            names = _says(told, run_manager)
            for body in (own, asked):
                names.update(body.get("vllm_xargs") or {})
            if body := {**own, **asked, **({"vllm_xargs": names} if names else {})}:
                options["extra_body"] = body
            if run_manager is not None:
                options["run_manager"] = run_manager
            return getattr(super(identified, self), name)(messages, stop=stop, **options)

        return call

    # Only what the model does itself: what it inherits comes back here.
    calls = {name: through(name) for name in _CALLS if getattr(kind, name) is not getattr(BaseChatModel, name)}
    identified = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__, **calls})
    copied: Model = model.model_copy()
    object.__setattr__(copied, "__class__", identified)
    return copied


def _says(runs: Runs, run_manager: Any) -> dict[str, Any]:
    """What the request of a model that runs now says of itself."""
    from langchain_core.runnables.config import var_child_runnable_config

    config: dict[str, Any] = dict(var_child_runnable_config.get() or {})
    # Streams have no manager, and a model that is called in a thread of its own no config.
    config["metadata"] = {**(config.get("metadata") or {}), **(getattr(run_manager, "metadata", None) or {})}
    session, agent = _thread(config), _path(config)
    names = runs.start(session).extra_body(agent)["vllm_xargs"] if session else {"agent_id": agent}
    return {name: said for name, said in names.items() if said}


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
