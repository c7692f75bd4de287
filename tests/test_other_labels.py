"""Readings, and labels that were final before: which of them the network for people's masks gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from segqc.cli import main
from segqc.loop import training
from segqc.loop.dataset import Dataset, DatasetError
from segqc.loop.other_labels import with_observers, with_other_labels
from segqc.loop.readers import add_reading, make_consensus
from segqc.loop.requests import NETWORKS
from segqc.loop.submission import Opened, submit_label
from segqc.networks.card import NetworkName
from segqc.store import labels
from segqc.store.labels import FINAL, NewLabel
from segqc.training import NoProgress, TrainingSettings
from segqc.training.cases import Case
from segqc.types import LabelArray
from segqc.volumes import Volume, VolumeError, read_labels, write_labels
from tests.server_kit import add_models, draw_case, make_dataset
from tests.store_kit import ANNA, BERT


def shifted(index: int, by: int) -> Volume:
    truth = draw_case(index)[1]
    return Volume(np.roll(truth.array, by, axis=0), truth.affine)


def arrays(*files: Path) -> list[LabelArray]:
    return [np.asarray(read_labels(path).array, np.uint8) for path in files]


def cases_of(dataset: Dataset) -> dict[str, Case]:
    return {case.id: case for case in with_other_labels(dataset, dataset.cases())}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(make_dataset(tmp_path / "studies", scans=3, finals=2))


def test_persons_labels_that_were_final_before_are_earlier_ones(dataset: Dataset) -> None:
    assert all(case.earlier == () == case.observers for case in cases_of(dataset).values())
    for by in (1, 2, 1, 3):
        submit_label(dataset, "scan_0", shifted(0, by), "final", ANNA)
    submit_label(dataset, "scan_2", shifted(2, 1), "final", ANNA, opened=Opened((3, 4)))
    submit_label(dataset, "scan_2", shifted(2, 2), "final", ANNA)
    cases = cases_of(dataset)
    found = arrays(*(earlier.labels for earlier in cases["scan_0"].earlier))
    for label, by in zip(found, (0, 1, 2), strict=True):  # what was imported, and each content once
        np.testing.assert_array_equal(label, shifted(0, by).array)
    assert all(earlier.made_of is None for earlier in cases["scan_0"].earlier)
    assert cases["scan_1"].earlier == cases["scan_2"].earlier == (), "of the last, a part was checked"
    submit_label(dataset, "scan_0", shifted(0, 1), "final", BERT)
    found = arrays(*(earlier.labels for earlier in cases_of(dataset)["scan_0"].earlier))
    assert not any(np.array_equal(label, shifted(0, 1).array) for label in found), "it counts again"


def test_a_network_and_what_it_was_made_of_are_told_apart(dataset: Dataset, tmp_path: Path) -> None:
    add_models(dataset.folder)
    bundle = dataset.bundle()
    assert bundle is not None
    write_labels(shifted(2, 3), tmp_path / "mask.nii.gz")
    mask = dataset.save_mask("scan_2", tmp_path / "mask.nii.gz", bundle)
    for by in (1, 2):
        write_labels(shifted(2, by), tmp_path / "label.nii.gz")
        label = NewLabel("scan_2", FINAL, "annotator", ANNA, parent=mask.id)
        dataset.store.save_label(label, tmp_path / "label.nii.gz")
    (earlier,) = cases_of(dataset)["scan_2"].earlier
    assert earlier.made_of == dataset.store.label_file(mask)
    np.testing.assert_array_equal(*arrays(earlier.labels), shifted(2, 1).array)


def test_readers_are_observers_and_a_consensus_is_no_earlier_label(dataset: Dataset, tmp_path: Path) -> None:
    for actor, by in ((BERT, 2), (ANNA, 1)):
        write_labels(shifted(2, by), tmp_path / "reading.nii.gz")
        add_reading(dataset, "scan_2", tmp_path / "reading.nii.gz", actor)
    make_consensus(dataset, "scan_2", "majority", ANNA)
    make_consensus(dataset, "scan_2", "bert", ANNA)
    write_labels(shifted(0, 1), tmp_path / "part.nii.gz")
    in_part = NewLabel("scan_0", "reader-1", "annotator", ANNA, checked_slices=(1,))
    dataset.store.save_label(in_part, tmp_path / "part.nii.gz")
    with dataset.store.read() as transaction:
        assert labels.read_scans(transaction) == {"scan_0", "scan_2"}
        assert {scan: len(found) for scan, found in labels.readings_of_all(transaction).items()} == {
            "scan_0": 1,
            "scan_2": 2,
        }
    cases = cases_of(dataset)
    assert cases["scan_0"].observers == cases["scan_2"].earlier == ()
    for label, by in zip(arrays(*cases["scan_2"].observers), (2, 1), strict=True):
        np.testing.assert_array_equal(label, shifted(2, by).array)


def test_a_folder_of_another_observers_labels_is_checked_before_anything_trains(
    dataset: Dataset, tmp_path: Path
) -> None:
    theirs, cases = tmp_path / "theirs", list(cases_of(dataset).values())
    theirs.mkdir()
    with pytest.raises(DatasetError, match="theirs: no label file is named as a labelled scan"):
        with_observers(dataset, cases, theirs)
    write_labels(shifted(1, 1), theirs / "scan_1.nii.gz")
    first, second = with_observers(dataset, cases, theirs)
    assert first.observers == () and second.observers == (theirs / "scan_1.nii.gz",)
    write_labels(Volume(np.full_like(draw_case(0)[1].array, 7), draw_case(0)[1].affine), theirs / "scan_0.nii.gz")
    with pytest.raises(VolumeError, match=r"scan_0\.nii\.gz.* 7"):
        with_observers(dataset, cases, theirs)
    gone = [replace(case, labels=tmp_path / "gone.nii.gz") for case in cases]
    assert with_observers(dataset, gone, theirs), "the training says what is wrong with these"


class Given(Exception):
    """The cases that a training was given; it ends that."""


def end_with_cases(cases: list[Case], *_: object) -> None:
    raise Given(cases)


@pytest.mark.parametrize("network", NETWORKS)
def test_segqcs_training_takes_them_and_the_segmenters_does_not(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: NetworkName
) -> None:
    monkeypatch.setattr(training, "train_assessor", end_with_cases)
    monkeypatch.setattr(training, "train_segmentation", end_with_cases)
    submit_label(dataset, "scan_0", shifted(0, 1), "final", ANNA)
    write_labels(shifted(1, 1), tmp_path / "theirs" / "scan_1.nii.gz")
    is_segqc = network == "segqc"
    with pytest.raises(Given) as caught:
        training.train(dataset, network, NoProgress(), observers=tmp_path / "theirs" if is_segqc else None)
    first, second = caught.value.args[0]
    assert (len(first.earlier), len(second.observers)) == (is_segqc, is_segqc)


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        ("segmentation", None),
        ("segqc", TrainingSettings(people_epochs=0)),
        ("segqc", TrainingSettings().paper_recipe()),
    ],
)
def test_observers_of_a_training_without_a_network_for_peoples_masks_are_refused(
    dataset: Dataset, tmp_path: Path, network: NetworkName, settings: TrainingSettings | None
) -> None:
    with pytest.raises(DatasetError, match="none is trained by these settings"):
        training.train(dataset, network, NoProgress(), settings, observers=tmp_path)


def test_the_command_takes_a_folder_of_them(dataset: Dataset, tmp_path: Path) -> None:
    words = ["train", "segqc", str(dataset.folder), "--observers"]
    done = CliRunner().invoke(main.app, [*words, str(tmp_path / "none")])
    assert done.exit_code != 0 and "no such folder of another observer's label files" in str(done.exception)
    (tmp_path / "theirs").mkdir()
    done = CliRunner().invoke(main.app, [*words, str(tmp_path / "theirs")])
    assert done.exit_code != 0 and "no label file is named as a labelled scan" in str(done.exception)
