"""Type stubs of the compiled extension."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, final, overload

import numpy as np
from numpy.typing import NDArray

from agentrt.engines.vllm.adapter import Adapter
from agentrt.engines.vllm.callers import Callers
from agentrt.engines.vllm.guard import Guard
from agentrt.policy import Policy

def build_info() -> str: ...
def is_debug_build() -> bool: ...

# observe, score, predict, act

def block_key(digest: bytes, /) -> int:
    """A 64-bit block key for an engine's hash. Equal bytes give equal keys in every process and version.

    Raises:
        ArrayTypeError: Not bytes; integers below 2^64 are keys already.
    """

@final
class Prediction:
    """A guess about a session's future."""

    @property
    def agent(self) -> str:
        """Name of the agent; its number as text where it was never named."""
    @property
    def agent_id(self) -> int: ...
    @property
    def step(self) -> int:
        """Which of the session's next calls, from 1."""
    @property
    def probability(self) -> float:
        """P(that call is made, and by this agent)."""
    @property
    def median_s(self) -> float:
        """Median seconds until that call, given that it is made."""

@final
class Prefetch:
    """A session that is expected to call soon and whose blocks are worth bringing back from a lower tier."""

    @property
    def workload(self) -> str: ...
    @property
    def session(self) -> int:
        """Key of the session, see ``Session.key``."""
    @property
    def agent(self) -> str: ...
    @property
    def agent_id(self) -> int: ...
    @property
    def waits(self) -> bool:
        """The call has arrived and waits: its prompt is wanted. Else the agent's last one, likely to come again."""
    @property
    def probability(self) -> float:
        """P(the session's next call is made, and by this agent); 1 for a call that waits."""
    @property
    def score(self) -> float:
        """Hits per second that holding one block of that prompt promises."""
    @property
    def room(self) -> int:
        """Blocks that can be brought back without displacing what is worth more."""

