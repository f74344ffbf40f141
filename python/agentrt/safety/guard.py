"""The guard: decides each call, binds the decision to what was decided, and checks again right before execution.

A decision yields a :class:`Permit`: which tool, a keyed digest of the exact arguments, whose call it is, which labels
the context carried and which policy decided. It is good once, for that call only. Between decision and execution
nothing can be exchanged: the arguments are a private copy from the start (:meth:`Guard.seal`), :meth:`Guard.redeem`
recomputes the digest, and if the context took in labels meanwhile, or the policy was reloaded, the call is decided
again.

Cost: a decision 1-5 us at 1,000 rules (in Rust); with labels, permit, redemption and no audit log about 15 us.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrt._core import ToolRules, check_policy
from agentrt.errors import AgentRTError, FileAccessError
from agentrt.safety.audit import AuditLog
from agentrt.safety.taint import Taint
from agentrt.tools.canonical import NotCanonicalError, canonical_text
from agentrt.tools.spec import Call, Scope, ToolSpec

__all__ = ["Decision", "DeniedError", "Finding", "Guard", "Permit", "Report", "check_file"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a policy file."""

    line: int
    column: int
    severity: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """What :func:`check_file` found."""

    path: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether the policy can be used: warnings do not count."""
        return not any(f.severity == "error" for f in self.findings)

    def lines(self) -> list[str]:
        """One line per finding, `path:line:column: severity: message [code]`."""
        return [f"{self.path}:{f.line}:{f.column}: {f.severity}: {f.message} [{f.code}]" for f in self.findings]


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileAccessError(os.fspath(path), f"not UTF-8: {error.reason}") from error
    except OSError as error:
        raise FileAccessError(os.fspath(path), error.strerror or str(error)) from error


def check_file(path: str | os.PathLike[str]) -> Report:
    """Errors, shadowed and unreachable rules of a policy file, with places; `agentrt policy check FILE` prints them.

    Raises:
        FileAccessError: if it cannot be read.
    """
    return Report(os.fspath(path), tuple(Finding(*found) for found in check_policy(_read(path))))


@dataclass(frozen=True, slots=True)
class Decision:
    """What the policy says about a call."""

    effect: str
    """allow, deny or ask."""
    rule: str | None
    """Id of the rule that decided."""
    reason: str
    """rule, default, privileged, unknown-tool, look-alike, taint, too-complex, alias, declined, changed."""
    message: str
    labels: frozenset[str]


class DeniedError(AgentRTError, PermissionError):
    """The call does not run. The message names rule and reason, never the arguments."""

    def __init__(self, tool: str, decision: Decision) -> None:
        self.tool = tool
        self.decision = decision
        because = f" ({decision.message})" if decision.message else ""
        super().__init__(f"{tool} denied: {decision.rule or decision.reason}{because}")


@dataclass(slots=True, eq=False)
class Permit:
    """One allowed call."""

    tool: str
    digest: bytes
    scope: Scope
    labels: frozenset[str]
    policy: int
    asked: bool
    used: bool = False


_MESSAGES = {
    "privileged": "privileged, and no rule allows it",
    "unknown-tool": "not declared in the policy",
    "look-alike": "not declared, and looks like a declared tool",
    "taint": "the context carries labels this tool does not accept",
    "too-complex": "arguments too deep or too large to be looked through",
    "alias": "another declared name of the same function decides otherwise",
    "declined": "asked, and declined",
    "changed": "call or context changed between decision and execution",
}


def _copy(value: Any) -> Any:
    kind = type(value)
    if kind is dict:
        return {_copy(k): _copy(v) for k, v in value.items()}
    if kind is list:
        return [_copy(v) for v in value]
    if kind is tuple:
        return tuple(_copy(v) for v in value)
    if kind is set:
        return set(value)
    return value


class Guard:
    """Decides calls by a policy file; give it to :class:`agentrt.tools.ToolRuntime`.

    Args:
        policy: Path of the policy file.
        audit: A log; None writes nothing.
        taint: Labels of contexts; a fresh one with `spread="session"` by default.
        approve: Asked for calls whose rule says `ask`; without it they are denied. It sees the call itself.
    """

    def __init__(
        self,
        policy: str | os.PathLike[str],
        *,
        audit: AuditLog | None = None,
        taint: Taint | None = None,
        approve: Callable[[Call, Decision], bool] | None = None,
    ) -> None:
        self._path = Path(policy)
        self._audit = audit
        self._approve = approve
        self.taint = taint or Taint()
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._version = 0
        self._identities: dict[Any, set[str]] = {}
        self.reload()

    def reload(self) -> None:
        """Reads the file again. A file with errors raises ValueError and leaves the old policy in force."""
        rules = ToolRules(_read(self._path))
        named = [(name, effect, reason) for name, effect, reason, _ in rules.rules()]
        adds = {name: frozenset(added) for name, _, _, added in rules.tools()}
        sanitisers = dict(rules.sanitisers())
        with self._lock:
            self._rules, self._named, self._adds, self._sanitisers = rules, named, adds, sanitisers
            self._version += 1

    # Decisions --------------------------------------------------------------------------------------------------

    def decide(self, tool: str, arguments: dict[str, Any], scope: Scope) -> Decision:
        """What the policy says, for callers that run tools themselves; see :meth:`authorise` for the full path."""
        labels = self.taint.labels(scope)
        effect, rule, reason = self._rules.decide(tool, scope.agent, scope.session, tuple(labels), arguments)
        if rule >= 0:
            name, _, message = self._named[rule]
            return Decision(effect, name, reason, message or _MESSAGES.get(reason, ""), labels)
        return Decision(effect, None, reason, _MESSAGES.get(reason, ""), labels)

    def _decide(self, call: Call) -> Decision:
        arguments = call.named_arguments()
        decision = self.decide(call.spec.name, arguments, call.scope)
        if decision.effect == "deny":
            return decision
        # One function under two names: the stricter name decides.
        for name in self._names_of(call):
            if name == call.spec.name:
                continue
            other = self.decide(name, arguments, call.scope)
            if other.effect == "deny" and other.reason != "unknown-tool":
                return Decision("deny", other.rule, "alias", _MESSAGES["alias"], decision.labels)
            if other.effect == "ask":
                decision = other
        return decision

    def _names_of(self, call: Call) -> tuple[str, ...]:
        with self._lock:
            names = self._identities.setdefault(call.spec.identity, set())
            names.add(call.spec.name)
            return tuple(names)

    def register(self, spec: ToolSpec) -> None:
        """Tells the guard which function a tool is, so that no other name makes it another tool.

        A runtime registers what it wraps; what comes by :func:`agentrt.tool` is registered at its first call.
        """
        with self._lock:
            self._identities.setdefault(spec.identity, set()).add(spec.name)

    def _log(self, call: Call, decision: Decision, stage: str) -> None:
        if self._audit is not None:
            self._audit.record(
                stage=stage,
                tool=call.spec.name[:128],
                agent=call.scope.agent[:128],
                session=call.scope.session[:128],
                domain=call.scope.domain[:128],
                effect=decision.effect,
                rule=decision.rule,
                reason=decision.reason,
                labels=sorted(decision.labels),
                policy=self._version,
            )

    def seal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A private copy of the arguments: containers are copied, other objects are not."""
        return tuple(_copy(a) for a in args), {k: _copy(v) for k, v in kwargs.items()}

    def _digest(self, call: Call) -> bytes:
        try:
            text = canonical_text((call.spec.name, call.spec.version, call.bound.arguments))
        except NotCanonicalError:
            # Objects without a canonical form are bound by identity: exchanged is noticed, changed inside is not.
            parts = [(name, _shape(value)) for name, value in call.bound.arguments.items()]
            text = repr((call.spec.name, call.spec.version, parts))
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=self._secret, digest_size=24).digest()

    def authorise(self, call: Call) -> Permit:
        """A permit for exactly this call, or :class:`DeniedError`."""
        version = self._version
        decision = self._decide(call)
        digest = self._digest(call)
        asked = decision.effect == "ask"
        if asked:
            approved = self._approve is not None and self._approve(call, decision)
            self._log(call, decision, "asked")
            effect = "allow" if approved else "deny"
            reason = decision.reason if approved else "declined"
            message = decision.message if approved else _MESSAGES["declined"]
            decision = Decision(effect, decision.rule, reason, message, decision.labels)
        self._log(call, decision, "decided")
        if decision.effect != "allow":
            raise DeniedError(call.spec.name, decision)
        return Permit(call.spec.name, digest, call.scope, decision.labels, version, asked)

    def redeem(self, permit: Permit, call: Call) -> None:
        """Right before execution: :class:`DeniedError` unless the permit is for this call, unused and still right."""
        with self._lock:
            fresh = not permit.used
            permit.used = True
        same = fresh and permit.scope == call.scope and permit.tool == call.spec.name
        if not (same and secrets.compare_digest(permit.digest, self._digest(call))):
            self._refuse(call, permit.labels)
        if permit.policy != self._version or self.taint.labels(call.scope) != permit.labels:
            # The world moved on since: what is true now decides. An approval given before does not carry over.
            decision = self._decide(call)
            self._log(call, decision, "decided-again")
            if decision.effect != "allow" and not (permit.asked and decision.effect == "ask"):
                raise DeniedError(call.spec.name, decision)

    def _refuse(self, call: Call, labels: frozenset[str]) -> None:
        decision = Decision("deny", None, "changed", _MESSAGES["changed"], labels)
        self._log(call, decision, "redeemed")
        raise DeniedError(call.spec.name, decision)

    def would_allow(self, call: Call) -> bool:
        """Whether a call run ahead is allowed without asking anyone; logged as such."""
        decision = self._decide(call)
        self._log(call, decision, "ahead")
        return decision.effect == "allow"

    # Labels -----------------------------------------------------------------------------------------------------

    def result_labels(self, call: Call) -> frozenset[str]:
        """Labels that the result of a call carries whoever asks for it."""
        name = self._rules.canonical_tool(call.spec.name)
        labels = self._adds.get(name, frozenset()) if name is not None else frozenset()
        return labels | call.spec.labels | self.taint.of_resources(call.reads)

    def wrote(self, call: Call) -> None:
        """A call with effects is about to run: what it writes takes the labels of its context."""
        self.taint.wrote(call.scope, call.writes)

    def received(self, call: Call, labels: frozenset[str]) -> None:
        """A result entered the caller's context."""
        self.taint.add(call.scope, labels)

    def sanitise(self, tool: str, source: Scope, target: Scope) -> frozenset[str]:
        """A result of the sanitiser `tool`, run on text of `source`, becomes text of the context `target`.

        Raises ValueError if the policy does not declare the tool a sanitiser, or if both contexts are one: what a
        context has read, it cannot unread.
        """
        name = self._rules.canonical_tool(tool)
        removes = self._sanitisers.get(name) if name is not None else None
        if removes is None:
            raise ValueError(f"not a declared sanitiser: {tool}")
        if self.taint._context(source) == self.taint._context(target):
            raise ValueError("a sanitised text needs a context of its own: give another session")
        return self.taint.sanitised(source, target, removes)


def _shape(value: Any) -> Any:
    kind = type(value)
    if kind in (str, int, float, bool, bytes) or value is None:
        return (kind.__name__, value)
    if kind is dict:
        return [(_shape(k), _shape(v)) for k, v in value.items()]
    if kind in (list, tuple):
        return [_shape(v) for v in value]
    return id(value)
