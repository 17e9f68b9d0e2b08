"""Which documents are for validation is fixed for ever."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from data.split import HashSplit, HuggingFaceSplit


def rows_of(split: HuggingFaceSplit, num_rows: int) -> list[int]:
    """Return the validation rows in the order of their places."""
    places = {split.place(row, 0): row for row in range(num_rows)}
    places.pop(None)
    assert sorted(places) == list(range(len(places)))
    return [places[place] for place in range(len(places))]


def test_split_of_openwebtext() -> None:
    """Catches a NumPy whose permutation changed, or another rounding: these are datasets' own rows.

    Made by ``train_test_split(test_size=0.0005, seed=2357, shuffle=True)`` of datasets 4.7.0, NumPy 2.4.6.
    """
    rows = rows_of(HuggingFaceSplit(2357, 0.0005, 8_013_769), 8_013_769)
    assert len(rows) == 4007  # and 8,009,762 for training
    assert rows[:6] == [4327249, 4286500, 2184614, 4793011, 1709068, 2210533]
    assert rows[-3:] == [6546526, 4897055, 2048232]
    digest = hashlib.sha256(np.array(rows, dtype="<i8").tobytes()).hexdigest()
    assert digest == "df00c240445075043bc15359133182a5a0d4e241fbff007f3664c958a9e4997e"


def test_small_splits_are_datasets_own() -> None:
    """Catches a number of rows that is rounded down."""
    assert rows_of(HuggingFaceSplit(2357, 0.0005, 1000), 1000) == [388]
    assert rows_of(HuggingFaceSplit(2357, 0.0005, 12345), 12345) == [10591, 984, 2321, 5687, 457, 10469, 9208]
    wanted = [388, 151, 457, 984, 2, 430, 579, 824, 983, 969]
    assert rows_of(HuggingFaceSplit(2357, 0.01, 1000), 1000) == wanted


@pytest.mark.parametrize(("rows", "fraction", "seed"), [(1001, 0.1, 0), (997, 0.0005, 2357), (64, 0.5, 7)])
def test_same_rows_as_the_library(rows: int, fraction: float, seed: int) -> None:
    """Catches a library that draws its split in another way than when the literals above were made."""
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"row": list(range(rows))})
    wanted = dataset.train_test_split(test_size=fraction, seed=seed, shuffle=True)["test"]["row"]
    assert rows_of(HuggingFaceSplit(seed, fraction, rows), rows) == list(wanted)


def test_hash_split_is_fixed_and_grows_with_the_corpus() -> None:
    """Catches a split that changes between releases, or when documents are appended to a corpus."""
    split = HashSplit(2357, 0.05)
    chosen = [number for number in range(200) if split.place(0, number) is not None]
    assert chosen == [12, 41, 133, 144, 162]
    assert [split.place(row, 12) for row in (0, 99)] == [12, 12]