@final
class Runtime:
    """Learned state, sessions and residency index of one engine's block pool.

    Allocates all it will ever use when it is made: about 32 bytes a pool block, 250 a session, 20,000 a workload.
    Frozen; use it from any thread. Identity-only events, scores and predictions never wait; what touches the pool has
    one caller at a time and raises :class:`~agentrt.errors.BusyError` for a second one.

    Args:
        pool_blocks: KV blocks of the engine's pool, 1 to 2^31.
        sessions: Sessions remembered, 8 to 2^24; the least recently used is forgotten first.
        policies: Who decides, in order: ``"kv_cache"`` (learned), ``"lru"``, ``"fairness"``, ``"agent_fairness"``,
            ``"batch_shaping"``, ``"speculation"``, ``"tool_gap"`` (see :class:`Scheduler`), or objects that follow
            :class:`agentrt.Policy`. The first that answers decides; the next one names what is missing. By default
            ``("kv_cache",)``.

    Raises:
        OutOfRangeError: A size cannot be had.
        NoMemoryError: The pool's index does not fit into memory.
        UnknownPolicyError: No built-in policy has this name.
        BadOptionError: A policy lacks a method.
    """

    def __new__(
        cls, pool_blocks: int, sessions: int = 4096, policies: Sequence[str | Policy | type[Policy]] | None = None
    ) -> Runtime: ...
    def workload(self, name: str, /) -> Workload:
        """The workload called ``name``, made if it is new; at most 64.

        Raises:
            OutOfRangeError: There are 64 others.
        """

    def score(
        self, blocks: NDArray[np.uint64] | Sequence[int], out: NDArray[np.float32] | None = None, /
    ) -> NDArray[np.float32]:
        """Hits per second that holding each block promises, as of the last ``act``; 0 where it is not resident.

        A block is never worth less than what hangs below it. Wait-free.

        Args:
            blocks: Keys, shape (n,), uint64.
            out: Where to write, shape (n,) or longer, float32; without it an array is made.

        Returns:
            ``out``, or a new array of shape (n,), float32.

        Raises:
            ArrayTypeError, ArrayValueError: An array is of the wrong dtype, shape or layout.
        """

    @overload
    def act(
        self, kind: Literal["evict"], n: int, out: NDArray[np.uint64] | None = None, time: float | None = None
    ) -> NDArray[np.uint64]: ...
    @overload
    def act(self, kind: Literal["prefetch"], n: int, out: None = None, time: float | None = None) -> list[Prefetch]:
        """Asks the policies to decide.

        ``"evict"``: keys of the ``n`` least valuable blocks, lowest first, children before parents; fewer where no more
        can go. They have left the index: evict them. Blocks of calls in flight are never named.

        ``"prefetch"``: at most ``n`` sessions whose agent's blocks may be worth bringing back, best first: the next two
        of the calls that wait or, where none does, those that are expected. Ask ``Session.worth_restoring`` with
        what the lower tier holds, and report what came back with ``Session.restored``.

        Args:
            kind: What is wanted.
            n: How many at most.
            out: Where to write keys, shape (n,) or longer, uint64; the answer is its beginning.
            time: Now, seconds of the same clock as the events; by default ``time.monotonic()``.

        Raises:
            BusyError: Another thread is in the pool.
            OutOfRangeError, BadTimeError, BadOptionError, ArrayTypeError, ArrayValueError: An argument is not usable.
        """

    def memory(self) -> dict[str, int]:
        """Bytes in use: ``state_bytes_per_workload``, ``index_bytes``, ``session_bytes``. May raise BusyError."""

    def repairs(self) -> dict[str, int]:
        """Oddities of the input that were repaired, by kind; see docs/api.md. May raise BusyError."""

    def stats(self) -> dict[str, int]:
        """Counts since the runtime was made; see docs/api.md. May raise BusyError."""

    @property
    def pool_blocks(self) -> int: ...
    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the active policies, in the order in which they are asked."""

@final
class Prefill:
    """A prefill wanted in idle capacity: leading blocks of an earlier call's prompt, for a call that is expected."""

    @property
    def workload(self) -> str: ...
    @property
    def session(self) -> int:
        """Key of the session that is expected to call, see ``Session.key``."""
    @property
    def agent(self) -> str:
        """Whom it is expected to call."""
    @property
    def agent_id(self) -> int: ...
    @property
    def like_call(self) -> int:
        """The earlier call. An engine that no longer has its prompt leaves the prefill out."""
    @property
    def blocks(self) -> int:
        """How many leading blocks of its prompt."""
    @property
    def probability(self) -> float:
        """P(the call comes and begins with them)."""

