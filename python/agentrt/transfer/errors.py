"""Errors of `agentrt.transfer`. Unless a class says otherwise, nothing has moved when it is raised."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentrt.errors import AgentRTError

if TYPE_CHECKING:
    from collections.abc import Sequence


class TransferError(AgentRTError):
    """Base of every error of `agentrt.transfer`."""


class PoolError(TransferError, ValueError):
    """A pool or a pair of pools is described inconsistently."""


class PairError(TransferError, ValueError):
    """A list of (source block, destination block) pairs is unusable. `blocks` holds the offending ids."""

    def __init__(self, message: str, blocks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.blocks = tuple(int(block) for block in blocks)


class InFlightError(PairError):
    """A block is still being read or written by an earlier copy that this one is not ordered behind."""


class TornBlockError(PairError):
    """A source block was the destination of a copy that failed, so its bytes are undefined."""


class BackendUnavailableError(TransferError, RuntimeError):
    """The backend asked for by name cannot serve this copy; the message says why."""


class DriverError(TransferError, RuntimeError):
    """A call of the CUDA driver failed. `code` is its result code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class CopyFaultError(TransferError, RuntimeError):
    """A copy failed after it may have begun. `blocks` are its destination blocks: undefined until they are rewritten.

    Sources and every other block are untouched, and nothing of the failed copy is in flight any more.
    """

    def __init__(self, message: str, blocks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.blocks = tuple(int(block) for block in blocks)
