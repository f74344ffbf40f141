"""Keeps the user's cache out of the tests, and tests out of the user's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AGENTRT_CALIBRATION", raising=False)