@final
class Scheduler:
    """Orders and holds the calls that wait in an engine, by the policies of a runtime.

    The engine tells what its scheduler does, beside the events of its sessions, and asks :meth:`order` whenever it is
    about to admit calls, :meth:`idle` when it has capacity to spare, and :meth:`gaps` while tools run. Call numbers are
    those of the sessions' events, unique among all calls in flight. Without a policy that orders (``"batch_shaping"``,
    ``"fairness"``, ``"agent_fairness"``, ``"tool_gap"``) the order is that of arrival.

    Args:
        runtime: Whose policies decide.
        block_tokens: Tokens in a block of the pool.
        without: What the engine cannot report, by the names in :attr:`needs`.

    Raises:
        AgentRTError: A policy needs what the engine cannot report; the message names both.
        OutOfRangeError, BadOptionError: An argument is not usable.
    """

    def __new__(cls, runtime: Runtime, block_tokens: int = 16, without: Sequence[str] = ()) -> Scheduler: ...
    @property
    def needs(self) -> tuple[str, ...]:
        """What the policies need the engine to report; the rest may be left out."""

    def prices(self) -> dict[str, dict[str, float]]:
        """What each policy has cost so far, in the order in which they are asked.

        ``questions`` counts :meth:`order`, :meth:`idle` and :meth:`gaps`; ``question_us`` is what one took in the mean,
        ``event_us`` what hearing of one event of a call took, by a sample of one report in sixteen. Microseconds.
        """

    def arrived(
        self,
        session: Session,
        agent: str | int,
        call: int,
        prompt_tokens: int,
        tenant: int | None = None,
        time: float | None = None,
    ) -> None:
        """A call begins to wait.

        Raises:
            OutOfRangeError, ArrayTypeError, BadTimeError: An argument is not usable.
        """

    def admitted(
        self,
        call: int,
        resident_tokens: int | None = None,
        host_tokens: int | None = None,
        again: bool = False,
        time: float | None = None,
    ) -> None:
        """A call that waited runs from now on; ``again`` after a preemption. Told after ``Session.call_start``."""

    def served(
        self,
        calls: NDArray[np.uint64] | Sequence[int],
        prefill_tokens: NDArray[np.uint32] | Sequence[int],
        decoded_tokens: NDArray[np.uint32] | Sequence[int],
        kv_token_us: NDArray[np.uint64] | Sequence[int] | None = None,
        repeated_tokens: NDArray[np.uint32] | Sequence[int] | None = None,
        time: float | None = None,
    ) -> None:
        """What running calls got since they were last told of; at the latest before they end.

        Args:
            calls: The calls.
            prefill_tokens: Prompt tokens computed for the first time.
            decoded_tokens: Tokens generated.
            kv_token_us: Tokens held in the pool, integrated over time, in token-microseconds.
            repeated_tokens: Tokens computed again after a preemption.
            time: Now, seconds.
        """

    def preempted(self, call: int, time: float | None = None) -> None:
        """A running call has lost its memory and waits again."""

    def withdrawn(self, call: int, time: float | None = None) -> None:
        """A waiting call is withdrawn and never runs."""

    def ended(self, call: int, time: float | None = None) -> None:
        """A call has ended and holds nothing any more. Told after ``Session.call_end``."""

    def order(
        self,
        calls: NDArray[np.uint64] | Sequence[int],
        resident_tokens: NDArray[np.uint32] | Sequence[int] | None = None,
        groups: NDArray[np.uint64] | Sequence[int] | None = None,
        *,
        host_tokens: NDArray[np.uint32] | Sequence[int] | None = None,
        running_calls: int,
        pinned_blocks: int,
        free_blocks: int,
        budget_tokens: int | None = None,
        prompt_blocks: int | None = None,
        hit_blocks: int | None = None,
        host_bytes_per_s: int | None = None,
        time: float | None = None,
    ) -> tuple[NDArray[np.uint32], NDArray[np.float64]]:
        """In which order to admit waiting calls, and which to pass over.

        Args:
            calls: The calls that wait, each told of by :meth:`arrived`.
            resident_tokens: Leading prompt tokens of each whose KV is on the device.
            groups: Key of the deepest resident block of each prompt, 0 if there is none.
            host_tokens: The tokens after the resident ones whose KV is in the host tier.
            running_calls: Calls that hold memory.
            pinned_blocks: Blocks that they use.
            free_blocks: Blocks that hold nothing.
            budget_tokens: Tokens that this step can still compute.
            prompt_blocks: Full prompt blocks of all calls admitted so far.
            hit_blocks: Of these, those that were resident.
            host_bytes_per_s: Speed of the link to the host tier.
            time: Now, seconds.

        Returns:
            Positions in ``calls``, first to admit first; and for each of ``calls`` the time until which it is passed
            over, 0 where it is not. Admit in this order and stop at the first that does not fit.

        Raises:
            OutOfRangeError, BadTimeError, ArrayTypeError, ArrayValueError: An argument is not usable.
        """

    def idle(
        self,
        n: int = 8,
        /,
        *,
        running_calls: int,
        pinned_blocks: int,
        free_blocks: int,
        budget_tokens: int,
        time: float | None = None,
    ) -> list[Prefill]:
        """What to prefill in capacity that is idle now, most wanted first. Do not ask while calls wait.

        An answer replaces the one before: what is under way and no longer named is cancelled. Of each, compute what is
        not resident, then report the whole chain with ``Session.restored``. Without the policy ``"speculation"``, or
        while it does not pay, there is nothing.

        Args:
            n: At most so many, up to 4,096.
            running_calls: Calls that hold memory.
            pinned_blocks: Blocks that they use.
            free_blocks: Blocks that hold nothing.
            budget_tokens: Tokens that this step can still compute.
            time: Now, seconds.

        Raises:
            OutOfRangeError, BadTimeError: An argument is not usable.
        """

    def gaps(
        self,
        sessions: Sequence[Session],
        agents: NDArray[np.uint32] | Sequence[int],
        tools: NDArray[np.uint32] | Sequence[int],
        started: Sequence[float],
        resident_tokens: NDArray[np.uint32] | Sequence[int],
        host_tokens: NDArray[np.uint32] | Sequence[int] | None = None,
        *,
        running_calls: int,
        pinned_blocks: int,
        free_blocks: int,
        host_bytes_per_s: int | None = None,
        time: float | None = None,
    ) -> tuple[list[Literal["undecided", "keep", "demote", "release"]], NDArray[np.float64]]:
        """What becomes of the blocks of sessions whose tool runs: ask when one starts, and when memory runs short.

        When blocks have to go, released ones go first, then undecided ones, and kept ones when nothing else is left:
        keeping can never deadlock. Demoted ones go to the host tier. Without ``"tool_gap"`` all are undecided.

        Args:
            sessions: Sessions whose tool runs: none of their calls waits or runs.
            agents: The agent of each that called the tool, by number.
            tools: The tool, from ``Workload.tool``; 0 where it is not known.
            started: Since when it runs, seconds.
            resident_tokens: Tokens of the session's last call that are on the device.
            host_tokens: Those that are in the host tier.
            running_calls: Calls that hold memory.
            pinned_blocks: Blocks that they use.
            free_blocks: Blocks that hold nothing.
            host_bytes_per_s: Speed of the link to the host tier; without one nothing is demoted.
            time: Now, seconds.

        Returns:
            What becomes of each; and when to begin to bring demoted blocks back, 0 for the rest.

        Raises:
            OutOfRangeError, BadTimeError, ArrayTypeError, ArrayValueError: An argument is not usable.
        """

