"""`speculation`, tool half: which call comes next, with which arguments, and is it worth running now.

Learned per (trust domain, agent), nothing else crosses over:

* **next tool**: counts of (the last two tools -> next), backing off to the last tool alone;
* **arguments**: for each (last tool, next tool, argument) a small set of *sources* with their record: a constant, an
  argument of a tool's latest call, a field of its latest result, the element after the one used last, and text around
  any of these. The source with the best record speaks;
* **the two together**: how often the whole argument set was right when that tool did come, which makes the
  probability p = P(tool | context) x P(arguments | tool) an honest one.

A call is run ahead iff the tool writes nothing and allows it, p >= `min_probability`, the agent is predictable at all
(R = 1 - H(next | last) / H(next) >= `min_predictability`), the expected saving p x min(think time, tool time) exceeds
the expected waste (1 - p) x tool time x `waste_weight`, and the waste so far is within budget. A result is handed over
only to a call of the same session and domain with the same key (tool, version, every argument), while nothing it read
has changed and it is younger than `max_age_s`. Everything else is cancelled and dropped; nobody sees it.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentrt.tools.canonical import NotCanonicalError, canonical_text
from agentrt.tools.memo import Flight
from agentrt.tools.spec import Call, Scope

__all__ = ["Prediction", "SpeculationStats", "Speculator", "Ticket"]

_HISTORY = 6
# Values looked at, over all earlier results, to explain one argument.
_MAX_LEAVES = 160
_MAX_SOURCES = 12
_MAX_SESSIONS = 1024
_MAX_MODELS = 1024
_MIN_PIECE = 3
_DEBT_FADES = 0.995
_ABSENT = object()

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A call that may come next."""

    tool: str
    arguments: dict[str, Any]
    probability: float


@dataclass(slots=True)
class SpeculationStats:
    """Counters since the speculator was made."""

    launched: int = 0
    committed: int = 0
    mismatched: int = 0
    stale: int = 0
    failed: int = 0
    saved_s: float = 0.0
    wasted_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Past:
    """A call that happened, as later arguments may quote it."""

    tool: str
    arguments: dict[str, Any]
    result: Any


@dataclass(frozen=True, slots=True)
class _Source:
    """Where an argument comes from: `kind` in const, argument, result, successor."""

    kind: str
    tool: str = ""
    """Whose latest call is quoted."""
    path: Path = ()
    value: Any = None
    name: str = ""
    prefix: str = ""
    suffix: str = ""

    def identity(self) -> tuple[Any, ...]:
        return (self.kind, self.tool, self.path, _text(self.value), self.name, self.prefix, self.suffix)

    def evaluate(self, history: Sequence[_Past]) -> Any:
        """The argument this source yields now, or `_ABSENT`."""
        if self.kind == "const":
            return self.value
        past = next((past for past in history if past.tool == self.tool), None)
        if past is None:
            return _ABSENT
        if self.kind == "argument":
            found = past.arguments.get(self.name, _ABSENT)
        elif self.kind == "result":
            found = _at(past.result, self.path)
        else:
            found = _successor(_at(past.result, self.path), history[0].arguments.get(self.name, _ABSENT))
        if found is _ABSENT or not (self.prefix or self.suffix):
            return found
        return f"{self.prefix}{found}{self.suffix}"


def _text(value: Any) -> str | None:
    try:
        return canonical_text(value)
    except NotCanonicalError:
        return None


def _at(value: Any, path: Path) -> Any:
    try:
        for step in path:
            value = value[step]
    except (KeyError, IndexError, TypeError):
        return _ABSENT
    return value


