"""Which scan to correct next.

Each strategy answers with the scan's id and what is known of its mask. A scan with a final label is never chosen; with
none left the answer is None, which MONAI Label's clients get as ``{}``.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from segqc.loop.studies import Studies
from segqc.ranking import order_scans
from segqc.types import Assessment
from segqc.volumes import VolumeError, read_labels

Answer = dict[str, Any]  # MONAI Label's form: JSON

WORST_SLICES = 5


def describe(assessment: Assessment | None) -> Answer:
    """What the answer says of a scan's mask: estimated Dice, worst slices, and the error boxes in these slices."""
    if assessment is None:
        return {"estimated_dice": None, "worst_slices": [], "boxes": []}
    slices = assessment.worst_slices(WORST_SLICES)
    boxes = [
        {
            "structure": quality.name,
            "slice": box.slice_index,
            "start": list(box.start),
            "stop": list(box.stop),
            "area_mm2": box.area_mm2,
            "mean_error": box.mean_error,
            "peak_error": box.peak_error,
        }
        for quality in assessment.structures
        for box in quality.raw.boxes
        if box.slice_index in slices
    ]
    return {
        "estimated_dice": assessment.dice,
        "estimated_dice_by_structure": {q.name: q.estimated.dice for q in assessment.structures if q.present},
        "worst_slices": list(slices),
        "boxes": boxes,
        "through_plane_axis": assessment.through_plane_axis,
        "models": {"segmentation": assessment.segmenter_version, "segqc": assessment.assessor_version},
    }


class EstimateIndex:
    """The estimated Dice of many scans; an assessment is read again only when another one has taken its place."""

    def __init__(self, studies: Studies) -> None:
        self._studies = studies
        self._known: dict[str, tuple[tuple[int, int, int], float]] = {}

    def of(self, scans: Sequence[str]) -> dict[str, float]:
        """The estimates of those scans that have one."""
        found: dict[str, float] = {}
        for scan in scans:
            try:
                status = os.stat(self._studies.own / "assessments" / f"{scan}.json")
            except FileNotFoundError:
                continue
            # assessments appear by rename only: another content is another inode
            signature = (status.st_ino, status.st_mtime_ns, status.st_size)
            known = self._known.get(scan)
            if known is None or known[0] != signature:
                assessment = self._studies.assessment(scan)
                if assessment is None:
                    continue
                known = self._known[scan] = (signature, assessment.dice)
            found[scan] = known[1]
        return found


class _Sampling(Strategy):  # type: ignore[misc]  # MONAI Label has no types
    """What the strategies share: the scans to choose from, the draw, and the answer."""

    def __init__(self, name: str, description: str, studies: Studies, seed: int = 0) -> None:
        super().__init__(description)
        self.name = name
        self.studies = studies
        self._random = np.random.default_rng(seed)
        self._lock = threading.Lock()  # a generator serves one thread at a time

    def open_scans(self, request: Mapping[str, Any], datastore: Datastore) -> list[str]:
        """Ids of the scans without a final label, sorted."""
        return sorted(datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels")))

    def shuffled(self, scans: Sequence[str]) -> list[str]:
        """The scans in random order."""
        with self._lock:
            return [scans[int(i)] for i in self._random.permutation(len(scans))]

    def answer(self, scan: str, *, strategy: str | None = None, note: str | None = None) -> Answer:
        """The answer for a scan: who chose it, what is known of its mask, and a note."""
        said: Answer = {"id": scan, "strategy": strategy or self.name, **describe(self.studies.assessment(scan))}
        if note is not None:
            said["note"] = note
        return said


class WorstEstimateFirst(_Sampling):
    """The scan whose mask has the lowest estimated Dice; while none is scored, one drawn uniformly at random."""

    def __init__(self, name: str, studies: Studies, *, method: str = "segqc", seed: int = 0) -> None:
        super().__init__(
            name, f"Worst mask first, by its Dice as estimated by the scoring method {method!r}", studies, seed
        )
        self.method = method
        self._estimates = EstimateIndex(studies)

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> Answer | None:
        """Choose a scan."""
        scans = self.open_scans(request, datastore)
        if not scans:
            return None
        scores = self._scores(scans)
        if scores:
            worst = order_scans(scores)[0]
            missing = len(scans) - len(scores)
            note = f"{missing} of {len(scans)} open scans are not scored yet." if missing else None
            said = self.answer(worst, note=note)
            if said["estimated_dice"] is None or self.method != "segqc":
                said["estimated_dice"] = scores[worst]
            return said
        note = (
            f"No open scan has a score of the method {self.method!r} yet (train both networks, then POST "
            f"/scoring/{self.method}); this one was drawn uniformly at random."
        )
        return self.answer(self.shuffled(scans)[0], strategy="uniform-random", note=note)

    def _scores(self, scans: Sequence[str]) -> dict[str, float]:
        if self.method == "segqc":
            return self._estimates.of(scans)
        found = ((scan, self.studies.score(self.method, scan)) for scan in scans)
        return {scan: score[0] for scan, score in found if score is not None}


class UniformRandom(_Sampling):
    """Any scan, with equal probability."""

    def __init__(self, name: str, studies: Studies, *, seed: int = 0) -> None:
        super().__init__(name, "Any scan without a final label, with equal probability", studies, seed)

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> Answer | None:
        """Choose a scan."""
        scans = self.open_scans(request, datastore)
        return self.answer(self.shuffled(scans)[0]) if scans else None


class ForegroundRandom(_Sampling):
    """Any scan whose current mask is not empty, with equal probability (the paper's "random non-empty")."""

    def __init__(self, name: str, studies: Studies, *, seed: int = 0) -> None:
        super().__init__(name, "Any scan whose mask is not empty, with equal probability", studies, seed)

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> Answer | None:
        """Choose a scan."""
        scans = self.shuffled(self.open_scans(request, datastore))
        if not scans:
            return None
        # the first of a random order that has a foreground is a uniform draw from all that have one
        for scan in scans:
            if self._has_foreground(scan, datastore):
                return self.answer(scan)
        note = "No open scan has a mask with foreground yet; this one was drawn uniformly at random."
        return self.answer(scans[0], strategy="uniform-random", note=note)

    def _has_foreground(self, scan: str, datastore: Datastore) -> bool:
        assessment = self.studies.assessment(scan)
        if assessment is not None:
            return any(q.mask_volume_ml > 0 for q in assessment.structures)
        path = datastore.get_label_uri(scan, "original")
        try:
            return bool(path) and bool(read_labels(path).array.any())
        except VolumeError:
            return False


class Sequential(_Sampling):
    """The first scan by name, numbers in names counted as numbers."""

    def __init__(self, name: str, studies: Studies) -> None:
        super().__init__(name, "The scans one after the other, by name", studies)

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> Answer | None:
        """Choose a scan."""
        scans = self.open_scans(request, datastore)
        return self.answer(min(scans, key=_natural)) if scans else None


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]
