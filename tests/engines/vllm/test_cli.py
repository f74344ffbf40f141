"""`agentrt serve`, `record` and `doctor`. Needs no vLLM."""

from __future__ import annotations

import json

from click.testing import CliRunner

from agentrt.cli import main


def command(*arguments: str) -> list[str]:
    result = CliRunner().invoke(main, [*arguments, "--show"])
    assert result.exit_code == 0, result.output
    shown: list[str] = json.loads(result.output)
    return shown


def transfer(shown: list[str]) -> dict[str, object]:
    config: dict[str, object] = json.loads(shown[shown.index("--kv-transfer-config") + 1])
    return config


def test_serve_adds_one_flag_and_passes_the_rest_on() -> None:
    shown = command("serve", "some/model", "--max-num-seqs", "8", "--enable-log-requests")
    assert shown[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "some/model"]
    assert shown[5:8] == ["--max-num-seqs", "8", "--enable-log-requests"]
    assert transfer(shown) == {"kv_connector": "AgentRTConnector", "kv_role": "kv_producer"}


def test_serve_takes_scheduling_policies_by_name() -> None:
    config = transfer(command("serve", "m", "--scheduling", "speculation, tool_gap"))
    assert config["kv_connector_extra_config"] == {"scheduling": "speculation,tool_gap"}
    own = transfer(command("serve", "m", "--scheduling", "my.module:Scheduling"))
    assert own["kv_connector_extra_config"] == {"scheduling": "my.module:Scheduling"}
    result = CliRunner().invoke(main, ["serve", "m", "--scheduling", "speculation,weather", "--show"])
    assert result.exit_code == 2
    assert "weather" in result.output
    assert "tool_gap" in result.output


def test_record_observes_and_names_the_trace() -> None:
    config = transfer(command("record", "m", "--to", "t.jsonl", "--max-mb", "2"))["kv_connector_extra_config"]
    assert isinstance(config, dict)
    assert config["policy"] == "observe"
    assert config["record_bytes"] == 2 << 20
    assert str(config["record"]).startswith("/")


def test_a_second_connector_is_refused_with_the_remedy() -> None:
    result = CliRunner().invoke(main, ["serve", "m", "--kv-transfer-config", "{}"])
    assert result.exit_code == 2
    assert "MultiConnector" in result.output


def test_doctor_says_what_is_there_or_how_to_get_it() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["active"] or report["remedy"]
    if report["vllm"] is not None:
        assert all(report["hooks"].values())
    text = CliRunner().invoke(main, ["doctor"]).output
    assert "would activate agentrt" in text
    assert ("speculation" in text) == report["active"]
