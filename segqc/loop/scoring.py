"""Score the scans of a dataset folder that no person has labelled yet; continue where an earlier run stopped."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from segqc.loop.dataset import Dataset, ScanEntry
from segqc.networks.assessor import AssessmentResult, Assessor
from segqc.networks.model import ModelError
from segqc.networks.segmenter import Segmenter
from segqc.selection import score_of, scores
from segqc.store import assessments
from segqc.store.labels import ORIGINAL
from segqc.store.records import LabelRecord
from segqc.store.scans import ScanReplaced, UnknownScan
from segqc.training import Progress
from segqc.volumes import Volume, VolumeError, read_labels, temporary_labels

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScoringSummary:
    """How many scans were scored, had a current score, or could not be scored (with the reasons)."""

    scored: int
    skipped: int
    failed: dict[str, str]


def score(dataset: Dataset, method: str, progress: Progress, *, force: bool = False) -> ScoringSummary:
    """Score every scan that waits for a label; a scan with a current score is skipped.

    "segqc" makes a mask where the current segmentation network has not made one, and assesses it; from its start on
    only the current networks' estimates count, so that scans are never ranked by those of different ones. Every
    other score is a function of the segmentation network's predictions under test-time augmentation. The lowest score
    is the worst.

    Args:
        dataset: the folder.
        method: the strategy whose score is wanted.
        progress: told after each scan.
        force: score again what has a current score.

    Raises:
        StrategyError: if there is no such strategy, or it has no score.
        ModelError: if a network that the method needs is not trained yet.
    """
    segmenter, assessor = _networks(dataset, method)
    if assessor is not None:
        with dataset.store.write() as transaction:
            assessments.serve(transaction, segmenter.version, assessor.version)
    entries = dataset.waiting()
    known = {} if force or assessor is not None else dataset.score_versions(method)
    scored, skipped, failed = 0, 0, {}
    for i, entry in enumerate(entries):
        progress.step(i, len(entries), f"scoring by {method}", entry.id)
        try:
            if assessor is not None:
                fresh = _score_segqc(dataset, entry, segmenter, assessor, force)
            else:
                fresh = known.get(entry.id) != segmenter.version
                if fresh:
                    _write_scores(dataset, entry, segmenter)
        except (VolumeError, ScanReplaced, UnknownScan, OSError) as error:
            # one bad file must not keep all other scans from being scored
            logger.warning("%s is not scored: %s", entry.id, error)
            failed[entry.id] = str(error)
            continue
        scored, skipped = scored + fresh, skipped + (not fresh)
    progress.step(len(entries), len(entries), f"scoring by {method}", "done")
    return ScoringSummary(scored, skipped, failed)


def _networks(dataset: Dataset, method: str) -> tuple[Segmenter, Assessor | None]:
    needs_assessor = score_of(method).function is None  # an unknown method is told before a missing network
    segmenter = dataset.segmenter()
    if segmenter is None:
        raise ModelError("scoring needs a segmentation network; train one first (segqc train segmentation)")
    if not needs_assessor:
        return segmenter, None
    assessor = dataset.assessor()
    if assessor is None:
        raise ModelError("scoring by segqc needs a SegQC network; train one first (segqc train segqc)")
    return segmenter, assessor


def mask_to_assess(dataset: Dataset, entry: ScanEntry, segmenter: Segmenter) -> LabelRecord | None:
    """The scan's mask, unless there is none or another network than the current one made it."""
    mask = dataset.mask(entry.id)
    outdated = mask is not None and mask.bundle is not None and mask.bundle.segmenter_version != segmenter.version
    return None if outdated else mask


def _score_segqc(dataset: Dataset, entry: ScanEntry, segmenter: Segmenter, assessor: Assessor, force: bool) -> bool:
    mask = mask_to_assess(dataset, entry, segmenter)
    if mask is not None and not force:
        with dataset.store.read() as transaction:
            found = assessments.latest_of(transaction, mask.id)
        if found is not None and found[1].assessor_version == assessor.version:
            return False
    assess_scan(dataset, entry, segmenter, assessor)
    return True


def assess_scan(dataset: Dataset, entry: ScanEntry, segmenter: Segmenter, assessor: Assessor) -> AssessmentResult:
    """Assess a scan's mask, made now where there is none of the current network; keep mask and assessment.

    Raises:
        VolumeError: if scan or mask can't be used.
        ScanReplaced: if the scan's file holds another content by now.
    """
    scan = dataset.read_scan(entry)
    mask = mask_to_assess(dataset, entry, segmenter)
    if mask is None:
        labels = segmenter.predict(scan).labels
        mask = keep_mask(dataset, entry.id, labels, segmenter, content=entry.sha256)
    else:
        labels = read_labels(dataset.store.label_file(mask), scan=scan, values=segmenter.values)
    source = mask.bundle.segmenter_version if mask.bundle is not None else None
    result = assessor.assess(scan, labels, scan_id=entry.id, segmenter_version=source)
    dataset.write_assessment(result.assessment, mask, content=entry.sha256)
    return result


def keep_mask(
    dataset: Dataset,
    name: str,
    labels: Volume,
    segmenter: Segmenter,
    tag: str = ORIGINAL,
    *,
    content: str | None = None,
) -> LabelRecord:
    """Store a network's mask of a scan, of the content that it was made of; see `Dataset.save_mask`."""
    with temporary_labels(labels) as path:
        return dataset.save_mask(name, path, segmenter, tag=tag, content=content)


def _write_scores(dataset: Dataset, entry: ScanEntry, segmenter: Segmenter) -> None:
    settings = dataset.settings.training_settings("segmentation")
    prediction = segmenter.predict_tta(dataset.read_scan(entry), gammas=settings.gammas)
    # one run of the group gives all scores
    for method, wanted in scores().items():
        if wanted.function is not None:
            value = wanted.function(prediction, segmenter.structures)
            dataset.write_score(method, entry.id, value, segmenter.version, entry.sha256)
