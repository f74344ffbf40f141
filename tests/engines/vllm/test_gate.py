"""Order and holds of waiting calls: what is decided happens, within bounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.engines.vllm.scheduler import Server, prompt, transfer

from agentrt.engines.vllm.gate import Gate, Load, Service, Verdict, Waiting

SECOND = 1_000_000


def waiting(call: int, prompt_tokens: int = 320) -> Waiting:
    return Waiting(call, session=call, agent=0, arrived_us=0, prompt_tokens=prompt_tokens, resident_tokens=0)


def load(now_s: float = 0.0, running: int = 1, free: int = 5) -> Load:
    return Load(
        now_us=int(now_s * SECOND), running_calls=running, pool_blocks=100, block_tokens=32, free_blocks=free,
        prompt_blocks=0, hit_blocks=0, step_tokens=0,
    )  # fmt: skip


class Fixed:
    """Gives the verdicts it was told."""

    def __init__(self, verdicts: dict[int, Verdict]) -> None:
        self.verdicts = verdicts
        self.heard: list[tuple[Any, ...]] = []
        self.questions = 0

    def schedule(self, load: Load, waiting: Sequence[Waiting]) -> list[Verdict]:
        self.questions += 1
        return [self.verdicts.get(call.call, Verdict()) for call in waiting]

    def arrived(self, call: Waiting) -> None:
        self.heard.append(("arrived", call.call))

    def admitted(self, call: Waiting, now_us: int) -> None:
        self.heard.append(("admitted", call.call, call.resident_tokens))

    def ended(self, call: int, now_us: int, service: Service) -> None:
        self.heard.append(("ended", call, *service))

    def withdrawn(self, call: int, now_us: int) -> None:
        self.heard.append(("withdrawn", call))


def gate_of(verdicts: dict[int, Verdict], calls: int = 3) -> tuple[Gate, Fixed]:
    fixed = Fixed(verdicts)
    gate = Gate(fixed, budget_us=2 * SECOND)
    for call in range(calls):
        gate.arrived(waiting(call))
    return gate, fixed


def test_a_held_call_waits_until_its_time_and_no_longer() -> None:
    gate, _ = gate_of({0: Verdict(hold_until_us=SECOND)})
    assert not gate.starts(0, 0, 0, load(0.1))
    gate.step_ended()
    assert gate.starts(0, 0, 0, load(1.1))
    assert gate.held == 1


def test_no_hold_outlasts_the_budget() -> None:
    gate, _ = gate_of({0: Verdict(hold_until_us=1 << 62)})
    for tenth in range(10, 30):
        assert not gate.starts(0, 0, 0, load(tenth / 10))
        gate.step_ended()
    assert gate.starts(0, 0, 0, load(3.0))
    assert gate.overruled == 1


def test_nothing_is_held_while_nothing_runs() -> None:
    gate, fixed = gate_of({0: Verdict(hold_until_us=1 << 62)})
    assert gate.starts(0, 0, 0, load(running=0))
    assert fixed.questions == 0


def test_the_lower_rank_goes_first_where_not_all_fit() -> None:
    gate, fixed = gate_of({0: Verdict(2), 1: Verdict(1), 2: Verdict(0)})
    assert [gate.starts(call, 0, 0, load()) for call in (0, 1, 2)] == [False, False, True]
    gate.admitted(2, 0)
    gate.step_ended()
    assert [gate.starts(call, 0, 0, load()) for call in (0, 1)] == [False, True]
    assert fixed.questions == 2


def test_order_changes_nothing_where_all_fit() -> None:
    gate, _ = gate_of({0: Verdict(2), 1: Verdict(1), 2: Verdict(0)})
    assert all(gate.starts(call, 0, 0, load(free=90)) for call in range(3))


def test_a_call_that_vllm_does_not_ask_about_delays_nobody() -> None:
    gate, _ = gate_of({0: Verdict(1), 1: Verdict(0)}, calls=2)
    answers = []
    for _ in range(4):
        answers.append(gate.starts(0, 0, 0, load()))
        gate.step_ended()
    assert answers[0] is False
    assert answers[-1] is True


def test_a_held_call_delays_nobody() -> None:
    gate, _ = gate_of({0: Verdict(1), 1: Verdict(0, hold_until_us=1 << 62)}, calls=2)
    assert gate.starts(0, 0, 0, load())


def test_calls_that_are_not_known_start() -> None:
    gate, _ = gate_of({})
    assert gate.starts(77, 0, 0, load())


def test_what_becomes_of_calls_is_passed_on() -> None:
    gate, fixed = gate_of({})
    assert gate.starts(0, 96, 0, load())
    gate.admitted(0, SECOND)
    gate.ended(0, SECOND, Service(224, 9, 5))
    gate.ended(1, SECOND, Service(0, 0, 0))
    assert fixed.heard[3:] == [("admitted", 0, 96), ("ended", 0, 224, 9, 5), ("withdrawn", 1)]
    assert len(gate) == 1


class ByName:
    """In the engine: what is named `late` waits; of the others the last goes first."""

    until_us: ClassVar[int] = 1 << 62
    fails: ClassVar[bool] = False

    def schedule(self, load: Load, waiting: Sequence[Waiting]) -> list[Verdict]:
        if self.fails:
            raise RuntimeError("injected")
        late = [self.until_us if call.prompt_tokens > 200 else 0 for call in waiting]
        return [Verdict(-i, hold) for i, hold in enumerate(late)]

    def arrived(self, call: Waiting) -> None:
        """Nothing to learn."""

    def admitted(self, call: Waiting, now_us: int) -> None:
        """Nothing to learn."""

    def ended(self, call: int, now_us: int, service: Service) -> None:
        """Nothing to learn."""

    def withdrawn(self, call: int, now_us: int) -> None:
        """Nothing to learn."""


@pytest.mark.usefixtures("vllm")
class TestInTheScheduler:
    """With vLLM's own scheduler."""

    def server(self, folder: Path, **options: Any) -> Server:
        where = f"{__name__}:ByName"
        return Server(folder, 24, transfer("agentrt", scheduling=where, hold_s=5.0), **options)

    def test_a_held_request_is_passed_by_later_ones_and_served(self, tmp_path: Path) -> None:
        server = self.server(tmp_path)
        now = [1_000_000]
        server.connector.adapter.now_us = lambda: now[0]
        server.add("running", prompt(1), 50)
        server.step()
        server.add("late", prompt(*range(10, 18)))
        server.add("early", prompt(30, 31))
        for _ in range(5):
            server.step()
        assert server.order == ["running", "early"]
        # The budget has run out.
        now[0] += 5_100_000
        server.step()
        assert server.order == ["running", "early", "late"]
        server.run()
        server.check()

    def test_it_never_waits_for_a_held_request_with_an_empty_engine(self, tmp_path: Path) -> None:
        server = self.server(tmp_path)
        server.add("late", prompt(*range(10, 18)))
        assert server.run() <= 2
        server.check()

    def test_order_is_as_decided_where_not_all_fit(self, tmp_path: Path) -> None:
        server = self.server(tmp_path, max_num_batched_tokens=160)
        server.add("running", prompt(1), 90)
        server.step()
        for n in range(3):
            server.add(f"r{n}", prompt(*range(10 * n + 2, 10 * n + 6)), 2)
        server.run()
        assert server.order == ["running", "r2", "r1", "r0"]
        server.check()

    def test_a_request_aborted_while_it_is_held_leaves_nothing(self, tmp_path: Path) -> None:
        from vllm.v1.request import RequestStatus

        server = self.server(tmp_path)
        server.add("running", prompt(1), 10)
        server.step()
        server.add("late", prompt(*range(10, 18)))
        server.step()
        server.scheduler.finish_requests("late", RequestStatus.FINISHED_ABORTED)
        server.run()
        assert server.order == ["running"]
        assert len(server.connector.adapter.gate) == 0
        server.check()

    def test_who_fails_to_decide_holds_nobody(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ByName, "fails", True)
        server = self.server(tmp_path)
        monkeypatch.setattr(type(server.connector.adapter.gate.scheduling), "fails", True)
        server.add("running", prompt(1), 10)
        server.step()
        server.add("late", prompt(*range(10, 18)))
        server.step()
        assert server.order == ["running", "late"]
        server.run()
        assert set(server.connector.guard.faults) == {"before_allocation: RuntimeError"}

    @pytest.mark.parametrize("policies", ["batch_shaping", "fairness", "batch_shaping,agent_fairness"])
    def test_the_cores_policies_serve_everything(self, tmp_path: Path, policies: str) -> None:
        flag = transfer("agentrt", scheduling=policies, hold_s=5.0)
        server = Server(tmp_path, 40, flag, max_num_batched_tokens=160, max_num_seqs=4)
        now = [1_000_000]
        server.connector.adapter.now_us = lambda: now[0]
        for n in range(60):
            session = n % 7
            blocks = [session, *(100 * session + i for i in range(2 + n // 7))]
            server.add(f"r{n}", prompt(*blocks), 3, session_id=f"s{session}", agent_id=f"a{n % 3}", tenant=f"t{n % 2}")
            now[0] += 50_000
            server.step()
        for _ in range(2000):
            if not server.scheduler.requests:
                break
            now[0] += 50_000
            server.step()
        assert len(server.order) == 60
        server.check()
