"""The check of what people submit: its sentence, and what is kept of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segqc.loop import error_maps
from segqc.loop.checking import NotCheckedError, check_label
from segqc.loop.dataset import Dataset
from segqc.loop.history import versions
from segqc.loop.scoring import MaskOrigin, assess_scan, error_map, origin_of
from segqc.networks.assessor import Assessor
from segqc.quality.boxes import BoxSettings, find_boxes
from segqc.quality.likely_errors import LikelyError, likely_errors, sentence
from segqc.store import assessments, labels, scans
from segqc.store.labels import NewLabel
from segqc.store.records import Actor, LabelRecord
from segqc.types import ErrorBox
from segqc.volumes import Volume, temporary_labels
from tests.server_kit import (
    CHECKED,
    add_models,
    knowing_the_truth,
    make_assessment,
    make_dataset,
    without_liver,
)
from tests.store_kit import bundle as store_bundle

PERSON = Actor(kind="person", name="anna", identified_by="client-id")
NETWORK = Actor(kind="network", name="seg", identified_by="program")


def box(index: int, share: float | None, area: float = 100.0) -> ErrorBox:
    return ErrorBox(index, (0, 0), (10, 10), area, 0.8, 0.9, share)


def told(*boxes: ErrorBox, volume_ml: float = 5.0, slices: tuple[int, ...] | None = None) -> str:
    made = make_assessment("scan", 0.8)
    quality = made.structures[0]
    structures = (replace(quality, mask_volume_ml=volume_ml, raw=replace(quality.raw, boxes=boxes)),)
    return sentence(likely_errors(replace(made, structures=structures), slices))


@pytest.mark.parametrize(
    ("boxes", "volume_ml", "wanted"),
    [
        ((), 5.0, "Nothing found."),
        ((box(11, 0.0), box(12, 0.2)), 5.0, "Look again at slices 11 and 12: part of the liver seems to be missing."),
        ((box(2, 0.0),), 0.0, "Look again at slice 2: the liver seems to be missing."),
        ((box(2, 0.9),), 5.0, "Look again at slice 2: something else seems to be marked as liver."),
        (
            (box(7, 1.0, area=50.0), *(box(i, 0.1) for i in (0, 1, 2, 5))),
            5.0,
            "Look again at slices 0 to 2 and 5: part of the liver seems to be missing; at slice 7: something else "
            "seems to be marked as liver.",
        ),
    ],
)
def test_the_sentence_says_where_and_what(boxes: tuple[ErrorBox, ...], volume_ml: float, wanted: str) -> None:
    assert told(*boxes, volume_ml=volume_ml) == wanted


def test_only_slices_that_were_looked_at_count() -> None:
    assert told(box(2, 0.0), box(7, 0.0), slices=(7, 8)).startswith("Look again at slice 7:")
    assert told(box(2, 0.0), slices=()) == "Nothing found."


def test_a_sentence_names_three_likely_errors_at_most() -> None:
    errors = [LikelyError(f"part {i}", "part missing", (i,), 1.0) for i in range(4)]
    assert sentence(errors[:3]).count("seems to be missing") == 3
    assert sentence(errors).count("seems to be missing") == 3
    assert sentence(errors).endswith("; and there is more.")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_box_knows_how_much_of_its_error_lies_in_the_mask(axis: int) -> None:
    error, mask = np.zeros((4, 30, 30), np.float32), np.zeros((4, 30, 30), bool)
    error[1, 2:8, 2:8] = error[2, 12:18, 2:8] = 0.9
    mask[1, 2:8, 2:8] = mask[2, 12:14, 2:8] = mask[2, 20:28] = True
    error, mask = np.moveaxis(error, 0, axis), np.moveaxis(mask, 0, axis)
    settings = BoxSettings(min_area_mm2=0.0)
    assert [b.mask_share for b in find_boxes(error, axis, (1, 1, 1), settings, mask=mask)] == pytest.approx(
        [1.0, 1 / 3]
    )
    assert [b.mask_share for b in find_boxes(error, axis, (1, 1, 1), settings)] == [None, None]


# ------------------------------------------------------------------------------------------------------- in a folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "scans", scans=3, finals=0, config=CHECKED)


def keep(dataset: Dataset, label: Volume, source: str = "annotator", tag: str = "final", **more: Any) -> LabelRecord:
    actor = PERSON if source in ("annotator", "restored") else NETWORK
    new = NewLabel("scan_0", tag, source, actor, **more)  # type: ignore[arg-type]
    with temporary_labels(label) as path:
        return dataset.store.save_label(new, path)


def test_a_check_is_kept_with_its_bundle_and_ranks_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = add_models(folder, people=True)
    knowing_the_truth(monkeypatch)
    dataset = Dataset(folder)
    label, bundle = keep(dataset, without_liver()), dataset.bundle()
    assert bundle is not None
    check = check_label(dataset, label, bundle)
    assert check.sentence == "Look again at slices 4 and 5: part of the liver seems to be missing."
    assert check.assessment.mask_kind == "person"
    assert check.bundle == number
    with dataset.store.read() as transaction:
        (summary,) = versions(transaction, "scan_0")
        assert scans.get(transaction, "scan_0").ranking_dice is None
    assert summary.check == check


def test_only_people_are_checked_and_only_by_a_network_for_that(folder: Path) -> None:
    add_models(folder)
    dataset = Dataset(folder)
    bundle = dataset.bundle()
    assert bundle is not None
    with pytest.raises(NotCheckedError, match="was not trained to judge people's masks"):
        check_label(dataset, keep(dataset, without_liver()), bundle)
    with pytest.raises(NotCheckedError, match="network's"):
        check_label(dataset, keep(dataset, without_liver(), "network", "original", bundle=bundle.number), bundle)


def test_the_store_knows_who_made_a_version(folder: Path) -> None:
    dataset = Dataset(folder)
    number = store_bundle(dataset.store, "seg", "qc").id
    made = {
        "person": [keep(dataset, without_liver()), keep(dataset, without_liver(), "import")],
        "network": [
            keep(dataset, without_liver(), "network", "original", bundle=number),
            keep(dataset, without_liver(), "import", "original"),
            keep(dataset, without_liver(), "pseudo-label", "pseudo-label", bundle=number),
        ],
    }
    for source, kept in made.items():
        restored = [dataset.store.restore_label(label.id, PERSON, f"version_{label.id}") for label in kept]
        with dataset.store.read() as transaction:
            found = {labels.mask_source(transaction, label) for label in [*kept, *restored]}
        assert found == {source}


def judged_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the error maps of networks for people's masks be 0.1 everywhere, and those of others 0.4."""

    def error_maps(assessor: Assessor, scan: Volume, masks: np.ndarray, plausible: object) -> object:
        whole = tuple(slice(0, size) for size in scan.shape)
        return np.full(masks.shape, 0.1 if assessor.card.plan.mask_skip else 0.4, np.float32), whole

    monkeypatch.setattr(Assessor, "_error_maps", error_maps)


