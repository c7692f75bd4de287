"""Pictures of the worst misses: the right masks, the right words, and never in the repository."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import matplotlib.image
import numpy as np
import pytest

from segqc.loop.dataset import Dataset
from segqc.loop.scoring import score
from segqc.training import NoProgress
from segqc.types import PredictionInterval
from segqc.volumes import write_labels
from tests.server_kit import add_models, draw_case, make_dataset
from tests.test_served import BENCHMARKS


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("served_pictures")


def test_the_worst_misses_are_drawn(pictures: ModuleType, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "s", scans=4, finals=0)
    add_models(folder)
    dataset = Dataset(folder)
    score(dataset, "segqc", NoProgress())
    pool = []
    for i in range(4):
        name = f"scan_{i}"
        write_labels(draw_case(i)[1], folder / "truth" / f"{name}.nii.gz")
        pool.append(pictures.HarderScan(name, name, "train", "seen" if i else "unseen"))
    misses = pictures.worst_misses(dataset, pool, 3)
    assert len(misses) == 3
    everything = pictures.worst_misses(dataset, pool)
    errors = [abs(m.assessment.dice - min(m.true)) for m in everything]
    assert [abs(m.error) for m in everything] == errors == sorted(errors, reverse=True)
    assert misses == everything[:3]
    miss = misses[0]
    assert miss.words.splitlines()[0] == miss.scan
    assert f"true {miss.true[0]:.2f}" in miss.words and "no interval" in miss.words

    path = tmp_path / "out" / "misses.png"
    pictures.draw(dataset, misses, "a test", path)
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape[0] > 3 * 200
    assert (np.abs(image - image.mean(axis=2, keepdims=True)) > 0.2).any(), "contours and errors have colours"


def test_an_interval_that_does_not_hold_is_said_to(pictures: ModuleType) -> None:
    interval = PredictionInterval(0.5, 0.7, 0.9)
    assert pictures._interval(interval, 0.6) == "interval 0.50-0.70"
    assert pictures._interval(interval, 0.8) == "interval 0.50-0.70, does not hold"


def test_no_picture_is_written_into_the_repository(
    pictures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = BENCHMARKS / "pictures"
    arguments = ["served_pictures", "phantoms-hard", "--label", "x", "--work", str(tmp_path), "--out"]
    monkeypatch.setattr(sys, "argv", [*arguments, str(inside)])
    with pytest.raises(SystemExit, match="lies in the repository"):
        pictures.main()
    assert not inside.exists()
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="no such folder"):
        pictures.main()
