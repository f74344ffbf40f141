"""``agentrt explain`` end to end: files in, tables, JSON and one page out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.support import Run

from agentrt import replay
from agentrt.errors import BadOptionError
from agentrt.replay.explanation import explain


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl.gz"
    replay.Trace.generate("selector_chat", sessions=20, seed=1).write(path)
    return path


def test_the_terminal_names_agents_successors_regret_and_calibration(agentrt_cli: Run, chat: Path) -> None:
    done = agentrt_cli("explain", chat, "--sessions", "8", "--capacity", "15%")
    assert done.returncode == 0, done.stderr
    for word in ("selector_chat", "planner", "documenter", "architect ", "evicted", "never", "too long", "ECE", "R ="):
        assert word in done.stdout, word


def test_json_holds_what_the_api_tells(agentrt_cli: Run, chat: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = agentrt_cli("explain", chat, "--sessions", "8", "--capacity", "15%", "--seed", "3", "--json", out)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    told = explain(chat, sessions=8, capacity="15%", seed=3)
    assert written == {"version": 1, "workloads": [told.raw]}
    assert told.capacity == "15%"
    assert sum(agent.calls for agent in told.agents) == told.calls
    assert [edge.learned for edge in told.likely_next("planner")] == sorted(
        (edge.learned for edge in told.likely_next("planner")), reverse=True
    )


def test_hit_rates_are_those_of_a_replay(chat: Path) -> None:
    told = explain(chat, sessions=8, capacity="15%")
    done = replay.run([chat], policies=["agentrt", "lru", "min"], capacities=["15%"], sessions=8)
    rates = {result.policy: result.hit_rate for result in done.results}
    assert rates == {"agentrt": told.hit_rate.agentrt, "lru": told.hit_rate.lru, "min": told.hit_rate.min}


def test_the_page_is_one_file_that_loads_nothing_and_draws_every_picture(
    agentrt_cli: Run, chat: Path, tiny_trace: Path, tmp_path: Path
) -> None:
    page = tmp_path / "explained.html"
    done = agentrt_cli("explain", chat, tiny_trace, "--sessions", "4", "--html", page)
    assert done.returncode == 0, done.stderr
    html = page.read_text()
    markup = re.sub(r"<script[^>]*>.*?</script>", "<script></script>", html, flags=re.DOTALL)
    assert not re.search(r"""<(script|link|img)[^>]*\b(src|href)\s*=|@import|url\(""", markup)
    specs = json.loads(html[html.rindex("const specs = ") + 14 : html.rindex(";\n  for (const")])
    assert set(re.findall(r'class="chart" id="([^"]+)"', markup)) == set(specs)
    assert len(specs) == 14
    vl_convert = pytest.importorskip("vl_convert")
    for name, spec in specs.items():
        svg = vl_convert.vegalite_to_svg(spec)
        assert svg.startswith("<svg"), name
        if name == "graph-0":
            assert all(f">{agent}</text>" in svg for agent in ("planner", "coder", "documenter"))


def test_one_agent_and_a_pool_that_holds_everything_can_be_explained(agentrt_cli: Run, tmp_path: Path) -> None:
    alone, page = tmp_path / "alone.jsonl", tmp_path / "alone.html"
    replay.Trace.generate("coding_team", sessions=1, agents=2, seed=0).write(alone)
    done = agentrt_cli("explain", alone, "--capacity", "500%", "--html", page)
    assert done.returncode == 0, done.stderr
    assert "nothing was evicted" in done.stdout
    assert "nothing had to be predicted" in page.read_text()


def test_an_impossible_capacity_names_the_option(chat: Path) -> None:
    with pytest.raises(BadOptionError) as error:
        explain(chat, capacity="0%")
    assert error.value.option == "--capacity"
