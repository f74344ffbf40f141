"""Errors of agentrt: one base class, one subclass per cause, with the parts of the message as attributes.

The compiled core raises these classes, so ``except agentrt.AgentRTError`` catches every error that is agentrt's own.
Every message names the remedy.
"""

from __future__ import annotations

__all__ = [
    "AgentRTError",
    "ArrayTypeError",
    "ArrayValueError",
    "BadLineError",
    "BadOptionError",
    "BadTimeError",
    "BadTraceError",
    "BusyError",
    "FileAccessError",
    "MissingExtraError",
    "NoMemoryError",
    "NotConfiguredError",
    "OutOfRangeError",
    "PolicyError",
    "UnknownPolicyError",
    "UnknownWorkloadError",
]


class AgentRTError(Exception):
    """Base of all errors that agentrt raises on purpose."""


class FileAccessError(AgentRTError):
    """A file cannot be opened, read or written."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class BadTraceError(AgentRTError, ValueError):
    """A trace as a whole is not usable: empty, truncated, of an unknown schema."""

    def __init__(self, path: str, problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)
        self.path = path
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; {self.remedy}"


class BadLineError(AgentRTError, ValueError):
    """A line of a trace is not usable."""

    def __init__(self, path: str, line: int, field: str, problem: str, remedy: str) -> None:
        super().__init__(path, line, field, problem, remedy)
        self.path = path
        self.line = line
        self.field = field
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: field `{self.field}`: {self.problem}; {self.remedy}"


class UnknownPolicyError(AgentRTError, ValueError):
    """A policy name that does not exist; `known` is a comma-separated list."""

    def __init__(self, name: str, known: str) -> None:
        super().__init__(name, known)
        self.name = name
        self.known = known

    def __str__(self) -> str:
        return f"unknown policy `{self.name}`; known policies: {self.known}"


class UnknownWorkloadError(AgentRTError, ValueError):
    """A built-in workload name that does not exist; `known` is a comma-separated list."""

    def __init__(self, name: str, known: str) -> None:
        super().__init__(name, known)
        self.name = name
        self.known = known

    def __str__(self) -> str:
        return f"unknown workload `{self.name}`; known workloads: {self.known}"


class BadOptionError(AgentRTError, ValueError):
    """An option outside its range."""

    def __init__(self, option: str, problem: str, remedy: str) -> None:
        super().__init__(option, problem, remedy)
        self.option = option
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.option}: {self.problem}; {self.remedy}"


class PolicyError(AgentRTError):
    """A policy written in Python raised or answered nonsense (the cause is chained), or one broke its own promise."""

    def __init__(self, policy: str, problem: str) -> None:
        super().__init__(policy, problem)
        self.policy = policy
        self.problem = problem

    def __str__(self) -> str:
        return f"policy `{self.policy}`: {self.problem}"


class MissingExtraError(AgentRTError, ImportError):
    """An optional part is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(what, extra)
        self.what = what
        self.extra = extra

    def __str__(self) -> str:
        return f"{self.what} needs an optional part; run: pip install 'agentrt[{self.extra}]'"


class OutOfRangeError(AgentRTError, ValueError):
    """A number outside its range; nothing has changed."""

    def __init__(self, what: str, minimum: int, maximum: int, requested: int) -> None:
        super().__init__(what, minimum, maximum, requested)
        self.what = what
        self.minimum = minimum
        self.maximum = maximum
        self.requested = requested

    def __str__(self) -> str:
        return f"{self.what} must be between {self.minimum} and {self.maximum}: {self.requested}"


class BusyError(AgentRTError, RuntimeError):
    """Another thread is in an operation that has one caller at a time; nothing has changed, call again."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return f"{self.what} is in use by another thread; call again, or from one thread at a time"


class _ArrayError(AgentRTError):
    def __init__(self, array: str, problem: str, remedy: str) -> None:
        super().__init__(array, problem, remedy)
        self.array = array
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"`{self.array}` {self.problem}; {self.remedy}"


class ArrayTypeError(_ArrayError, TypeError):
    """An array or list is of the wrong type; nothing has changed."""


class ArrayValueError(_ArrayError, ValueError):
    """An array or list has the wrong length, layout or content; nothing has changed."""


class BadTimeError(AgentRTError, ValueError):
    """A time that is no time: NaN, infinite, negative, or beyond 500,000 years."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds

    def __str__(self) -> str:
        return f"time must be finite and not negative, in seconds of one monotonic clock: {self.seconds}"


class NoMemoryError(AgentRTError, MemoryError):
    """A runtime of this size does not fit into memory."""

    def __init__(self, pool_blocks: int, needed_bytes: int) -> None:
        super().__init__(pool_blocks, needed_bytes)
        self.pool_blocks = pool_blocks
        self.needed_bytes = needed_bytes

    def __str__(self) -> str:
        return f"{self.pool_blocks} pool blocks need {self.needed_bytes} bytes, which cannot be had; pass fewer"


class NotConfiguredError(AgentRTError, RuntimeError):
    """The default runtime was used before its pool size was known."""

    def __str__(self) -> str:
        return "no pool size is known; call agentrt.configure(pool_blocks=...) with the engine's number of KV blocks"
