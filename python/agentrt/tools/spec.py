"""What is known about a tool, and in whose name it is called.

:class:`ToolSpec` is a tool with its declarations; :meth:`ToolSpec.bind` turns arguments into a :class:`Call` whose
key, reads and writes are resolved. :func:`scope` says which session, agent and trust domain the calls inside it
belong to; it follows `asyncio` tasks and `asyncio.to_thread`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import math
import types
import uuid
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from agentrt.tools.canonical import NotCanonicalError, digest
from agentrt.tools.resources import Resource, ResourceSpec, compile_resources

__all__ = ["Call", "Scope", "ToolSpec", "current_scope", "scope"]


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose calls these are."""

    session: str = "default"
    agent: str = "default"
    domain: str = "default"
    """Trust domain. Results, executions in flight and what speculation learned never cross it."""


_DEFAULT_SCOPE = Scope()
_scope: ContextVar[Scope] = ContextVar("agentrt_tool_scope", default=_DEFAULT_SCOPE)


def current_scope() -> Scope:
    """The innermost :func:`scope`."""
    return _scope.get()


@contextlib.contextmanager
def scope(session: str | None = None, agent: str | None = None, domain: str | None = None) -> Iterator[Scope]:
    """Calls inside belong to this session, agent and trust domain; what is left out is inherited.

    >>> with scope(session="run-1", agent="planner", domain="acme") as s:
    ...     s.agent
    'planner'
    """
    outer = _scope.get()
    inner = Scope(session or outer.session, agent or outer.agent, domain or outer.domain)
    token = _scope.set(inner)
    try:
        yield inner
    finally:
        _scope.reset(token)


@dataclass(slots=True)
class Call:
    """One call, bound: ready to be decided, looked up, executed."""

    spec: ToolSpec
    bound: inspect.BoundArguments
    scope: Scope
    key: bytes | None
    """Name of (domain, tool, version, arguments); None where the arguments have no canonical form."""
    reads: tuple[Resource, ...]
    writes: tuple[Resource, ...]

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments by name, defaults applied."""
        return self.bound.arguments

    def named_arguments(self) -> dict[str, Any]:
        """Arguments as a model names them: `**kwargs` unfolded."""
        flat = dict(self.bound.arguments)
        extra = self.spec.extra_keyword
        if extra is not None:
            flat.update(flat.pop(extra, {}))
        return flat

    def execute(self) -> Any:
        """Runs the tool itself; for async tools the coroutine."""
        return self.spec.function(*self.bound.args, **self.bound.kwargs)


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif inspect.ismethod(function):
            function = function.__func__
        else:
            return function


def _identity(function: Callable[..., Any]) -> Hashable:
    """Equal for wrappings of one function; closures and methods of different objects are different tools."""
    owner = None
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif inspect.ismethod(function):
            owner = id(function.__self__)
            function = function.__func__
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            break
    code = getattr(function, "__code__", None)
    inner = id(function) if code is None or getattr(function, "__closure__", None) else code
    return (owner, inner)


def _code_version(function: Callable[..., Any]) -> str | None:
    """A digest of a plain function's code, or None where code does not say what the function does."""
    if not isinstance(function, types.FunctionType) or function.__closure__ or hasattr(function, "__wrapped__"):
        return None

    def walk(code: types.CodeType) -> Iterator[bytes]:
        yield code.co_code
        yield repr((code.co_names, code.co_varnames)).encode()
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from walk(constant)
            else:
                yield repr(constant).encode()

    sha = hashlib.blake2b(digest_size=12)
    for piece in walk(function.__code__):
        sha.update(piece + b"\0")
    return sha.hexdigest()


