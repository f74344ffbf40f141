"""Model checker of the memo: explores interleavings of sessions against an oracle that always executes.

Sessions are generators; each `yield` is a point where another session may run. A scheduler picks who runs next, from
a seed or exhaustively. The world holds one integer per leaf resource, raised by each write that takes effect, so a
value read tells exactly which state was seen.

**Oracle.** Had the caller executed the tool itself, it would have seen, for each leaf, some version between the one in
force when its call began and the one in force when it returned. Anything below is stale, anything above is invented.
Effects land at a step of their own, between the announcement and the end of the write, or late: after a write was
cancelled or failed, up to `SETTLE` ticks later.

The steps are the real ones: `Memo.begin`, `finish`, `fail`, `begin_write`, `end_write` over a real store.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from agentrt.tools.canonical import decode
from agentrt.tools.memo import Memo
from agentrt.tools.spec import Call, Scope, ToolSpec
from agentrt.tools.store import MemoryStore, Store

SETTLE = 12.0
LEAVES = ("a/x", "a/y", "b")
RESOURCES = ("a/x", "a/y", "b", "a", "*")
DOMAINS = ("red", "blue")
Session = Iterator[Callable[[], bool] | None]


class Stale(AssertionError):
    """A caller was answered with a state that was not in force during its call."""


def _below(resource: str) -> tuple[str, ...]:
    if resource == "*":
        return LEAVES
    return tuple(leaf for leaf in LEAVES if leaf == resource or leaf.startswith(resource + "/"))


def read_tool(resource: str) -> list[int]:
    raise AssertionError("the model executes for itself")


def outer_tool(resource: str) -> list[int]:
    raise AssertionError("the model executes for itself")


def write_tool(resource: str) -> None:
    raise AssertionError("the model executes for itself")


_READ = {r: ToolSpec.of(read_tool, reads=[r], writes=()) for r in RESOURCES}
_OUTER = ToolSpec.of(outer_tool, reads=(), writes=())
_WRITE = {r: ToolSpec.of(write_tool, reads=(), writes=[r]) for r in RESOURCES}
_CALLS: dict[tuple[str, str, str], Call] = {}


def call_of(kind: str, resource: str, domain: str) -> Call:
    key = (kind, resource, domain)
    if key not in _CALLS:
        spec = _OUTER if kind == "outer" else (_READ if kind == "read" else _WRITE)[resource]
        _CALLS[key] = spec.bind((resource,), {}, Scope(domain=domain))
    return _CALLS[key]


@dataclass
class World:
    """State, time and the memo under test."""

    make_store: Callable[[Callable[[], float]], Store] = lambda clock: MemoryStore(clock=clock)
    settle_s: float = SETTLE
    make_call: Callable[[str, str, str], Call] = call_of
    versions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LEAVES, 0))
    tick: float = 0.0
    late: list[tuple[float, str]] = field(default_factory=list)
    answers: int = 0
    reused: int = 0

    def __post_init__(self) -> None:
        self.memo = Memo(self.make_store(lambda: self.tick), verify_rate=0.0, settle_s=self.settle_s)

    def apply(self, resource: str) -> None:
        for leaf in _below(resource):
            self.versions[leaf] += 1

    def check(self, low: list[int], value: list[object], resource: str, domain: str) -> None:
        self.answers += 1
        if value[0] != domain:
            raise Stale(f"answer of another trust domain: {value[0]} to {domain}")
        high = [self.versions[leaf] for leaf in _below(resource)]
        for leaf, lowest, seen, highest in zip(_below(resource), low, value[1:], high, strict=True):
            if not (isinstance(seen, int) and lowest <= seen <= highest):
                raise Stale(f"{leaf}: version {seen} answered, in force were {lowest}..{highest}")


def reader(world: World, resource: str, domain: str, fate: str, nested: bool = False) -> Session:
    """One read; `fate` is what happens if this caller executes: ok, fail or cancel."""
    memo = world.memo
    call = world.make_call("outer" if nested else "read", resource, domain)
    yield None
    low = [world.versions[leaf] for leaf in _below(resource)]
    attempts = 0
    while True:
        entry, flight, leads = memo.begin(call, may_follow=attempts < 2)
        if flight is not None and not leads:
            attempts += 1
            yield functools.partial(getattr, flight, "done")
            entry = flight.outcome
            if entry is None:
                continue
        if entry is not None:
            world.reused += 1
            world.check(low, decode(entry.data), resource, domain)
            return
        break
    assert flight is not None
    value: list[object] = [domain]
    if nested:
        inner, inner_flight, inner_leads = memo.begin(world.make_call("read", resource, domain), may_follow=False)
        if inner is not None:
            flight.frame.absorb(inner.reads, inner.labels, True)
            value = decode(inner.data)
        else:
            assert inner_flight is not None
            assert inner_leads
            flight.frame.reading(inner_flight.frame.reads)
            yield from _execute(world, resource, value)
            memo.finish(inner_flight, value, 1.0)
            flight.frame.absorb(inner_flight.frame.reads, set(), inner_flight.epoch is not None)
    else:
        yield from _execute(world, resource, value)
    yield None
    if fate == "ok":
        memo.finish(flight, value, 1.0)
        world.check(low, value, resource, domain)
    elif fate == "fail":
        memo.fail(flight, ValueError("tool failed"), 1.0)
    else:
        memo.fail(flight, KeyboardInterrupt(), 1.0)


def _execute(world: World, resource: str, value: list[object]) -> Session:
    for leaf in _below(resource):
        yield None
        value.append(world.versions[leaf])


def writer(world: World, resource: str, domain: str, fate: str) -> Session:
    """One write; `fate`: ok, fail (took effect), lost (cancelled, none), late (cancelled, takes effect afterwards)."""
    yield None
    write = world.memo.begin_write(world.make_call("write", resource, domain))
    yield None
    if fate in ("ok", "fail"):
        world.apply(resource)
        yield None
    if fate == "late":
        world.late.append((world.tick + SETTLE - 1, resource))
    world.memo.end_write(write, fate == "ok")


def landing(world: World) -> Session:
    """Late effects, each at a time of its own before its settling time is over."""
    while True:
        yield lambda: bool(world.late)
        _, resource = world.late.pop(0)
        world.apply(resource)


def run(world: World, sessions: list[Session], choose: Callable[[int], int]) -> list[int]:
    """Runs the sessions to their end under a scheduler; returns the choices made."""
    waiting: list[tuple[Session, Callable[[], bool] | None]] = [(s, None) for s in sessions]
    background = (landing(world), None)
    late: tuple[Session, Callable[[], bool] | None] = (background[0], next(background[0]))
    trace: list[int] = []
    while waiting:
        world.tick += 1.0
        overdue = bool(world.late) and world.late[0][0] <= world.tick
        ready = [i for i, (_, condition) in enumerate(waiting) if condition is None or condition()]
        options = ready + ([-1] if world.late else [])
        if not options:
            raise AssertionError("deadlock: every session waits")
        picked = len(options) - 1 if overdue else choose(len(options))
        trace.append(picked)
        index = options[picked]
        if index == -1:
            late = (late[0], next(late[0]))
            continue
        session, _ = waiting[index]
        try:
            waiting[index] = (session, next(session))
        except StopIteration:
            del waiting[index]
    return trace


def random_sessions(world: World, rng: random.Random) -> list[Session]:
    """Two to four sessions of one to three operations each, biased to meet on the same resources."""
    focus = rng.choice(RESOURCES[:4])

    def session() -> Session:
        domain = "red" if rng.random() < 0.85 else "blue"
        operations: list[Session] = []
        for _ in range(rng.randint(1, 3)):
            resource = focus if rng.random() < 0.6 else rng.choice(RESOURCES)
            if rng.random() < 0.6:
                fate = rng.choices(("ok", "fail", "cancel"), (6, 1, 1))[0]
                operations.append(reader(world, resource, domain, fate, nested=rng.random() < 0.15))
            else:
                fate = rng.choices(("ok", "fail", "lost", "late"), (5, 1, 1, 2))[0]
                operations.append(writer(world, resource, domain, fate))

        def in_order() -> Session:
            for operation in operations:
                yield from operation

        return in_order()

    return [session() for _ in range(rng.randint(2, 4))]


def _pick(schedule: random.Random, options: int) -> int:
    return int(schedule.random() * options)


def explore_random(seed: int, interleavings: int, make_world: Callable[[], World] = World) -> tuple[int, int, int]:
    """Runs seeded interleavings; returns (distinct schedules, answers checked, answers reused)."""
    distinct: set[tuple[object, ...]] = set()
    answers = reused = 0
    for n in range(interleavings):
        program = random.Random(f"{seed}:{n // 4}")
        schedule = random.Random(f"{seed}:{n}:schedule")
        world = make_world()
        try:
            trace = run(world, random_sessions(world, program), functools.partial(_pick, schedule))
        except AssertionError as error:
            raise type(error)(f"{error} (seed {seed}, interleaving {n})") from error
        distinct.add((n // 4, *trace))
        answers += world.answers
        reused += world.reused
    return len(distinct), answers, reused


class _Path:
    """One path through the tree of choices, and how many there were at each step."""

    def __init__(self) -> None:
        self.choices: list[int] = []
        self.widths: list[int] = []

    def choose(self, width: int) -> int:
        self.widths.append(width)
        if len(self.widths) > len(self.choices):
            self.choices.append(0)
        return self.choices[len(self.widths) - 1]

    def advance(self) -> bool:
        """Moves to the next path; False after the last."""
        del self.choices[len(self.widths) :]
        while self.choices and self.choices[-1] + 1 >= self.widths[len(self.choices) - 1]:
            self.choices.pop()
        self.widths = []
        if self.choices:
            self.choices[-1] += 1
        return bool(self.choices)


def explore_all(
    make_sessions: Callable[[World], list[Session]], limit: int, make_world: Callable[[], World] = World
) -> int:
    """Runs every interleaving of a small program (up to `limit`); returns how many there were."""
    path = _Path()
    for count in range(1, limit + 1):
        world = make_world()
        run(world, make_sessions(world), path.choose)
        if not path.advance():
            return count
    return limit