@final
class Workload:
    """One application on one model: its agents and what was learned of them. From ``Runtime.workload``."""

    def session(self, name: str | int, /) -> Session:
        """The session called ``name``: a string, or an integer from 0 to 2^64 - 1. Costs nothing; keep it or not."""

    def agent(self, name: str, /) -> int:
        """The number of the agent called ``name``, given if it is new; at most 65,534.

        Raises:
            OutOfRangeError: There are 65,534 others.
        """

    def agent_name(self, agent: int, /) -> str:
        """The name of an agent; its number as text where it was never named."""

    def tool(self, name: str, /) -> int:
        """The number of the tool called ``name``, from 1, for ``TOOL_START`` events."""

    def observe(
        self,
        kinds: NDArray[np.uint8],
        sessions: NDArray[np.uint64],
        agents: NDArray[np.uint16],
        calls: NDArray[np.uint64],
        times_us: NDArray[np.uint64],
        offsets: NDArray[np.uint32] | None = None,
        blocks: NDArray[np.uint64] | None = None,
        /,
    ) -> int:
        """Feeds a batch of n events, one C-contiguous native array per field. All or nothing is applied, in order.

        Args:
            kinds: Codes of :class:`agentrt.EventKind`, shape (n,), uint8.
            sessions: ``Session.key``, or any 64-bit numbers, shape (n,), uint64.
            agents: ``Workload.agent(name)``; for tool events ``Workload.tool(name)``, shape (n,), uint16.
            calls: Any 64-bit numbers, unique among calls in flight, shape (n,), uint64.
            times_us: Microseconds of one monotonic clock, shape (n,), uint64. Backward steps count as "now".
            offsets: Where each event's keys start in ``blocks``, and the end, shape (n + 1,), uint32.
            blocks: Block keys, uint64. Without the last two no event has blocks.

        Returns:
            How many leading prompt blocks of the calls that started were resident.

        Raises:
            ArrayTypeError: An array is of the wrong type or dtype.
            ArrayValueError: An array is of the wrong length or layout, or has a kind or offset out of range.
            BusyError: There are blocks, and another thread is in the pool.

        Source: DESIGN of arXiv 2605.27744 ("observe").
        """

    def observe_one(
        self,
        kind: int,
        session: int,
        agent: int,
        call: int,
        time_us: int,
        blocks: NDArray[np.uint64] | None = None,
        /,
    ) -> int:
        """Feeds one event; as :meth:`observe` with one item per field."""

    def observe_lists(
        self,
        kinds: Sequence[int],
        sessions: Sequence[int],
        agents: Sequence[int],
        calls: Sequence[int],
        times_us: Sequence[int],
        blocks: Sequence[Sequence[int] | None] | None = None,
        /,
    ) -> int:
        """As :meth:`observe`, for callers that hold lists; ``blocks`` has a list of keys, or None, per event."""

    def predict_into(self, session: int, steps: int, out: NDArray[np.float32], /) -> int:
        """As ``Session.predict``, without making objects.

        Args:
            session: ``Session.key``.
            steps: How many calls ahead, 1 to 6.
            out: Rows (agent number, step, probability, median seconds), shape (m, 4), float32.

        Returns:
            How many rows were filled.
        """

    def state_bytes(self) -> int:
        """Bytes of learned state, at most 20,000 at any number of agents."""

    @property
    def name(self) -> str: ...

