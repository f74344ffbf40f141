"""LangGraph end to end, offline: same answers, fewer executions, refusals as tool messages."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("langgraph", reason="langgraph is not installed: pip install langgraph langchain-core")

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tools import BaseTool, StructuredTool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

from agentrt.frameworks.langgraph import identify, protect, scope_of
from agentrt.frameworks.runs import Runs
from agentrt.tools import Memo, MemoryStore, ToolRuntime, current_scope, tool

# Third-party modules warn about their own future.
pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLE = Path(__file__).parents[2] / "examples" / "langgraph_tools.py"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("langgraph_tools_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_answers_are_identical_with_fewer_executions(example: ModuleType, tmp_path: Path) -> None:
    questions = example.make_questions(20)
    plain = example.run(questions, None, 0.004, 0.004)
    with example.make_runtime(tmp_path / "policy.toml") as runtime:
        ours = example.run(questions, runtime, 0.004, 0.004)
        assert ours.answers == plain.answers
        repeats = len(questions) - len(set(questions))
        assert ours.ran["search"] == len(set(questions))
        assert ours.ran["write_note"] == plain.ran["write_note"] == len(questions)
        assert runtime.memo.stats.hits == 2 * repeats


def test_a_denied_call_is_a_tool_message_and_the_run_goes_on(example: ModuleType, tmp_path: Path) -> None:
    with example.make_runtime(tmp_path / "policy.toml") as runtime:
        outcome = example.run(["q1!"], runtime, 0.0, 0.0)
    assert "send_mail" not in outcome.ran
    assert "send_mail:error:send_mail denied: mail" in outcome.answers[0]
    assert "write_note:success:noted" in outcome.answers[0]
    # Without the guard the page has its way.
    assert example.run(["q1!"], None, 0.0, 0.0).ran["send_mail"] == 1


def test_calls_carry_thread_node_and_domain(example: ModuleType) -> None:
    seen: list[tuple[str, str, str]] = []

    @tool(reads=(), writes=())
    def where(x: int) -> str:
        """Where am I."""
        here = current_scope()
        seen.append((here.session, here.agent, here.domain))
        return "here"

    runtime = ToolRuntime(memo=Memo(MemoryStore()))
    tools = protect([where], runtime, domain=lambda config: str(config["configurable"]["tenant"]))
    graph = StateGraph(MessagesState)
    graph.add_node("helpers", ToolNode(tools))
    graph.add_edge(START, "helpers")
    graph.add_edge("helpers", END)
    call = AIMessage(content="", tool_calls=[{"name": "where", "args": {"x": 1}, "id": "1", "type": "tool_call"}])
    compiled = graph.compile()
    for tenant in ("red", "blue", "red"):
        config: Any = {"configurable": {"thread_id": "t1", "tenant": tenant}}
        compiled.invoke({"messages": [HumanMessage("q"), call]}, config)
    assert seen == [("t1", "helpers", "red"), ("t1", "helpers", "blue")]


def test_subgraphs_name_the_agent_without_run_ids() -> None:
    metadata = {"langgraph_checkpoint_ns": "researcher:8f1c|tools:77aa", "thread_id": "t"}
    found = scope_of({"metadata": metadata})
    assert (found.session, found.agent) == ("t", "researcher/tools")
    assert scope_of(None).session == "default"


def test_asynchronous_tools_pass_through_too() -> None:
    ran: list[str] = []

    async def look(key: str) -> str:
        """Look."""
        ran.append(key)
        await asyncio.sleep(0.001)
        return key.upper()

    runtime = ToolRuntime(memo=Memo(MemoryStore(), verify_rate=0.0))
    native = StructuredTool.from_function(coroutine=look, name="look", description="Look.")
    (protected,) = protect([native], runtime, {"look": {"reads": (), "writes": ()}})
    graph = StateGraph(MessagesState)
    graph.add_node("tools", ToolNode([protected]))
    graph.add_edge(START, "tools")
    calls = [{"name": "look", "args": {"key": k}, "id": f"{n}", "type": "tool_call"} for n, k in enumerate("aab")]
    message = AIMessage(content="", tool_calls=calls)
    state = asyncio.run(graph.compile().ainvoke({"messages": [message]}))
    assert [m.content for m in state["messages"] if isinstance(m, ToolMessage)] == ["A", "A", "B"]
    assert sorted(ran) == ["a", "b"]


def test_what_would_slip_past_is_refused() -> None:
    class Custom(BaseTool):  # type: ignore[misc]
        name: str = "custom"
        description: str = "no function inside"

        def _run(self, x: int) -> int:
            return x

    runtime = ToolRuntime()
    with pytest.raises(TypeError, match="custom"):
        protect([Custom()], runtime)
    with pytest.raises(ValueError, match="not among the tools: nothing"):
        protect([], runtime, {"nothing": {}})


Sent = list[dict[str, Any] | None]


class Model(BaseChatModel):  # type: ignore[misc]
    """Remembers what its requests say besides."""

    extra_body: dict[str, Any] | None = None
    sent: Any = None
    _llm_type = "scripted"

    def _generate(
        self, messages: Any, stop: Any = None, run_manager: Any = None, *, extra_body: Any = None, **_: Any
    ) -> ChatResult:
        self.sent.append(extra_body)
        return ChatResult(generations=[ChatGeneration(message=AIMessage("yes"))])


class Streaming(Model):
    def _stream(
        self, messages: Any, stop: Any = None, run_manager: Any = None, *, extra_body: Any = None, **_: Any
    ) -> Iterator[ChatGenerationChunk]:
        self.sent.append(extra_body)
        yield ChatGenerationChunk(message=AIMessageChunk("yes"))

    async def _agenerate(
        self, messages: Any, stop: Any = None, run_manager: Any = None, *, extra_body: Any = None, **more: Any
    ) -> ChatResult:
        return self._generate(messages, stop, run_manager, extra_body=extra_body, **more)


def team(model: Any, asynchronous: bool = False) -> Any:
    """A planner, and a team of one as a graph of its own."""

    def speak(state: Any) -> Any:
        return {"messages": [model.invoke(state["messages"])]}

    async def speak_async(state: Any) -> Any:
        return {"messages": [await model.ainvoke(state["messages"])]}

    def chain(*nodes: tuple[str, Any]) -> Any:
        graph = StateGraph(MessagesState)
        last = START
        for name, node in nodes:
            graph.add_node(name, node)
            graph.add_edge(last, name)
            last = name
        graph.add_edge(last, END)
        return graph.compile()

    node = speak_async if asynchronous else speak
    return chain(("planner", node), ("helpers", chain(("coder", node))))


ASK: Any = {"messages": [HumanMessage("q")]}


def thread(name: str) -> Any:
    return {"configurable": {"thread_id": name}}


@pytest.mark.parametrize("kind", [Model, Streaming])
@pytest.mark.parametrize("how", ["invoke", "ainvoke", "stream", "astream"])
def test_requests_say_which_thread_and_node_they_are_of_and_what_is_over(kind: type[Model], how: str) -> None:
    runs, sent = Runs(), Sent()
    graph = team(identify(kind(sent=sent), runs), how.startswith("a"))

    async def drain(name: str) -> None:
        if how == "ainvoke":
            await graph.ainvoke(ASK, thread(name))
        else:
            async for _ in graph.astream(ASK, thread(name), stream_mode="messages"):
                pass

    for name in ("one", "two"):
        with runs.start(name) as run:
            if how == "invoke":
                graph.invoke(ASK, thread(run.name))
            elif how == "stream":
                list(graph.stream(ASK, thread(run.name), stream_mode="messages"))
            else:
                asyncio.run(drain(run.name))
    planner, coder = {"agent_id": "planner"}, {"agent_id": "helpers/coder"}
    assert sent == [
        {"vllm_xargs": {"session_id": "one", **planner}},
        {"vllm_xargs": {"session_id": "one", **coder}},
        {"vllm_xargs": {"session_id": "two", **planner, "ended_sessions": ["one"]}},
        {"vllm_xargs": {"session_id": "two", **coder}},
    ]


def test_what_is_not_known_is_not_said() -> None:
    sent = Sent()
    model = identify(Model(sent=sent))
    team(model).invoke(ASK)
    model.invoke("outside of any graph")
    assert sent == [{"vllm_xargs": {"agent_id": "planner"}}, {"vllm_xargs": {"agent_id": "helpers/coder"}}, None]


def test_what_the_model_and_the_caller_say_stays() -> None:
    sent = Sent()
    plain = Model(sent=sent, extra_body={"top_k": 5, "vllm_xargs": {"tenant": "red"}})
    model = identify(plain)
    team(model).invoke(ASK, thread("t"))
    assert sent[0] == {"top_k": 5, "vllm_xargs": {"session_id": "t", "agent_id": "planner", "tenant": "red"}}
    team(model.bind(extra_body={"vllm_xargs": {"agent_id": "mine"}})).invoke(ASK, thread("t"))
    assert sent[2] == {"top_k": 5, "vllm_xargs": {"session_id": "t", "agent_id": "mine", "tenant": "red"}}
    assert isinstance(model, Model)
    assert type(plain) is Model
    team(plain).invoke(ASK, thread("t"))
    assert sent[-1] is None, "the model itself is as it was"


def test_a_model_that_cannot_say_it_is_refused() -> None:
    class Silent(BaseChatModel):  # type: ignore[misc]
        _llm_type = "silent"

        def _generate(self, *_: Any, **__: Any) -> ChatResult:
            return ChatResult(generations=[])

    with pytest.raises(TypeError, match="Silent has no extra_body"):
        identify(Silent())
