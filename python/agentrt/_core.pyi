"""Type stubs of the compiled extension."""

import os
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

def build_info() -> str: ...
def is_debug_build() -> bool: ...

# Traces and replay

@final
class Trace:
    """A workload in memory: calls of sessions over prefix-chained blocks. Immutable; share it between threads."""

    @staticmethod
    def read(
        path: str | os.PathLike[str],
        *,
        skip_bad: bool = False,
        share_system_prefix: bool = True,
        block_size: int | None = None,
    ) -> Trace:
        """Reads a trace file, gzip or plain, in the agentrt, Mooncake or Dynamo format.

        Args:
            path: The file.
            skip_bad: Leave out unusable lines and count them (``skipped_lines``), instead of raising.
            share_system_prefix: Sessions with equal ``sys_key`` share their first ``sys_blocks`` blocks.
            block_size: Tokens per block of a Mooncake or Dynamo file; inferred where None.

        Raises:
            FileAccessError: The file cannot be read.
            BadLineError: A line cannot be used.
            BadTraceError: The file as a whole cannot be used.
        """

    @staticmethod
    def generate(name: str, *, sessions: int | None = None, seed: int = 0, agents: int | None = None) -> Trace:
        """Generates a built-in workload, see ``workloads``.

        Raises:
            UnknownWorkloadError: No workload has this name.
            BadOptionError: A size is out of range.
        """

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the agentrt format, gzip where the name ends in .gz; the file appears when it is complete."""

    def profile(self, sessions: int = 16) -> dict[str, Any]:
        """What the workload looks like, judged for so many concurrent sessions."""

    @property
    def workload(self) -> str: ...
    @property
    def block_size(self) -> int: ...
    @property
    def agents(self) -> list[str]: ...
    @property
    def calls(self) -> int: ...
    @property
    def sessions(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def skipped_lines(self) -> int: ...

@final
class ReplayCall:
    """What a cache policy may know of a call. Block ids are dense integers; equal ids are equal full prefixes."""

    @property
    def session(self) -> int: ...
    @property
    def agent(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def time_us(self) -> int: ...
    @property
    def prompt(self) -> list[int]: ...
    @property
    def hit(self) -> int: ...
    @property
    def output(self) -> list[int]: ...
    @property
    def released(self) -> list[int]: ...
    @property
    def tool(self) -> str | None: ...

def replay(
    traces: list[Trace],
    policies: list[str | tuple[str, Callable[[], object]]],
    *,
    order: str,
    sessions: list[int],
    seeds: list[int],
    capacities: list[str],
    model: str,
    host: str | None = None,
    host_bandwidth: float | None = None,
    prefetch_bandwidth: float | None = None,
    threads: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> str:
    """Replays traces under policies and returns the results as JSON; see ``agentrt.replay.run``."""

def policies() -> list[tuple[str, str]]: ...
def workloads() -> list[tuple[str, str, int]]: ...
def models() -> list[tuple[str, float]]: ...
def replay_flat(policy: str, keys: NDArray[np.uint32], capacity: int) -> NDArray[np.bool_]:
    """Replays a stream of single blocks under a policy; one flag per key, true where it was in the cache."""

# Transfer

def copy_host_blocks(
    arrays: Sequence[NDArray[np.uint8]],
    sources: NDArray[np.int64],
    destinations: NDArray[np.int64],
    sizes: NDArray[np.int64],
    max_threads: int,
    /,
) -> int:
    """Copies `sizes[i]` bytes between addresses inside `arrays`, and returns the bytes moved."""

# Rules on tool calls

@final
class ToolRules:
    """A policy ready to decide; see `agentrt.safety`."""

    def __new__(cls, text: str, /) -> ToolRules: ...
    def decide(
        self, tool: str, agent: str, session: str, labels: tuple[str, ...], arguments: dict[str, object], /
    ) -> tuple[str, int, str]: ...
    def canonical_tool(self, name: str, /) -> str | None: ...
    def rules(self) -> list[tuple[str, str, str, int]]: ...
    def tools(self) -> list[tuple[str, bool, list[str], list[str]]]: ...
    def sanitisers(self) -> list[tuple[str, list[str]]]: ...
    def trusted(self) -> list[str]: ...

def check_policy(text: str, /) -> list[tuple[int, int, str, str, str]]: ...
