"""Zero stale answers over more than 10^5 interleavings, and every rule is needed: without it the checker finds one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from tests.tools.model import Stale, World, call_of, explore_all, explore_random, reader, writer

from agentrt.tools.memo import Frame
from agentrt.tools.resources import Resource
from agentrt.tools.spec import Call
from agentrt.tools.sqlite_store import SqliteStore
from agentrt.tools.store import Entry, MemoryStore

RANDOM_INTERLEAVINGS = 80_000


@pytest.mark.timeout(120)
def test_no_stale_answer_in_random_interleavings() -> None:
    distinct, answers, reused = explore_random(seed=1, interleavings=RANDOM_INTERLEAVINGS)
    # The exploration is only worth something if schedules differ and answers are really reused.
    assert distinct > 0.9 * RANDOM_INTERLEAVINGS
    assert answers > RANDOM_INTERLEAVINGS
    assert reused > RANDOM_INTERLEAVINGS / 10


@pytest.mark.timeout(120)
def test_no_stale_answer_in_every_interleaving_of_small_programs() -> None:
    programs = [
        lambda w: [reader(w, "a/x", "red", "ok"), writer(w, "a/x", "red", "ok"), reader(w, "a/x", "red", "ok")],
        lambda w: [reader(w, "a", "red", "ok"), writer(w, "a/x", "red", "ok"), reader(w, "a", "red", "ok")],
        lambda w: [reader(w, "b", "red", "fail"), writer(w, "b", "blue", "late"), reader(w, "b", "red", "ok")],
        lambda w: [reader(w, "b", "red", "ok", nested=True), writer(w, "*", "red", "ok"), reader(w, "b", "red", "ok")],
    ]
    counts = [explore_all(program, limit=12_000) for program in programs]
    assert sum(counts) + RANDOM_INTERLEAVINGS >= 100_000, counts


def test_the_sqlite_store_follows_the_same_rules(tmp_path) -> None:  # type: ignore[no-untyped-def]
    made: list[SqliteStore] = []

    def make_world() -> World:
        def make_store(clock: Callable[[], float]) -> SqliteStore:
            for store in made:
                store.close()
            made[:] = [SqliteStore(tmp_path / f"{len(list(tmp_path.iterdir()))}.sqlite", clock=clock)]
            return made[0]

        return World(make_store=make_store)

    _, answers, reused = explore_random(seed=2, interleavings=60, make_world=make_world)
    made[0].close()
    assert answers > 60
    assert reused > 5


class KeepsAcrossWrites(MemoryStore):
    """Rule 4 off for entries: a look-up does not ask whether anything changed."""

    def lookup(self, key: bytes) -> Entry | None:
        return self._entries.get(key)


class CommitsUnchecked(MemoryStore):
    """Rule 3 off: a result is kept although a write came between, under the epoch of its end."""

    def commit(self, key: bytes, entry: Entry) -> bool:
        entry.epoch = self._now
        return super().commit(key, entry)


class ReadsDuringWrites(MemoryStore):
    """Rule 2 off: writes in flight are ignored."""

    def _write_in_flight(self, reads: Sequence[Resource]) -> bool:
        return False


class JoinsAnything(MemoryStore):
    """Rule 4 off for executions in flight."""

    def unchanged(self, reads: Sequence[Resource], epoch: int) -> bool:
        return True


class AnnouncesAfterwards(MemoryStore):
    """Rule 1 off: a write is stamped when it ends, not when it begins."""

    def begin_write(self, writes: Sequence[Resource]) -> int:
        with self._lock:
            write = next(self._write_ids)
            self._in_flight[write] = ((), None)
            self._held = {**getattr(self, "_held", {}), write: tuple(writes)}
            return write

    def end_write(self, write: int, settle_s: float) -> None:
        with self._lock:
            self._stamp(self._held.pop(write))
        super().end_write(write, settle_s)


@pytest.mark.parametrize(
    "broken", [KeepsAcrossWrites, CommitsUnchecked, ReadsDuringWrites, JoinsAnything, AnnouncesAfterwards]
)
def test_without_a_rule_the_checker_finds_a_stale_answer(broken: type[MemoryStore]) -> None:
    with pytest.raises(Stale):
        explore_random(seed=3, interleavings=5_000, make_world=lambda: World(make_store=lambda c: broken(clock=c)))


def test_without_early_reads_a_joined_outer_call_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Frame, "reading", lambda self, reads: None)
    monkeypatch.setattr(Frame, "absorb", lambda self, reads, labels, keep: self.reads.update(reads))
    with pytest.raises(Stale):
        explore_random(seed=3, interleavings=20_000)


def test_without_settling_time_a_late_effect_is_missed() -> None:
    with pytest.raises(Stale):
        explore_random(seed=3, interleavings=5_000, make_world=lambda: World(settle_s=0.0))


def test_without_the_domain_in_the_key_answers_cross_over() -> None:
    def domainless(kind: str, resource: str, domain: str) -> Call:
        return call_of(kind, resource, "red")

    with pytest.raises(Stale, match="another trust domain"):
        explore_random(seed=3, interleavings=5_000, make_world=lambda: World(make_call=domainless))