@final
class Session:
    """One workflow run. From ``Workload.session``.

    Times are seconds of one monotonic clock, by default ``time.monotonic()``. NaN, infinite and negative ones raise
    :class:`~agentrt.errors.BadTimeError`. ``call`` tells calls of one session apart that run at the same time; leave it
    out where there is only one: a new one ends the one before.
    """

    def call_queued(
        self,
        agent: str | int,
        blocks: NDArray[np.uint64] | Sequence[int],
        call: int | None = None,
        time: float | None = None,
    ) -> None:
        """A call of ``agent`` has arrived and waits in the engine's queue; ``blocks`` as for `call_start`.

        Optional, and the best knowledge there is: which blocks are needed, and nearly when. `call_start` follows under
        the same ``call``, or `call_end` if it is cancelled. At most 1,024 waiting calls are tracked.

        Raises:
            ValidationError: ``blocks`` is no array or sequence of keys; nothing happened.
            BusyError: another thread was in the pool; nothing happened.
        """

    def call_start(
        self,
        agent: str | int,
        blocks: NDArray[np.uint64] | Sequence[int],
        call: int | None = None,
        time: float | None = None,
    ) -> int:
        """The session calls ``agent``; ``blocks`` are the prompt's full blocks, root first.

        Returns:
            How many leading blocks are resident; they are pinned until the call ends.

        Raises:
            ArrayTypeError, ArrayValueError, OutOfRangeError, BadTimeError: An argument is not usable.
            BusyError: Another thread is in the pool.
        """

    def stored(
        self, blocks: NDArray[np.uint64] | Sequence[int], call: int | None = None, time: float | None = None
    ) -> None:
        """Further blocks of the call have entered the pool: those of the prompt that were not resident."""

    def call_end(
        self,
        output_blocks: NDArray[np.uint64] | Sequence[int] | None = None,
        call: int | None = None,
        time: float | None = None,
    ) -> None:
        """The call has ended; ``output_blocks`` are the answer's full blocks, following the prompt's."""

    def tool_start(self, tool: str | int, time: float | None = None) -> None:
        """A tool of the session starts: its usual duration tells when the session calls again."""

    def tool_end(self, time: float | None = None) -> None:
        """The session's tool has ended."""

    def end(self, time: float | None = None) -> None:
        """The session is over."""

    def worth_restoring(self, agent: str | int, blocks: NDArray[np.uint64] | Sequence[int]) -> bool:
        """Whether to bring back what the pool lacks of ``blocks``, for an agent that ``act("prefetch")`` has named.

        ``blocks`` is the chain from the root that the pool and the lower tier hold between them: of the waiting call's
        prompt, or of the agent's last one. Also where the answer is no it is watched what would have come of it,
        so ask for each; that is how the answer becomes yes.
        """

    def restored(self, agent: str | int, blocks: NDArray[np.uint64] | Sequence[int], time: float | None = None) -> None:
        """A lower tier has given back blocks of the agent's last prompt; ``blocks`` is the chain from the root."""

    def score_agents(
        self, agents: NDArray[np.uint16] | Sequence[str | int], horizon_s: float, time: float | None = None
    ) -> NDArray[np.float32]:
        """P(the session calls each agent within ``horizon_s`` seconds), shape (n,), float32; 0 for unknown sessions."""

    def predict(self, steps: int = 4, time: float | None = None) -> list[Prediction]:
        """The likeliest agents of the session's next ``steps`` (1 to 6) calls, by step, likeliest first.

        An unknown session gives none. Wait-free.
        """

    @property
    def known(self) -> bool:
        """Whether the session is in the table."""

    @property
    def key(self) -> int:
        """The 64-bit number that names it in arrays."""

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
    def predictability(self) -> float:
        """R = 1 - H(next agent | last agent) / H(next agent) within sessions; 0 with one agent."""

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
    strip_identity: bool = False,
    threads: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> str:
    """Replays traces under policies and returns the results as JSON; see ``agentrt.replay.run``."""

