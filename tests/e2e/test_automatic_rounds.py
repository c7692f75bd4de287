"""The loop by itself: a server on the sample scans, a simulated annotator, and three rounds that nobody begins.

It takes some minutes and prints what happens: ``pytest -m slow -s tests/e2e/test_automatic_rounds.py``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from segqc.loop.dataset import Dataset
from segqc.server.annotator import Correction, annotate
from tests.loop_kit import SAMPLES, Loop, running_loop, write_settings

pytestmark = [pytest.mark.server, pytest.mark.slow]

NOT_COPIED = shutil.ignore_patterns("segqc", "original", "returned", "likely-errors", "pseudo-label*")
CORRECTIONS = 2
SETTINGS: Mapping[str, Mapping[str, object]] = {
    # every labelled patient calibrates: with the first corrections there are enough of them for intervals
    "training": {"ensemble": True, "patch": [64, 64, 16]},
    "training.segmentation": {"epochs": 30},
    "training.segqc": {"epochs": 5, "fold_epochs": 5, "people_epochs": 2},
    "round": {"after_corrections": CORRECTIONS},
    "pseudo_labels": {"mode": "top", "top_share": 0.5, "min_dice": 0.0},
    "annotation": {"audit_share": 0.2, "validation_share": 0.0},
}


def make_folder(folder: Path) -> Path:
    """A copy of the sample scans with short trainings and rounds that begin by themselves."""
    shutil.copytree(SAMPLES, folder, ignore=NOT_COPIED)
    write_settings(folder, SETTINGS)
    return folder


def correct(loop: Loop) -> list[Correction]:
    """Let the simulated annotator correct what the server suggests; a round is due then."""
    done = list(annotate(loop.url, loop.folder / "truth", Dataset(loop.folder).structures, count=CORRECTIONS))
    for one in done:
        estimate = "no estimate" if one.estimated_dice is None else f"estimated Dice {one.estimated_dice:.2f}"
        print(f"  {one.scan}, chosen by {one.strategy}: {estimate}, true {one.true_dice:.2f}; corrected", flush=True)
    assert len(done) == CORRECTIONS
    return done


def wait_for_round(loop: Loop, number: int) -> dict[str, Any]:
    """Wait for the end of a round that has begun by itself, and of the scoring after it."""
    loop.wait(f"round {number} has ended, and all waiting scans are scored", lambda: loop.jobs() == [])
    found: list[dict[str, Any]] = loop.table("rounds")["rounds"]
    assert [row["round"] for row in found] == list(range(1, number + 1))
    assert found[-1]["state"] == "done"
    assert found[-1]["by"] == "server"
    assert found[-1]["reason"].startswith(f"by the settings: {CORRECTIONS} corrections ({CORRECTIONS} simulated)")
    return found[-1]


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    with running_loop(make_folder(tmp_path / "sample-datastore"), tmp_path / "terminal.log") as running:
        yield running


def test_three_rounds_begin_by_themselves(loop: Loop) -> None:
    loop.wait("the server answers", loop.answers)
    loop.wait("the first networks are trained", lambda: loop.serving() is not None)
    loop.wait("all waiting scans are scored", lambda: loop.jobs() == [])
    first = loop.serving()
    assert first is not None
    assert loop.table("rounds")["next"]["corrections"] == 0, "the first networks know the labels of now"

    print("\nThe first round: suggestions, corrections, and what trains without a person")
    suggested = correct(loop)
    assert any(one.estimated_dice is not None for one in suggested)
    loop.wait("a round has begun by itself", loop.is_in_a_round)
    one = wait_for_round(loop, 1)
    assert one["bundle state"] == "serves"
    assert loop.table("pseudo-labels")["pseudo_labels"], "masks are accepted"
    loop.show("pseudo-labels", str(loop.folder))

    print("\nThe second round: while it runs, somebody lets the first networks serve again")
    correct(loop)
    loop.wait("a round has begun by itself", loop.is_in_a_round)
    loop.wait("it trains", loop.is_training)
    loop.show("models", "serve", str(loop.folder), str(first))
    two = wait_for_round(loop, 2)
    assert two["pseudo-labels"] > 0, "they have trained, too"
    assert two["bundle state"] == "held"
    assert f"bundle {first} was chosen by hand" in two["held because"]
    assert loop.serving() == first
    loop.show("rounds", "--simulated", str(loop.folder))
    loop.show("models", "serve", str(loop.folder), str(two["bundle"]))
    loop.wait("all waiting scans are scored", lambda: loop.jobs() == [])

    print("\nThe third round")
    correct(loop)
    loop.wait("a round has begun by itself", loop.is_in_a_round)
    three = wait_for_round(loop, 3)
    assert three["labels"] == two["labels"] + CORRECTIONS
    assert loop.serving() == (three["bundle"] if three["bundle state"] == "serves" else two["bundle"])

    loop.show("rounds", "--simulated", str(loop.folder))
    loop.show("models", "list", str(loop.folder))
    loop.show("pseudo-labels", "--ended", str(loop.folder))
    loop.show("rank", str(loop.folder))
