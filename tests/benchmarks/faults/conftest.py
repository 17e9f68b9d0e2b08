"""A lab for the tests of single faults."""

from __future__ import annotations

import pytest

from benchmarks.faults.lab import Lab
from benchmarks.faults.report import Trials


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """One tiny world and its undisturbed runs for all tests."""
    return Lab(tmp_path_factory.mktemp("lab"), kills=1, seed=0)


@pytest.fixture
def trials() -> Trials:
    return Trials("fault", print)
