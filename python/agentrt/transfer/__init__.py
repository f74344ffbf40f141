"""Moves KV blocks between host and device memory, at the speed of the link where the hardware allows.

    pool      BlockPool            where the blocks of a pool lie, and which are in flight
    plan      CopyPlan             checks once, then copies batches of (source, destination) blocks; `prefetch` by layer
    handle    CopyHandle           event, wait, done, bytes, GB/s of one copy; HostStream for machines without a GPU
    prefetch  PrefetchExecutor     a policy's prefetch decisions within a byte-per-second budget, cancellable
    calibration  calibrate         which backend is fastest here, measured once and saved
    simulated SimulatedDriver      a device made of host memory, for tests and dry runs

Importing this package needs NumPy alone: the CUDA driver, torch and triton are looked for when a plan needs them.
A guide with drawings is in docs/transfer.md, the device code in `agentrt.kernels`.
"""

from agentrt.transfer.calibration import Calibration, calibrate, load_calibration
from agentrt.transfer.errors import (
    BackendUnavailableError,
    CopyFaultError,
    DriverError,
    InFlightError,
    PairError,
    PoolError,
    TornBlockError,
    TransferError,
)
from agentrt.transfer.handle import CopyHandle, HostStream
from agentrt.transfer.plan import CopyPlan, GraphCopy
from agentrt.transfer.pool import BlockPool, Int8Encoding, Space
from agentrt.transfer.prefetch import Failure, PrefetchExecutor, StepReport, TokenBucket
from agentrt.transfer.simulated import SimulatedDriver

__all__ = [
    "BackendUnavailableError",
    "BlockPool",
    "Calibration",
    "CopyFaultError",
    "CopyHandle",
    "CopyPlan",
    "DriverError",
    "Failure",
    "GraphCopy",
    "HostStream",
    "InFlightError",
    "Int8Encoding",
    "PairError",
    "PoolError",
    "PrefetchExecutor",
    "SimulatedDriver",
    "Space",
    "StepReport",
    "TokenBucket",
    "TornBlockError",
    "TransferError",
    "calibrate",
    "load_calibration",
]