def corrected(mask: Volume, *slices: int) -> Volume:
    """A label map with another voxel in some slices."""
    array = mask.array.copy()
    corner = array[0, 0, list(slices)]
    array[0, 0, list(slices)] = np.where(corner == 1, 0, 1)
    return Volume(array, mask.affine)


def test_each_slice_is_checked_by_who_made_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_models(folder, people=True)
    judged_slices(monkeypatch)
    dataset = Dataset(folder)
    bundle = dataset.bundle()
    assert bundle is not None
    scan = dataset.read_scan(dataset.scan("scan_0"))
    served = bundle.segmenter().predict(scan).labels
    count = served.shape[2]
    mask = keep(dataset, served, "network", "original", bundle=bundle.number)
    assess_scan(dataset, dataset.scan("scan_0"), bundle)
    with dataset.store.read() as transaction:
        of_network = assessments.of_bundle(transaction, mask.id, bundle.number)
    unchanged = keep(dataset, served, parent=mask.id)
    check = check_label(dataset, unchanged, bundle).assessment
    assert of_network is not None and of_network.mask_kind == "served"
    assert check == replace(of_network, mask_kind="person", segmenter_version=None)

    def by_network(label: LabelRecord) -> list[int]:
        origin = origin_of(dataset, label, scan)
        assert origin.segmenter_version == (bundle.segmenter().version if origin.network_slices else None)
        check_label(dataset, label, bundle)
        maps = error_maps.read(dataset, label.id, bundle.number)
        assert maps is not None
        found = np.flatnonzero((maps[0] / error_maps.CERTAIN).mean(axis=(0, 1)) > 0.2).tolist()
        assert found == list(origin.network_slices)
        return found

    first = keep(dataset, corrected(served, 0, 1, 2), parent=mask.id)
    assert by_network(first) == list(range(3, count))
    second = keep(dataset, corrected(served, 0, 1, 2, 5), parent=first.id)
    assert by_network(second) == [i for i in range(3, count) if i != 5]
    back = dataset.store.restore_label(first.id, PERSON)
    assert by_network(back) == list(range(3, count))
    assert by_network(keep(dataset, corrected(served, *range(count)), parent=back.id)) == []
    # a label of which nobody knows what it was made of is a person's, whatever it holds
    assert by_network(keep(dataset, served, tag="version_1")) == []
    assert by_network(keep(dataset, served, "import", tag="version_2")) == []


def test_a_label_made_of_nothing_of_a_network_is_a_persons(folder: Path) -> None:
    dataset = Dataset(folder)
    mine = keep(dataset, without_liver(), tag="version_1")
    foreign = keep(dataset, without_liver(), "import", "original")
    scan = dataset.read_scan(dataset.scan("scan_0"))
    assert origin_of(dataset, keep(dataset, without_liver(), parent=mine.id), scan) == MaskOrigin("person")
    slices = tuple(range(without_liver().shape[2]))
    of_foreign = keep(dataset, without_liver(), tag="version_2", parent=foreign.id)
    assert origin_of(dataset, of_foreign, scan) == MaskOrigin("person", None, slices)


def test_the_error_map_of_a_persons_label_is_by_the_network_for_people(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_models(folder, people=True)
    dataset = Dataset(folder)
    bundle = dataset.bundle()
    assert bundle is not None
    assessor, asked = bundle.assessor(), []
    whole = tuple(slice(0, size) for size in without_liver().shape)
    monkeypatch.setattr(
        Assessor,
        "_error_maps",
        lambda self, scan, masks, plausible: (asked.append(self), (np.zeros(masks.shape, np.float32), whole))[1],
    )
    with dataset.store.read() as transaction:
        scan = scans.get(transaction, "scan_0")
    error_map(dataset, scan, keep(dataset, without_liver()), bundle)
    error_map(dataset, scan, keep(dataset, without_liver(), "network", "original", bundle=bundle.number), bundle)
    assert asked == [assessor.people, assessor]
