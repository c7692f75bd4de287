"""The kept error maps: what is read is what was written, and old or damaged ones are no hindrance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segqc.loop import error_maps
from segqc.loop.dataset import Dataset
from segqc.loop.scoring import assess_scan, error_map
from segqc.store import scans
from tests.server_kit import SHAPE, add_models, make_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(make_dataset(tmp_path / "data", scans=2))


@pytest.mark.parametrize("marked", [[], [(0, 0, 0)], [(3, 4, 5), (9, 2, 7)], [(31, 27, 9)]])
def test_a_map_comes_back_as_it_was(dataset: Dataset, marked: list[tuple[int, int, int]]) -> None:
    errors = np.zeros((2, *SHAPE), np.uint8)
    for number, voxel in enumerate(marked, 1):
        errors[(number % 2, *voxel)] = number
    error_maps.write(dataset, 7, 1, errors)
    found = error_maps.read(dataset, 7, 1)
    assert found is not None
    np.testing.assert_array_equal(found, errors)
    assert error_maps.read(dataset, 8, 1) is None


def test_maps_of_the_last_two_bundles_are_kept(dataset: Dataset) -> None:
    for bundle in (1, 2, 10):
        error_maps.write(dataset, 1, bundle, np.zeros((2, *SHAPE), np.uint8))
    assert [error_maps.read(dataset, 1, bundle) is not None for bundle in (1, 2, 10)] == [False, True, True]


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04"])
def test_a_damaged_file_is_as_good_as_none(dataset: Dataset, content: bytes) -> None:
    error_maps.write(dataset, 1, 1, np.zeros((2, *SHAPE), np.uint8))
    error_maps.path_of(dataset, 1, 1).write_bytes(content)
    assert error_maps.read(dataset, 1, 1) is None


def test_scoring_keeps_the_map_that_the_estimate_was_read_from(dataset: Dataset) -> None:
    add_models(dataset.folder)
    bundle, entry = dataset.bundle(), dataset.scan("scan_1")
    assert bundle is not None
    result = assess_scan(dataset, entry, bundle)
    label = dataset.mask("scan_1")
    assert label is not None
    kept = error_maps.read(dataset, label.id, bundle.number)
    assert kept is not None
    np.testing.assert_allclose(kept / 255, result.errors, atol=0.5 / 255 + 1e-6)
    error_maps.path_of(dataset, label.id, bundle.number).unlink()
    with dataset.store.read() as transaction:
        record = scans.get(transaction, "scan_1")
    np.testing.assert_array_equal(error_map(dataset, record, label, bundle), kept.max(axis=0))
    assert error_maps.read(dataset, label.id, bundle.number) is not None
