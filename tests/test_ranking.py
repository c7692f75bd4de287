from __future__ import annotations

import itertools

import numpy as np
import pytest

from segqc.quality.metrics import MetricName
from segqc.quality.ranking import order_scans, order_slices


def test_the_lowest_dice_comes_first_and_ties_go_by_id() -> None:
    scores = {"b": 0.8, "c": 0.3, "a": 0.8, "d": 0.95}
    for items in itertools.permutations(scores.items()):
        assert order_scans(dict(items)) == ["c", "a", "b", "d"]


@pytest.mark.parametrize(
    ("metric", "wanted"),
    [("dice", ["neg", "low", "high"]), ("iou", ["neg", "low", "high"]), ("arvd", ["high", "low", "neg"])],
)
def test_worst_depends_on_the_metric(metric: MetricName, wanted: list[str]) -> None:
    assert order_scans({"low": 0.2, "high": 0.9, "neg": -0.5}, metric=metric) == wanted


def test_rvd_is_worst_farthest_from_zero_on_either_side() -> None:
    assert order_scans({"under": -0.5, "over": 0.9, "fine": 0.01}, metric="rvd") == ["over", "under", "fine"]


@pytest.mark.parametrize("metric", ["dice", "arvd", "rvd"])
def test_undefined_scores_come_first(metric: MetricName) -> None:
    scores = {"z": None, "a": 0.0, "y": float("nan"), "b": 1.0}
    assert order_scans(scores, metric=metric)[:2] == ["y", "z"]
    assert order_scans({}) == []


def test_slices_are_ordered_by_error_sum_largest_first_ties_by_index() -> None:
    assert order_slices([0.0, 5.0, 2.0, 5.0, 0.0]).tolist() == [1, 3, 2, 0, 4]
    assert order_slices(np.zeros(4, np.float64)).tolist() == [0, 1, 2, 3]
    assert order_slices([]).tolist() == []
