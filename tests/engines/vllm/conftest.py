"""Skips where vLLM is not installed; `make test` does not need it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def vllm() -> None:
    """VLLM is importable; its own warnings are its own business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("vllm", reason="vLLM is not installed; see docs/engines/vllm.md")


@pytest.fixture(autouse=True)
def _foreign_warnings() -> Iterator[None]:
    """Imports inside vLLM and torch warn at any time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def learned(vllm: None) -> None:
    """Needs the runtime of the core."""
    import agentrt

    if not hasattr(agentrt, "Runtime"):
        pytest.skip("this build of agentrt has no Runtime")
