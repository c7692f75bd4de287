from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from segqc.loop.studies import Studies
from strategies import ForegroundRandom, Sequential, UniformRandom, WorstEstimateFirst
from tests.server_kit import make_assessment, make_studies


class Scans:
    """The part of MONAI Label's datastore that strategies ask."""

    def __init__(self, folder: Path, open_scans: list[str]) -> None:
        self.folder = folder
        self.open_scans = open_scans

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        return list(self.open_scans)

    def get_label_uri(self, label: str, tag: str) -> str:
        path = self.folder / "labels" / tag / f"{label}.nii.gz"
        return str(path) if path.is_file() else ""


@pytest.fixture
def studies(tmp_path: Path) -> Studies:
    return Studies(make_studies(tmp_path / "studies", scans=4, finals=0))


@pytest.fixture
def scans(studies: Studies) -> Scans:
    return Scans(studies.folder, ["scan_3", "scan_1", "scan_0", "scan_2"])


def test_worst_estimate_comes_first_with_what_is_known_of_it(studies: Studies, scans: Scans) -> None:
    for name, dice in (("scan_0", 0.9), ("scan_1", 0.4), ("scan_2", 0.7), ("scan_3", 0.95)):
        studies.write_assessment(make_assessment(name, dice, worst=3))
    answer = WorstEstimateFirst("segqc", studies)({}, scans)
    assert answer is not None
    assert answer["id"] == "scan_1"
    assert answer["strategy"] == "segqc"
    assert answer["estimated_dice"] == pytest.approx(0.4)
    assert answer["worst_slices"] == [3, 9, 8, 7, 6]
    assert [(b["slice"], b["start"], b["stop"], b["structure"]) for b in answer["boxes"]] == [
        (3, [3, 4], [9, 12], "liver")
    ]
    assert "note" not in answer


def test_a_labelled_scan_is_not_suggested_however_bad_its_mask_was(studies: Studies, scans: Scans) -> None:
    studies.write_assessment(make_assessment("scan_0", 0.1))
    studies.write_assessment(make_assessment("scan_2", 0.6))
    scans.open_scans.remove("scan_0")
    answer = WorstEstimateFirst("segqc", studies)({}, scans)
    assert answer is not None
    assert answer["id"] == "scan_2"
    assert answer["note"].startswith("2 of 3")


def test_a_new_assessment_changes_the_order(studies: Studies, scans: Scans) -> None:
    strategy = WorstEstimateFirst("segqc", studies)
    for i in range(4):
        studies.write_assessment(make_assessment(f"scan_{i}", 0.5 + 0.1 * i))
    assert (strategy({}, scans) or {})["id"] == "scan_0"
    studies.write_assessment(make_assessment("scan_0", 0.99))
    assert (strategy({}, scans) or {})["id"] == "scan_1"


def test_unscored_pool_is_drawn_uniformly_and_says_so(studies: Studies, scans: Scans) -> None:
    strategy = WorstEstimateFirst("segqc", studies, seed=3)
    answers = [strategy({}, scans) or {} for _ in range(400)]
    drawn = Counter(a["id"] for a in answers)
    assert set(drawn) == set(scans.open_scans)
    assert min(drawn.values()) > 60  # expected 100 each; 60 is more than 4.6 standard deviations away
    assert {a["strategy"] for a in answers} == {"uniform-random"}
    assert all("uniformly at random" in a["note"] and a["estimated_dice"] is None for a in answers)
    again = WorstEstimateFirst("segqc", studies, seed=3)
    assert [a["id"] for a in answers[:20]] == [(again({}, scans) or {})["id"] for _ in range(20)]


def test_tta_takes_the_lowest_score_of_its_own_method(studies: Studies, scans: Scans) -> None:
    studies.write_assessment(make_assessment("scan_0", 0.1))
    for name, value in (("scan_0", 0.9), ("scan_1", 0.8), ("scan_2", 0.3), ("scan_3", 0.7)):
        studies.write_score("tta", name, value, "seg")
    answer = WorstEstimateFirst("tta", studies, method="tta")({}, scans)
    assert answer is not None
    assert (answer["id"], answer["estimated_dice"]) == ("scan_2", pytest.approx(0.3))


def test_foreground_random_leaves_out_empty_masks(studies: Studies, scans: Scans) -> None:
    studies.write_assessment(make_assessment("scan_0", 0.5, volume_ml=0.0))
    studies.write_assessment(make_assessment("scan_1", 0.5, volume_ml=1.0))
    studies.write_assessment(make_assessment("scan_2", 0.5, volume_ml=2.0))
    strategy = ForegroundRandom("foreground-random", studies)  # scan_3 has no mask at all
    drawn = Counter((strategy({}, scans) or {})["id"] for _ in range(100))
    assert set(drawn) == {"scan_1", "scan_2"}
    scans.open_scans = ["scan_0", "scan_3"]
    answer = strategy({}, scans)
    assert answer is not None
    assert answer["strategy"] == "uniform-random"
    assert "note" in answer


def test_sequential_counts_numbers_in_names_as_numbers(studies: Studies, scans: Scans) -> None:
    scans.open_scans = ["scan_10", "scan_9", "scan_2b", "other_1"]
    assert (Sequential("sequential", studies)({}, scans) or {})["id"] == "other_1"
    scans.open_scans.remove("other_1")
    assert (Sequential("sequential", studies)({}, scans) or {})["id"] == "scan_2b"


def test_nothing_is_left_to_suggest(studies: Studies, scans: Scans) -> None:
    scans.open_scans = []
    strategies = (
        WorstEstimateFirst("segqc", studies),
        ForegroundRandom("foreground-random", studies),
        Sequential("sequential", studies),
        UniformRandom("uniform-random", studies),
    )
    assert [strategy({}, scans) for strategy in strategies] == [None] * 4