def _successor(items: Any, item: Any) -> Any:
    if type(items) is not list or item is _ABSENT:
        return _ABSENT
    try:
        return items[items.index(item) + 1]
    except (ValueError, IndexError):
        return _ABSENT


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, value) of everything inside, containers included, breadth bounded by the caller."""
    yield path, value
    if type(value) is dict:
        for key, inner in value.items():
            if type(key) is str:
                yield from _leaves(inner, (*path, key))
    elif type(value) is list:
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*path, index))


def _equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if type(a) is str or type(a) is int:
        return bool(a == b)
    text = _text(a)
    return text is not None and text == _text(b)


@dataclass(slots=True)
class _Arguments:
    """Sources of one argument and their record: [right, tried]."""

    sources: dict[tuple[Any, ...], tuple[_Source, list[int]]] = field(default_factory=dict)

    def learn(self, name: str, value: Any, history: Sequence[_Past]) -> None:
        for source, record in self.sources.values():
            record[1] += 1
            if _equal(source.evaluate(history), value):
                record[0] += 1
        if not any(record[0] == record[1] and record[1] >= 4 for _, record in self.sources.values()):
            for source in _explanations(name, value, history):
                identity = source.identity()
                if identity not in self.sources:
                    self.sources[identity] = (source, [1, 1])
        while len(self.sources) > _MAX_SOURCES:
            # Constants that were right once come and go; a source that generalises stays.
            worst = min(self.sources, key=lambda i: _rate(self.sources[i][1], self.sources[i][0]))
            del self.sources[worst]

    def best(self, history: Sequence[_Past]) -> Any:
        for source, _ in sorted(self.sources.values(), key=lambda s: -_rate(s[1], s[0])):
            value = source.evaluate(history)
            if value is not _ABSENT:
                return value
        return _ABSENT


def _rate(record: list[int], source: _Source) -> float:
    # Cautious towards the new, and between equals the source that looks at something over the constant.
    return record[0] / (record[1] + 2) - (0.01 if source.kind == "const" else 0.0) - 0.001 * len(source.path)


def _explanations(name: str, value: Any, history: Sequence[_Past]) -> Iterator[_Source]:
    yield _Source("const", value=value)
    last = history[0].arguments.get(name, _ABSENT)
    seen: set[str] = set()
    looked = 0
    for past in history:
        if past.tool in seen:
            continue
        seen.add(past.tool)
        for other, earlier in past.arguments.items():
            if _equal(earlier, value):
                yield _Source("argument", past.tool, name=other)
            else:
                yield from _around(_Source("argument", past.tool, name=other), earlier, value)
        for path, leaf in _leaves(past.result):
            looked += 1
            if looked > _MAX_LEAVES:
                return
            if _equal(leaf, value):
                yield _Source("result", past.tool, path)
            elif type(leaf) is list:
                if _equal(_successor(leaf, last), value):
                    yield _Source("successor", past.tool, path, name=name)
            else:
                yield from _around(_Source("result", past.tool, path), leaf, value)


def _around(source: _Source, piece: Any, value: Any) -> Iterator[_Source]:
    """`value` as text around `piece`."""
    if type(value) is not str or type(piece) not in (str, int):
        return
    text = str(piece)
    if len(text) < _MIN_PIECE or len(text) >= len(value):
        return
    prefix, found, suffix = value.partition(text)
    if found:
        yield _Source(source.kind, source.tool, source.path, None, source.name, prefix, suffix)


@dataclass(slots=True)
class _Model:
    """What was learned of one agent in one trust domain."""

    single: dict[str, Counter[str]] = field(default_factory=dict)
    pair: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    unigram: Counter[str] = field(default_factory=Counter)
    arguments: dict[tuple[str, str], dict[str, _Arguments]] = field(default_factory=dict)
    whole: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    think_s: float = 0.0
    _predictability: tuple[int, float] = (-1, 0.0)

    def predictability(self) -> float:
        """R = 1 - H(next | last) / H(next), recomputed when the counts have grown by an eighth."""
        n = sum(self.unigram.values())
        if n <= self._predictability[0] * 1.125:
            return self._predictability[1]
        h_next = _entropy(self.unigram)
        rows = [(sum(row.values()), _entropy(row)) for row in self.single.values()]
        total = sum(weight for weight, _ in rows)
        h_given = sum(weight * h for weight, h in rows) / total if total else h_next
        r = max(0.0, 1.0 - h_given / h_next) if h_next > 0 else 1.0
        self._predictability = (n, r)
        return r

    def next_tools(self, history: Sequence[_Past]) -> list[tuple[str, float]]:
        row = self.single.get(history[0].tool)
        if not row:
            return []
        total = sum(row.values())
        base = {tool: n / (total + 1.0) for tool, n in row.items()}
        finer = self.pair.get((history[1].tool, history[0].tool)) if len(history) > 1 else None
        if finer:
            weight = sum(finer.values())
            base = {tool: (finer.get(tool, 0) + 2.0 * p) / (weight + 2.0) for tool, p in base.items()}
        return sorted(base.items(), key=lambda item: -item[1])

    def predict_arguments(self, tool: str, history: Sequence[_Past]) -> dict[str, Any] | None:
        known = self.arguments.get((history[0].tool, tool))
        if known is None:
            return None
        predicted: dict[str, Any] = {}
        for name, sources in known.items():
            value = sources.best(history)
            if value is _ABSENT:
                return None
            predicted[name] = value
        return predicted

    def learn(self, tool: str, arguments: dict[str, Any], history: Sequence[_Past]) -> None:
        last = history[0].tool
        predicted = self.predict_arguments(tool, history)
        if predicted is not None:
            record = self.whole.setdefault((last, tool), [0, 0])
            record[1] += 1
            record[0] += predicted.keys() == arguments.keys() and all(
                _equal(predicted[name], value) for name, value in arguments.items()
            )
            if record[1] >= 64:
                record[0], record[1] = record[0] // 2, record[1] // 2
        self.single.setdefault(last, Counter())[tool] += 1
        if len(history) > 1:
            self.pair.setdefault((history[1].tool, last), Counter())[tool] += 1
        self.unigram[tool] += 1
        known = self.arguments.setdefault((last, tool), {})
        for name, value in arguments.items():
            known.setdefault(name, _Arguments()).learn(name, value, history)


def _entropy(counts: Counter[str]) -> float:
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values() if n) if total else 0.0


class Ticket:
    """One call run ahead."""

    __slots__ = ("cancel", "flight", "key", "seconds", "started_s", "value")

    def __init__(self, key: tuple[Scope, bytes], flight: Flight) -> None:
        self.key = key
        self.flight = flight
        self.value: Any = _ABSENT
        self.started_s = flight.started_s
        self.seconds = 0.0
        self.cancel: Callable[[], Any] = lambda: None

    @property
    def succeeded(self) -> bool:
        """Whether it ran to its end without an exception."""
        return self.value is not _ABSENT


class Speculator:
    """Predicts calls, holds what was run ahead, hands it over on an exact match. Thread-safe; runs nothing itself."""

    def __init__(
        self,
        *,
        min_probability: float = 0.3,
        min_predictability: float = 0.2,
        waste_weight: float = 0.25,
        budget_ratio: float = 4.0,
        allowance_s: float = 10.0,
        max_in_flight: int = 4,
        max_age_s: float = 30.0,
    ) -> None:
        self.stats = SpeculationStats()
        self._min_probability = min_probability
        self._min_predictability = min_predictability
        self._waste_weight = waste_weight
        self._budget_ratio = budget_ratio
        self._allowance_s = allowance_s
        self._max_in_flight = max_in_flight
        self._max_age_s = max_age_s
        self._lock = threading.Lock()
        self._models: OrderedDict[tuple[str, str], _Model] = OrderedDict()
        self._sessions: OrderedDict[Scope, tuple[deque[_Past], list[float]]] = OrderedDict()
        self._tickets: dict[tuple[Scope, bytes], Ticket] = {}
        self._now_s = 0.0
        # Waste not yet made good by savings. It fades, so that a bad start does not switch speculation off for good.
        self._debt_s = 0.0

    def _session(self, scope: Scope) -> tuple[deque[_Past], list[float]]:
        state = self._sessions.get(scope)
        if state is None:
            state = self._sessions[scope] = (deque(maxlen=_HISTORY), [math.nan])
            if len(self._sessions) > _MAX_SESSIONS:
                self._sessions.popitem(last=False)
        else:
            self._sessions.move_to_end(scope)
        return state

    def _model(self, scope: Scope) -> _Model:
        key = (scope.domain, scope.agent)
        model = self._models.get(key)
        if model is None:
            model = self._models[key] = _Model()
            if len(self._models) > _MAX_MODELS:
                self._models.popitem(last=False)
        else:
            self._models.move_to_end(key)
        return model

    def called(self, call: Call, now_s: float) -> None:
        """A real call begins: learns the think time since the last result."""
        with self._lock:
            self._now_s = now_s
            _, last_end = self._session(call.scope)
            if not math.isnan(last_end[0]):
                model = self._model(call.scope)
                think = max(0.0, now_s - last_end[0])
                model.think_s = think if model.think_s == 0.0 else 0.8 * model.think_s + 0.2 * think

    def returned(self, call: Call, result: Any, seconds: float, now_s: float, executed: bool) -> None:
        """A real call ended: learns the step, and remembers the result for later arguments."""
        arguments = call.named_arguments()
        tool = call.spec.name
        with self._lock:
            self._debt_s *= _DEBT_FADES
            history, last_end = self._session(call.scope)
            model = self._model(call.scope)
            if executed:
                before = model.seconds.get(tool)
                model.seconds[tool] = seconds if before is None else 0.8 * before + 0.2 * seconds
            if history:
                model.learn(tool, arguments, history)
            history.appendleft(_Past(tool, arguments, result))
            last_end[0] = now_s

    def predict(self, scope: Scope) -> list[Prediction]:
        """Calls worth running now, best first."""
        with self._lock:
            history, _ = self._session(scope)
            model = self._models.get((scope.domain, scope.agent))
            if model is None or not history or model.predictability() < self._min_predictability:
                return []
            if self._debt_s > self._allowance_s:
                return []
            worth: list[Prediction] = []
            for tool, p_tool in model.next_tools(history):
                if p_tool < self._min_probability:
                    break
                record = model.whole.get((history[0].tool, tool))
                if record is None:
                    continue
                p = p_tool * (record[0] + 0.5) / (record[1] + 1.0)
                seconds = model.seconds.get(tool, 0.0)
                saving = p * min(model.think_s, seconds)
                if p < self._min_probability or saving <= (1.0 - p) * seconds * self._waste_weight:
                    continue
                arguments = model.predict_arguments(tool, history)
                if arguments is not None:
                    worth.append(Prediction(tool, arguments, p))
            return worth

    def reserve(self, call: Call, flight: Flight) -> Ticket | None:
        """A place for a call to be run ahead, or None (already running, no place left)."""
        if call.key is None:
            return None
        key = (call.scope, call.key)
        with self._lock:
            # Sessions that ended without a word leave results behind.
            old = [k for k, t in self._tickets.items() if flight.started_s - t.started_s > self._max_age_s]
            dropped = [self._tickets.pop(k) for k in old]
        for ticket in dropped:
            self._drop(ticket)
        with self._lock:
            running = sum(1 for t in self._tickets.values() if not t.flight.done)
            if key in self._tickets or running >= self._max_in_flight:
                return None
            ticket = self._tickets[key] = Ticket(key, flight)
            self.stats.launched += 1
            return ticket

    def claim(self, call: Call) -> Ticket | None:
        """The ticket of exactly this call, if any; every other ticket of the session and agent is dropped."""
        with self._lock:
            if not self._tickets:
                return None
            mine = self._tickets.pop((call.scope, call.key), None) if call.key is not None else None
            others = [key for key in self._tickets if key[0] == call.scope]
            dropped = [self._tickets.pop(key) for key in others]
        for ticket in dropped:
            self._drop(ticket)
        return mine

    def end_session(self, scope: Scope) -> None:
        """The session made its last call: drops what runs ahead for it and what it may quote."""
        with self._lock:
            self._sessions.pop(scope, None)
            dropped = [self._tickets.pop(key) for key in [k for k in self._tickets if k[0] == scope]]
        for ticket in dropped:
            self._drop(ticket)

    def _drop(self, ticket: Ticket) -> None:
        ticket.cancel()
        self.stats.mismatched += 1
        self._wasted(ticket.seconds if ticket.flight.done else max(0.0, self._now_s - ticket.started_s))

    def _wasted(self, seconds: float) -> None:
        self.stats.wasted_s += seconds
        self._debt_s += seconds

    def too_old(self, ticket: Ticket, now_s: float) -> bool:
        """Whether a result run ahead has waited too long to be handed over."""
        return now_s - ticket.started_s > self._max_age_s

    def committed(self, ticket: Ticket, waited_s: float) -> None:
        """The ticket's result answered a real call that waited `waited_s` for it."""
        self.stats.committed += 1
        saved_s = max(0.0, ticket.seconds - waited_s)
        self.stats.saved_s += saved_s
        self._debt_s = max(0.0, self._debt_s - self._budget_ratio * saved_s)

    def refused(self, ticket: Ticket) -> None:
        """The ticket matched but its result could not be used."""
        if ticket.succeeded:
            self.stats.stale += 1
        else:
            self.stats.failed += 1
        self._wasted(ticket.seconds)
