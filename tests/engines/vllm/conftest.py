"""Skips where vLLM is not installed; `make test` does not need it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first import of vLLM takes 10 s on an idle machine and minutes on a busy one."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(600))


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