@dataclass(slots=True)
class ToolSpec:
    """A tool and its declarations; made by :func:`agentrt.tool` or :meth:`agentrt.tools.ToolRuntime.wrap`."""

    function: Callable[..., Any]
    name: str
    version: str
    reads: ResourceSpec = None
    writes: ResourceSpec = None
    ttl_s: float = math.inf
    cache: bool = True
    cache_errors: tuple[type[Exception], ...] = ()
    speculate: bool = True
    labels: frozenset[str] = frozenset()
    ignore: frozenset[str] = frozenset()
    unicode: str = "exact"
    is_async: bool = False
    streams: bool = False
    signature: inspect.Signature = field(init=False)
    extra_keyword: str | None = field(init=False)
    identity: Hashable = field(init=False)
    """What the tool *is*, whatever it is called."""
    _reads: Callable[[Mapping[str, Any]], tuple[Resource, ...]] = field(init=False)
    _writes: Callable[[Mapping[str, Any]], tuple[Resource, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.signature = inspect.signature(self.function)
        parameters = self.signature.parameters.values()
        self.extra_keyword = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        names = [p.name for p in parameters]
        accepts_any = self.extra_keyword is not None
        self._reads = compile_resources(self.reads, names, accepts_any)
        self._writes = compile_resources(self.writes, names, accepts_any)
        self.identity = _identity(self.function)
        unknown = self.ignore - set(names)
        if unknown and not accepts_any:
            raise ValueError(f"no such argument to ignore: {min(unknown)}")

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        version: str | None = None,
        reads: ResourceSpec = None,
        writes: ResourceSpec = None,
        ttl_s: float = math.inf,
        cache: bool = True,
        cache_errors: Iterable[type[Exception]] = (),
        speculate: bool = True,
        labels: Iterable[str] = (),
        ignore: Iterable[str] = (),
        unicode: str = "exact",
    ) -> ToolSpec:
        """A tool with its declarations.

        Args:
            function: The tool: a function, coroutine function, bound method or callable object.
            name: Name in keys, rules and logs; the function's own by default.
            version: Change it and earlier results are not reused. By default a digest of the function's code;
                for closures, bound methods and wrapped functions, whose code does not say what they do, a value
                unique to this wrapping (their results are then not shared between processes).
            reads: Resources the result depends on (templates over arguments, or a function of the arguments).
                None: unknown, so every write anywhere invalidates it. ``()``: the arguments alone.
            writes: Resources a call changes. None: unknown, so it invalidates everything and is always executed.
                ``()``: none; only such calls are reused or speculated.
            ttl_s: Longest time a result is reused, for state that changes without being declared.
            cache: False: never reuse (the call may still be speculated).
            cache_errors: Exceptions that are answers ("no such row") and may be reused.
            speculate: False: never run before it is asked for (a paid or private service).
            labels: Taint labels that results carry.
            ignore: Arguments that do not change the result (a logger, a progress callback).
            unicode: ``"NFC"`` treats canonically equivalent texts as one argument.
        """
        target = function
        if not isinstance(function, (types.FunctionType, functools.partial)) and not inspect.ismethod(function):
            target = type(function).__call__
        plain = _unwrapped(target)
        label = name or getattr(function, "__name__", None) or type(function).__name__
        known = version or _code_version(function)
        where = f"{getattr(plain, '__module__', '')}.{getattr(plain, '__qualname__', label)}"
        return cls(
            function=function,
            name=label,
            version=f"{where}@{known or uuid.uuid4().hex}",
            reads=reads,
            writes=writes,
            ttl_s=ttl_s,
            cache=cache,
            cache_errors=tuple(cache_errors),
            speculate=speculate,
            labels=frozenset(labels),
            ignore=frozenset(ignore),
            unicode=unicode,
            is_async=inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(plain),
            streams=inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain),
        )

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any], caller: Scope) -> Call:
        """Arguments bound to names, with defaults, key and resources; raises TypeError as the call itself would."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        return Call(self, bound, caller, self._key(arguments, caller.domain), *self._resources(arguments))

    def _resources(self, arguments: dict[str, Any]) -> tuple[tuple[Resource, ...], tuple[Resource, ...]]:
        if self.extra_keyword is not None:
            arguments = {**arguments, **arguments.get(self.extra_keyword, {})}
        return self._reads(arguments), self._writes(arguments)

    def _key(self, arguments: dict[str, Any], domain: str) -> bytes | None:
        if self.ignore:
            arguments = {k: v for k, v in arguments.items() if k not in self.ignore}
        try:
            return digest((domain, self.name, self.version, arguments), self.unicode)
        except NotCanonicalError:
            return None