def explain(trace: Trace, *, order: str, sessions: int, seed: int, capacity: str, model: str) -> str:
    """Replays one trace under agentrt, LRU and MIN; see ``agentrt.replay.explain``."""

def policies() -> list[tuple[str, str]]: ...
def workloads() -> list[tuple[str, str, int]]: ...
def models() -> list[tuple[str, float]]: ...
def replay_flat(policy: str, keys: NDArray[np.uint32], capacity: int) -> NDArray[np.bool_]:
    """Replays a stream of single blocks under a policy; one flag per key, true where it was in the cache."""

# Simulator

def simulate(
    policy: str,
    *,
    seed: int = 0,
    runs: int = 5,
    cache: str = "lru",
    only: str = "",
    traces: os.PathLike[str] | None = None,
    threads: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> str:
    """Runs a policy and its baselines in all scenarios of the policy and returns the figures as JSON."""

def scenarios(policy: str, *, traces: os.PathLike[str] | None = None) -> list[tuple[str, str, list[str]]]:
    """Scenarios of a policy: (name, one line, baselines)."""

# Whose call it is

@final
class Identity:
    """Sessions and agents of calls that do not name them, inferred from their prompts' blocks.

    A call that walks on along the blocks of an earlier one is of its session; an agent is named by the system prompt
    that many sessions start with, 0 without. An agent with a system prompt of its own becomes a session of its own,
    unless its first prompt quotes an answer given in another one (:meth:`join`).
    Memory is bounded: so many blocks (an eighth of those of live conversations will do), conversations, and marks of
    answers (up to 32 each).

    Raises:
        OutOfRangeError: Sizes.
        BusyError: Another thread is inside; nothing has happened.
    """

    #: Agents with higher numbers are named by their place in a run, not by an anchor.
    anchors: int

    def __new__(cls, *, blocks: int = 65536, sessions: int = 4096, marks: int = 32768) -> Identity: ...
    def started(self, blocks: NDArray[np.uint64], /) -> tuple[int, int, int, bool]:
        """A call with these prompt blocks starts: (session, agent, call, whether the session is new)."""
    def ended(self, call: int, blocks: NDArray[np.uint64], /) -> None:
        """The call has ended; these are the full blocks of its answer. Until then its session has a call in flight."""
    def join(self, call: int, tokens: Sequence[int], /) -> tuple[int, int] | None:
        """Whose is a call that starts a session, if its prompt has these tokens (the last 16,384 count).

        Returns (session, agent), or None where it quotes no answer: it stays what it is.
        """
    def answered(self, call: int, tokens: Sequence[int], /) -> None:
        """The call's answer has these tokens; a first prompt that quotes some of them is of the same session."""
    def memory(self) -> int:
        """Bytes in use; none of it grows."""

# Transfer

def monotonic_us() -> int:
    """Microseconds of :func:`time.monotonic`, without asking the interpreter."""

def block_keys(hashes: list[bytes], start: int, stop: int, /) -> NDArray[np.uint64]:
    """Keys of ``hashes[start:stop]``: their last 8 bytes, the integers of vLLM's KV events.

    Raises:
        ArrayTypeError: ``hashes`` is no list.
        ArrayValueError: An item is no hash.
    """

@final
class FreeQueue:
    """vLLM's free queue: which block carries which key, which are named as victims; puts victims in place.

    For the vLLM adapter. One thread calls everything.

    Args:
        pool: vLLM's ``BlockPool``.
        source: Who names victims: a :class:`Runtime`, a callable ``(n, now_us) -> keys``, or None: the queue's order.
        batch: Blocks named at once beyond what is needed.

    Raises:
        AttributeError, ArrayTypeError, ArrayValueError: The pool is built otherwise than expected.
    """

    batch: int
    def __new__(
        cls, pool: object, source: Runtime | Callable[[int, int], Iterable[object]] | None, batch: int, /
    ) -> FreeQueue: ...
    @property
    def ranked_blocks(self) -> int:
        """Victims put in place so far."""

    @property
    def stale_blocks(self) -> int:
        """Victims named that were not there any more."""

    @property
    def duplicate_blocks(self) -> int:
        """Of the ranked ones, second copies of other blocks."""

    @property
    def short_rankings(self) -> int:
        """How often fewer victims were found than wanted."""

    @property
    def pending_blocks(self) -> int:
        """Blocks named and not allocated or hit since, as far as is known."""

    @property
    def known_blocks(self) -> int:
        """Keys whose block is known."""

    def clear(self) -> None:
        """The prefix cache has been reset."""

    def register(self, keys: NDArray[np.uint64], start: int, block_ids: list[int], /) -> NDArray[np.uint64] | None:
        """``block_ids[start:]`` carry ``keys`` from now on, blocks beyond the keys none.

        Returns:
            The keys that the engine has evicted by itself to make room for them, or None.
        """

    def prepare(self, n: int, now_us: int, spare: Sequence[int] | None = None, /) -> int:
        """Makes the next ``n`` allocations take blocks without a hash and victims.

        Args:
            n: Blocks about to be allocated.
            now_us: Now, microseconds.
            spare: Ids of blocks that are about to leave the queue because the arriving request hits them.

        Returns:
            How many victims were named.
        """

@final
class EngineCounts:
    """What has been seen of vLLM's requests, for logs, metrics and tests."""

    @property
    def requests(self) -> int:
        """Requests queued."""
    @property
    def finished(self) -> int:
        """Requests that are over."""
    @property
    def prompt_tokens(self) -> int:
        """Tokens of admitted prompts."""
    @property
    def hit_tokens(self) -> int:
        """Of these, found in the pool."""
    @property
    def resets(self) -> int:
        """Resets of the prefix cache."""
    @property
    def sessions_inferred(self) -> int:
        """Requests that named no session."""
    @property
    def agents_inferred(self) -> int:
        """Requests that named no agent."""
    @property
    def sessions_ended(self) -> int:
        """Times that a request said of a session that it is over."""
    @property
    def steps(self) -> int:
        """Steps scheduled."""
    @property
    def running(self) -> int:
        """Requests in the last step."""

@final
class EngineCall:
    """A request that vLLM holds."""

    @property
    def number(self) -> int: ...
    @property
    def session(self) -> int: ...
    @property
    def agent(self) -> int: ...
    @property
    def session_ends(self) -> bool: ...
    @property
    def session_inferred(self) -> bool: ...
    @property
    def agent_inferred(self) -> bool: ...
    @property
    def ended_sessions(self) -> list[int]:
        """Other sessions that are over since, as the request says; not those that still have a call here."""
    @property
    def arrived_us(self) -> int:
        """When the core was told of it."""
    @property
    def started_us(self) -> int: ...
    @property
    def hit(self) -> int:
        """Leading blocks that vLLM has found."""
    @property
    def allocated(self) -> bool: ...
    @property
    def keys(self) -> NDArray[np.uint64]:
        """Keys of the prompt's full blocks."""
    @property
    def output(self) -> NDArray[np.uint64]:
        """Keys of the answer's full blocks, once it is over."""
    @property
    def group(self) -> int:
        """Key of the deepest block that vLLM has found; 0 without one."""

@final
class EngineCalls:
    """The requests that vLLM holds, and what the core knows of them. For the vLLM adapter.

    One thread calls everything; times are microseconds.

    Args:
        pool: vLLM's ``BlockPool``.
        block_size: Tokens of a block.
        core: Who is told: a workload, any object with the methods of the adapter's ``Core``, or None.
        identities: The adapter's ``Identities``, asked where a request does not name session and agent plainly.
        queue: The free queue; None where the pool is built otherwise than expected.

    `ahead`: victims named ahead at most, by a thread that works each step off while the model runs; 0 (as made, and for
    cores and policies in Python): everything is done at once. `catch_up` before asking the runtime itself.
    """

    queue: FreeQueue | None
    acting: bool
    eager: bool
    on_reset: Callable[[], object] | None
    ahead: int
    def __new__(
        cls, pool: object, block_size: int, core: object, identities: object, queue: FreeQueue | None, /
    ) -> EngineCalls: ...
    @property
    def calls(self) -> dict[str, EngineCall]:
        """By request id."""
    @property
    def counts(self) -> EngineCounts: ...
    def catch_up(self) -> None:
        """Waits until the last step has been worked off."""
    def lose_thread(self) -> None:
        """Ends the thread that works steps off as a panic in it would, for tests."""
    @property
    def prefilling_calls(self) -> int:
        """Admitted calls whose prompts will take more blocks."""
    @property
    def arrived_calls(self) -> int:
        """Calls that arrived since the last step, whether the core has heard of them or not."""
    def new_request(self, request: object, now_us: int, /) -> EngineCall | None:
        """A request has been queued; None where it is known."""
    def asked(self, request: object, num_computed_tokens: int, now_us: int, /) -> EngineCall:
        """VLLM asks about a waiting request of which it has found so many tokens."""
    def before_allocation(self, request: object, num_computed_tokens: int, now_us: int, /) -> None:
        """Blocks for a waiting request are about to be allocated: the call starts, and victims are put in place."""
    def allocated(self, request: object, blocks: object, /) -> EngineCall | None:
        """A request has its blocks; returns its call the first time."""
    def step_ended(self, scheduler_output: object, now_us: int, /) -> None:
        """A step has been scheduled: prepares what running requests will take in the next one."""
    def finished(
        self, request: object, block_ids_by_group: Sequence[Sequence[int]], now_us: int, /
    ) -> EngineCall | None:
        """A request is over, one way or another; its blocks are freed next."""
    def register(self, keys: NDArray[np.uint64], block_ids: list[int], now_us: int, /) -> None:
        """``block_ids`` carry ``keys``; what vLLM has evicted for them by itself, the core hears of now."""
    def check_reset(self, now_us: int, /) -> None:
        """Notices a reset of vLLM's prefix cache."""
    def reset(self, now_us: int, /) -> None:
        """Forgets all blocks; what was learned stays."""
    def restart(self, now_us: int, /) -> None:
        """Starts over after a time without hooks: what was in flight may be gone."""

@final
class EngineHooks:
    """The hooks that vLLM calls, guarded: what goes wrong in one is counted and answered as if agentrt were not there.

    Where the adapter is ``plain`` and nobody asks for callers, a hook tells the adapter's ``held``, and nothing of it
    runs in Python; otherwise it calls the adapter's method (named behind each). Arguments that a hook does not know are
    left out; too few are a fault.

    Args:
        guard: The connector's ``Guard``.
        callers: Has ``wanted``: whether somebody asks whose request it is.
        slow_s: A hook that takes longer is a fault, seconds.
    """

    guard: Guard
    adapter: Adapter | None
    """Whom the hooks call. None, as made and while it is switched off: nobody."""
    def __new__(cls, guard: Guard, callers: Callers, slow_s: float, /) -> EngineHooks: ...
    def on_new_request(self, *arguments: object) -> None:
        """A request has been queued (``new_request``)."""
    def get_num_new_matched_tokens(self, *arguments: object) -> tuple[int | None, bool]:
        """Right before the allocation of a waiting request (``before_allocation``); nothing comes from outside."""
    def update_state_after_alloc(self, *arguments: object) -> None:
        """The request has its blocks (``allocated``)."""
    def step_ended(self, *arguments: object) -> None:
        """The step has been scheduled (``step_ended``)."""
    def has_pending_push_work(self, *arguments: object) -> bool:
        """Whether to make a step although no client waits (``pending``)."""
    def request_finished_all_groups(self, *arguments: object) -> tuple[bool, dict[str, Any] | None]:
        """The request is over; its blocks, one list a cache group, are freed next (``finished``)."""
    def panic_once(self) -> None:
        """The next hook panics, for tests."""

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
