"""Taint: which labels the text in a context carries, and where they go.

A label says where text came from: ``web``, ``web:news``, ``customer-mail``. Labels enter a *context* with messages and
tool results, and only grow. A context is a session, or one agent of it (`spread="agent"`, for frameworks that report
every message between agents). They follow:

* **calls** - a result brings the labels of its tool, of everything its inner calls brought, and of the resources it
  read; the memo keeps them with the result, so a later hit brings them too;
* **resources** - what a tainted context writes takes its labels, and so does whoever reads it afterwards (the second
  agent that finds the note);
* **agents** - :meth:`Taint.flow` when one agent's text is given to another;
* **summaries** - a summary carries the union of what it was made from (:meth:`Taint.summary`): shortening is no
  washing;
* **retries** change nothing: labels are of the context, not of the attempt.

They leave only through a *sanitiser* declared in the policy: a tool whose result carries the labels of its input
context less those it removes, for contexts that took nothing else in: text made by the sanitiser goes to a fresh
context (:meth:`Taint.sanitised`). A context that has read tainted text stays tainted for its life; nothing can
unread it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from agentrt.tools.resources import Resource, conflicts
from agentrt.tools.spec import Scope

__all__ = ["Taint"]

Context = tuple[str, str, str]
_MAX_CONTEXTS = 100_000
_MAX_RESOURCES = 10_000


class Taint:
    """Labels of contexts and resources. Thread-safe.

    A context that falls out of the bounded table (oldest first) is remembered as such: whoever comes back after that
    carries the label ``forgotten``, which no tool accepts by default.
    """

    def __init__(self, spread: str = "session", max_contexts: int = _MAX_CONTEXTS) -> None:
        if spread not in ("session", "agent"):
            raise ValueError(f"spread must be 'session' or 'agent', not: {spread!r}")
        self._spread = spread
        self._max_contexts = max_contexts
        self._lock = threading.Lock()
        self._labels: OrderedDict[Context, frozenset[str]] = OrderedDict()
        self._forgot = False
        self._resources: OrderedDict[Resource, frozenset[str]] = OrderedDict()
        self._everything: frozenset[str] = frozenset()

    def _context(self, scope: Scope) -> Context:
        return (scope.domain, scope.session, scope.agent if self._spread == "agent" else "")

    def start(self, scope: Scope, labels: Iterable[str] = ()) -> None:
        """A context begins, with the labels of what it is given (none for a new session of one's own text)."""
        with self._lock:
            self._put(self._context(scope), frozenset(labels))

    def _put(self, context: Context, labels: frozenset[str]) -> None:
        self._labels[context] = labels
        self._labels.move_to_end(context)
        if len(self._labels) > self._max_contexts:
            # Clean contexts go first; only losing a tainted one has to be remembered.
            clean = next((c for c, held in self._labels.items() if not held), None)
            if clean is None:
                self._labels.popitem(last=False)
                self._forgot = True
            else:
                del self._labels[clean]

    def labels(self, scope: Scope) -> frozenset[str]:
        """What the context carries now."""
        with self._lock:
            return self._get(self._context(scope))

    def _get(self, context: Context) -> frozenset[str]:
        held = self._labels.get(context)
        if held is None:
            return frozenset({"forgotten"}) if self._forgot else frozenset()
        return held

    def add(self, scope: Scope, labels: Iterable[str]) -> None:
        """Text with these labels entered the context."""
        new = frozenset(labels)
        if not new:
            return
        with self._lock:
            context = self._context(scope)
            self._put(context, self._get(context) | new)

    def flow(self, source: Scope, target: Scope) -> None:
        """Text of one context is given to another (a message, a hand-over, a sub-agent's prompt or answer)."""
        self.add(target, self.labels(source))

    def summary(self, sources: Sequence[Scope], target: Scope) -> frozenset[str]:
        """A summary of some contexts becomes the text of another: it carries all their labels."""
        labels = frozenset().union(*(self.labels(source) for source in sources)) if sources else frozenset()
        self.add(target, labels)
        return labels

    def sanitised(self, source: Scope, target: Scope, removed: Iterable[str]) -> frozenset[str]:
        """The result of a declared sanitiser, run on text of `source`, becomes text of `target`."""
        gone = tuple(removed)
        labels = frozenset(
            label for label in self.labels(source) if not any(label == g or label.startswith(g + ":") for g in gone)
        )
        self.add(target, labels)
        return labels

    def wrote(self, scope: Scope, resources: Sequence[Resource]) -> None:
        """The context changed these resources: whoever reads them gets its labels."""
        labels = self.labels(scope)
        if not labels:
            return
        with self._lock:
            for resource in resources:
                if resource == ():
                    self._everything |= labels
                    continue
                self._resources[resource] = self._resources.get(resource, frozenset()) | labels
                self._resources.move_to_end(resource)
            while len(self._resources) > _MAX_RESOURCES:
                # A bounded table must not lose taint: what falls out taints everything.
                _, lost = self._resources.popitem(last=False)
                self._everything |= lost

    def of_resources(self, resources: Sequence[Resource]) -> frozenset[str]:
        """Labels that reading these resources brings; a call that reads nothing brings none."""
        if not resources:
            return frozenset()
        with self._lock:
            labels = self._everything
            for written, held in self._resources.items():
                if any(conflicts(written, read) for read in resources):
                    labels |= held
            return labels

    def clean_resource(self, resource: Resource) -> None:
        """An operator vouches for what is in the resource now."""
        with self._lock:
            for written in [w for w in self._resources if w[: len(resource)] == resource]:
                del self._resources[written]
            if resource == ():
                self._everything = frozenset()
