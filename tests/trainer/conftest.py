"""Fixtures of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.tiny_run import write_tiny_world


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, teacher and SAE that runs only read."""
    return write_tiny_world(tmp_path_factory.mktemp("tiny") / "world")
