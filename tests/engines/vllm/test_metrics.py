"""What is counted reaches vLLM's metrics, each thing once, and a fault on the way costs nobody anything."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests.engines.vllm.pool import BLOCK, Call, Engine

pytestmark = pytest.mark.usefixtures("vllm")


def used() -> Engine:
    """A pool of 16 blocks after four calls that do not fit into it together."""
    made = Engine(16)
    for n in range(4):
        made.call(Call(f"s{n}", "a", [0, 1, *range(10 * n + 10, 10 * n + 18)], []))
    return made


def report(made: Engine) -> dict[str, float] | None:
    assert made.connector is not None
    found = made.connector.get_kv_connector_stats()
    return None if found is None else dict(found.data)


def test_a_report_tells_what_came_since_the_last_one() -> None:
    made = used()
    first = report(made)
    assert first is not None
    assert first["agentrt_calls"] == 4
    assert first["agentrt_blocks_ranked"] > 0
    assert first["agentrt_prompt_tokens"] == 4 * (10 * BLOCK + 1)
    assert first.get("agentrt_hit_tokens", 0) == made.hit_blocks * BLOCK
    assert report(made) is None
    made.call(Call("s0", "a", [0, 1, 10], []))
    assert (report(made) or {})["agentrt_calls"] == 1


def test_while_calls_are_in_flight_a_report_comes_once_a_second() -> None:
    made = used()
    assert made.connector is not None
    assert report(made)
    request = made.request(Call("s0", "a", [0, 1, 10], []))
    assert made.admit(request)
    assert report(made) is None
    made.connector._next_look = 0.0
    made.step({})
    assert report(made)


def test_faults_are_counted_by_kind_and_one_in_the_report_itself_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    made = used()
    assert made.connector is not None
    report(made)
    made.connector.guard.note("finished: KeyError")
    assert (report(made) or {})["agentrt_faults:finished: KeyError"] == 1

    def boom(*_: object) -> Any:
        raise RuntimeError("injected")

    monkeypatch.setattr("agentrt.engines.vllm.metrics.totals", boom)
    assert report(made) is None
    assert made.connector.guard.faults["metrics: RuntimeError"] == 1


def test_reports_add_up_on_the_page_by_engine() -> None:
    from prometheus_client import CollectorRegistry, Counter

    from agentrt.engines.vllm.connector import AgentRTConnector

    registry = CollectorRegistry()
    made = used()
    engines: dict[int, list[object]] = {0: ["m", "0"], 1: ["m", "1"]}
    page = AgentRTConnector.build_prom_metrics(
        SimpleNamespace(kv_transfer_config=None),
        {kind: lambda *a, **k: Counter(*a, **k, registry=registry) for kind in _kinds()},
        ["model_name", "engine"],
        engines,
    )
    data = report(made)
    assert data is not None
    data |= {"agentrt_faults:bind: KeyError": 2, "of a later version": 1}
    sent = AgentRTConnector.build_kv_connector_stats(data)
    page.observe(sent.data, 1)
    page.observe(sent.data, 1)
    labels = {"model_name": "m", "engine": "1"}
    assert registry.get_sample_value("agentrt_calls_total", labels) == 8
    assert registry.get_sample_value("agentrt_faults_total", {**labels, "kind": "bind: KeyError"}) == 4
    assert registry.get_sample_value("agentrt_calls_total", {**labels, "engine": "0"}) == 0


def _kinds() -> list[Any]:
    from prometheus_client import Counter, Gauge, Histogram

    return [Counter, Gauge, Histogram]


def test_reports_of_an_interval_are_one_line_of_the_log() -> None:
    from agentrt.engines.vllm.metrics import AgentRTStats

    first = AgentRTStats(data={"agentrt_calls": 2, "agentrt_prompt_tokens": 100, "agentrt_hit_tokens": 25})
    second = AgentRTStats(data={"agentrt_calls": 1, "agentrt_prompt_tokens": 100, "agentrt_faults:x": 1})
    total = first.aggregate(second)
    assert total.reduce() == {"agentrt calls": 3, "agentrt prefix hits %": 12.5, "agentrt faults": 1}
    assert not total.is_empty()
    total.reset()
    assert total.is_empty()


def test_a_worker_reports_nothing() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from agentrt.engines.vllm.connector import AgentRTConnector

    transfer = SimpleNamespace(kv_connector_extra_config={}, is_kv_producer=True, is_kv_consumer=False)
    worker = AgentRTConnector(SimpleNamespace(kv_transfer_config=transfer), KVConnectorRole.WORKER, None)
    assert worker.get_kv_connector_stats() is None
