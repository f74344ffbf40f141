"""A LangGraph agent with and without agentrt around its tools: same answers, fewer executions, less waiting.

Offline: the model is a script that thinks for a moment and then calls search, opens the first hit, notes what it found
and answers. Some questions come up again. Run it: `python examples/langgraph_tools.py`.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import BaseTool, StructuredTool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

from agentrt.frameworks.langgraph import protect
from agentrt.safety import Guard
from agentrt.tools import Memo, MemoryStore, Speculator, ToolRuntime

POLICY = """
version = 1
[tools.search]
privileged = false
adds = ["web"]
[tools.open_page]
privileged = false
adds = ["web"]
[tools.write_note]
accepts = ["web"]
[tools.send_mail]

[[rules]]
id = "read"
effect = "allow"
tools = ["search", "open_page", "write_note"]
[[rules]]
id = "mail"
effect = "allow"
tools = ["send_mail"]
"""

DECLARATIONS: dict[str, dict[str, Any]] = {
    "search": {"reads": ["web"], "writes": ()},
    "open_page": {"reads": ["web"], "writes": ()},
    "write_note": {"reads": (), "writes": ["notes/{title}"]},
    "send_mail": {"reads": (), "writes": ["mail"]},
}


@dataclass
class World:
    """The tools, and how often each really ran."""

    tool_s: float
    ran: dict[str, int] = field(default_factory=dict)

    def _count(self, name: str) -> None:
        self.ran[name] = self.ran.get(name, 0) + 1

    def tools(self) -> list[BaseTool]:
        """LangChain tools, as an application would write them."""

        def search(query: str) -> dict[str, Any]:
            """Search the web."""
            self._count("search")
            time.sleep(self.tool_s)
            return {"hits": [{"url": f"http://x/{query}/{n}"} for n in range(3)]}

        def open_page(url: str) -> str:
            """Open a page."""
            self._count("open_page")
            time.sleep(self.tool_s)
            return f"text of {url}"

        def write_note(title: str, text: str) -> str:
            """Write a note."""
            self._count("write_note")
            return f"noted {title}, {len(text)} characters"

        def send_mail(text: str) -> str:
            """Send a mail."""
            self._count("send_mail")
            return f"sent {len(text)} characters"

        return [StructuredTool.from_function(f) for f in (search, open_page, write_note, send_mail)]


class ScriptedModel(BaseChatModel):
    """Thinks for a moment, then does what the script says."""

    think_s: float

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,  # noqa: ARG002
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> ChatResult:
        time.sleep(self.think_s)
        message = AIMessage(content="", tool_calls=[])
        results = [m for m in messages if isinstance(m, ToolMessage)]
        question = str(messages[0].content)
        steps: list[tuple[str, dict[str, Any]]] = [
            ("search", {"query": question}),
            ("open_page", {"url": f"http://x/{question}/0"}),
            ("write_note", {"title": question, "text": "found"}),
        ]
        if question.endswith("!"):
            steps.append(("send_mail", {"text": "what the page told me to"}))
        if len(results) < len(steps):
            name, arguments = steps[len(results)]
            message.tool_calls = [{"name": name, "args": arguments, "id": f"call-{len(results)}", "type": "tool_call"}]
        else:
            message.content = " | ".join(f"{m.name}:{m.status}:{m.content}" for m in results)
        return ChatResult(generations=[ChatGeneration(message=message)])


@dataclass
class Outcome:
    """What one run of the whole workload gave."""

    answers: list[str]
    seconds: float
    ran: dict[str, int]


def run(questions: Sequence[str], runtime: ToolRuntime | None, think_s: float, tool_s: float) -> Outcome:
    """Answers each question in a thread of its own."""
    world = World(tool_s)
    tools = world.tools()
    if runtime is not None:
        tools = protect(tools, runtime, DECLARATIONS)
    model = ScriptedModel(think_s=think_s)

    def agent(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    def after(state: MessagesState) -> str:
        last = state["messages"][-1]
        return "tools" if isinstance(last, AIMessage) and last.tool_calls else END

    builder = StateGraph(MessagesState)
    builder.add_node("agent", agent)
    builder.add_node("tools", ToolNode(tools))
    builder.add_edge(START, "agent")
    builder.add_conditional_edges("agent", after, ["tools", END])
    builder.add_edge("tools", "agent")
    graph = builder.compile()
    answers = []
    began = time.perf_counter()
    for n, question in enumerate(questions):
        state = graph.invoke({"messages": [HumanMessage(question)]}, {"configurable": {"thread_id": f"thread-{n}"}})
        answers.append(str(state["messages"][-1].content))
    return Outcome(answers, time.perf_counter() - began, world.ran)


def make_questions(count: int, seed: int = 7) -> list[str]:
    """Questions of which about a third come up again."""
    rng = random.Random(seed)  # noqa: S311
    return [f"q{rng.randrange(count * 3 // 2)}" for _ in range(count)]


def make_runtime(policy: Path) -> ToolRuntime:
    """Memo, speculation and safety, all on."""
    policy.write_text(POLICY)
    memo = Memo(MemoryStore(), verify_rate=0.0)
    return ToolRuntime(memo=memo, speculation=Speculator(), guard=Guard(policy))


def main(count: int = 40, think_s: float = 0.03, tool_s: float = 0.03) -> None:
    """Prints both runs."""
    questions = make_questions(count)
    plain = run(questions, None, think_s, tool_s)
    with tempfile.TemporaryDirectory() as folder, make_runtime(Path(folder) / "policy.toml") as runtime:
        ours = run(questions, runtime, think_s, tool_s)
        speculation = runtime.speculator.stats if runtime.speculator else None
    print(f"questions {count}, model {think_s * 1e3:.0f} ms a turn, tools {tool_s * 1e3:.0f} ms")
    print(f"identical answers: {plain.answers == ours.answers}")
    print(f"executions: {sum(plain.ran.values())} -> {sum(ours.ran.values())}  {plain.ran} -> {ours.ran}")
    print(f"reused {runtime.memo.stats.hits}, run ahead and used {speculation.committed if speculation else 0}")
    print(f"seconds: {plain.seconds:.2f} -> {ours.seconds:.2f} ({1 - ours.seconds / plain.seconds:.0%} less)")


if __name__ == "__main__":
    main()
