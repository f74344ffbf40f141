"""Faults must not reach vLLM: everything runs inside :meth:`Guard.run`; hooks, in Rust, likewise (``EngineHooks``).

A fault is counted under its kind (hook and exception type), logged in full the first time only, and answered with the
hook's default, which leaves vLLM as it would be without agentrt. More than ``LIMIT`` faults within ``WINDOW_S`` pause
the adapter for ``PAUSE_S``: vLLM then runs in its own order without a call into agentrt. A hook that takes longer than
``SLOW_S`` counts as a fault of kind ``slow``.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

__all__ = ["Guard"]

T = TypeVar("T")

LIMIT = 32
WINDOW_S = 10.0
PAUSE_S = 30.0
SLOW_S = 0.05
MAX_KINDS = 256

# vLLM configures the loggers below its own name only.
logger = logging.getLogger("vllm.agentrt")


class Guard:
    """Counts faults and decides when to stay away."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.faults: Counter[str] = Counter()
        self.pauses = 0
        self.spent_s = 0.0
        self._window_start = 0.0
        self._in_window = 0
        self.paused_until = 0.0

    def run(self, hook: str, default: T, action: Callable[..., T], *arguments: object) -> T:
        """Calls ``action``; whatever goes wrong, ``default`` is the answer."""
        start = self.clock()
        if start < self.paused_until:
            return default
        try:
            return action(*arguments)
        except BaseException as error:
            # A panic in Rust is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            self.failed(hook, error)
            return default
        finally:
            self.took(hook, self.clock() - start)

    def failed(self, hook: str, error: BaseException) -> None:
        """Counts an exception."""
        self._fault(f"{hook}: {type(error).__name__}", error)

    def took(self, hook: str, seconds: float) -> None:
        """Counts the time of a hook."""
        self.spent_s += seconds
        if seconds > SLOW_S:
            self._fault(f"{hook}: slow", None)

    def note(self, kind: str) -> None:
        """Counts a fault that was handled where it occurred."""
        self._fault(kind, None)

    def _fault(self, kind: str, error: BaseException | None) -> None:
        if kind not in self.faults:
            if len(self.faults) >= MAX_KINDS:
                kind = "other"
            if kind not in self.faults:
                logger.warning(
                    "agentrt: fault `%s`, answered with vLLM's own behaviour; later ones are only counted",
                    kind,
                    exc_info=error,
                )
        self.faults[kind] += 1
        now = self.clock()
        if now - self._window_start > WINDOW_S:
            self._window_start, self._in_window = now, 0
        self._in_window += 1
        if self._in_window > LIMIT:
            self._in_window = 0
            self.paused_until = now + PAUSE_S
            self.pauses += 1
            if self.pauses == 1:
                logger.warning("agentrt: too many faults, paused for %.0f s; vLLM runs in its own order", PAUSE_S)
