"""On a GPU: trainings are the same every time, go on elsewhere, and answers are the CPU's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from segqc.evaluation.methods.autoencoder import train_autoencoder
from segqc.evaluation.methods.map_and_score import train_map_and_score
from segqc.evaluation.methods.maps import train_scan_only
from segqc.evaluation.methods.regression import train_regression
from segqc.networks import model as models
from segqc.networks.assessor import Assessor
from segqc.networks.segmenter import Segmenter
from segqc.training import NoProgress, TrainingSettings
from segqc.training import engine as training_fit
from segqc.training.assessor import train_assessor
from segqc.training.cases import Case, read_case
from segqc.training.crossfit import MaskSet, mean_dice
from segqc.training.segmentation import train_segmentation
from segqc.types import Structure
from segqc.volumes import Volume, read_scan, write_labels, write_scan
from tests.test_training import KillAt, KilledError, placed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

STRUCTURES = (Structure("inner", (1,)), Structure("outer", (2,)))
SHORT = TrainingSettings(
    epochs=3,
    fold_epochs=2,
    people_epochs=2,
    steps_per_epoch=4,
    folds=2,
    patch=(48, 40, 16),
    ensemble=False,
    min_cases=3,
)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Balls in balls, in noise: large enough that a GPU adds up in many blocks."""
    folder = tmp_path_factory.mktemp("cases")
    grid = np.stack(np.meshgrid(np.arange(48), np.arange(40), np.arange(16), indexing="ij"), axis=-1)
    found = []
    for i in range(6):
        rng = np.random.default_rng(i)
        centre, radius = rng.uniform((20, 16, 6), (28, 24, 10)), rng.uniform(6, 9)
        distance = np.sqrt((((grid - centre) * (1, 1, 2)) ** 2).sum(axis=-1))
        truth = np.where(distance < radius, 1, np.where(distance < radius + 5, 2, 0)).astype(np.uint8)
        scan = (rng.normal(size=truth.shape) + 2 * truth).astype(np.float32)
        case = Case(f"c{i}", f"p{i}", folder / f"c{i}.nii.gz", folder / f"c{i}-labels.nii.gz")
        write_scan(Volume(scan, np.diag([1.0, 1.0, 2.0, 1.0])), case.scan)
        write_labels(Volume(truth, np.diag([1.0, 1.0, 2.0, 1.0])), case.labels)
        found.append(case)
    return found


def mask_sets(cases: Sequence[Case]) -> list[MaskSet]:
    sets = []
    for case in cases:
        _, truth = read_case(case, (1, 2))
        good = np.asarray(truth.array)
        masks = np.stack([good, np.roll(good, 3, axis=0), np.roll(good, 5, axis=1)])
        sets.append(MaskSet(case, masks, tuple(mean_dice(m, truth.array, STRUCTURES) for m in masks)))
    return sets


def segmentation(cases: Sequence[Case], settings: TrainingSettings, folder: Path) -> None:
    train_segmentation(cases, STRUCTURES, placed(cases), settings, folder, NoProgress())


def of_masks(train: Callable[..., object]) -> Callable[[Sequence[Case], TrainingSettings, Path], None]:
    def run(cases: Sequence[Case], settings: TrainingSettings, folder: Path) -> None:
        train(mask_sets(cases), STRUCTURES, placed(cases), settings, folder, NoProgress())

    return run


def assessor(cases: Sequence[Case], settings: TrainingSettings, folder: Path) -> None:
    train_assessor(cases, STRUCTURES, placed(cases), settings, folder, NoProgress())


def by_dice(cases: Sequence[Case], settings: TrainingSettings, folder: Path) -> None:
    assessor(cases, settings.paper_recipe(), folder)


TRAININGS: dict[str, Callable[[Sequence[Case], TrainingSettings, Path], None]] = {
    "segmentation": segmentation,
    "segqc": assessor,
    "the paper's": by_dice,
    "regression": of_masks(train_regression),
    "map and score": of_masks(train_map_and_score),
    "autoencoder": of_masks(train_autoencoder),
    "scan only": of_masks(train_scan_only),
}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The last weights of all trainings in a folder."""
    found = {}
    for path in sorted(folder.rglob("checkpoint.pt")):
        state = torch.load(path, map_location="cpu", weights_only=True)["network"]
        found |= {f"{path.relative_to(folder)} {name}": tensor for name, tensor in state.items()}
    return found


@pytest.mark.parametrize("name", TRAININGS)
def test_two_trainings_of_one_seed_have_the_same_weights(name: str, cases: list[Case], tmp_path: Path) -> None:
    for folder in ("one", "two"):
        TRAININGS[name](cases, SHORT, tmp_path / folder)
    one, two = weights_in(tmp_path / "one"), weights_in(tmp_path / "two")
    assert one and one.keys() == two.keys()
    assert not [key for key in one if not torch.equal(one[key], two[key])]


def test_a_training_begun_on_a_gpu_goes_on_without_one(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(progress: KillAt) -> Segmenter:
        return train_segmentation(cases, STRUCTURES, placed(cases), SHORT, tmp_path, progress)

    with pytest.raises(KilledError):
        train(KillAt(6, "segmentation"))
    monkeypatch.setattr(training_fit, "device_of_choice", lambda: torch.device("cpu"))
    rest = KillAt(-1, "segmentation")
    train(rest)
    assert rest.seen == 8
    assert len(json.loads((tmp_path / "curve.json").read_text())) == 3


def test_a_model_answers_as_on_a_cpu(cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SHORT, epochs=8, steps_per_epoch=10, average_flips=True, hide_mask=True)
    train_segmentation(cases, STRUCTURES, placed(cases), settings, tmp_path / "s", NoProgress()).save(tmp_path / "s.pt")
    train_assessor(cases, STRUCTURES, placed(cases), settings, tmp_path / "a", NoProgress()).save(tmp_path / "a.pt")
    scan = read_scan(cases[0].scan)
    answers = []
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(models, "device_of_choice", lambda device=device: torch.device(device))
        segmenter, model = Segmenter.load(tmp_path / "s.pt"), Assessor.load(tmp_path / "a.pt")
        assert segmenter.device.type == model.device.type == device
        if not answers:
            mask = segmenter.predict(scan).labels
        answers.append((segmenter.predict(scan), model.assess(scan, mask, scan_id="c0"), model.version))
    (made, judged, version), (made_there, judged_there, version_there) = answers
    assert version == version_there
    assert np.mean(made.labels.array != made_there.labels.array) < 1e-3
    assert np.abs(judged.errors - judged_there.errors).max() < 0.01
    for one, other in zip(judged.assessment.structures, judged_there.assessment.structures, strict=True):
        assert one.estimated.dice == pytest.approx(other.estimated.dice, abs=1e-3)
