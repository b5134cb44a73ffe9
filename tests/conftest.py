"""Fixtures that several test files share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import build_tiny


@dataclass(frozen=True)
class TinyModels:
    """Folders in the official layout. Shared by the whole session: a test that edits one copies it first."""

    t2v: Path
    i2v: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    root = tmp_path_factory.mktemp("tiny")
    return TinyModels(t2v=build_tiny(root / "t2v", "t2v"), i2v=build_tiny(root / "i2v", "i2v", seed=10))
