"""Score the scans of a dataset folder that no person has labelled yet; continue where an earlier run stopped."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from segqc.loop.dataset import Dataset, ScanEntry
from segqc.networks.assessor import AssessmentResult
from segqc.networks.bundle import NetworkBundle
from segqc.networks.model_file import ModelError
from segqc.networks.segmenter import Prediction, Segmenter
from segqc.selection import score_of, scores
from segqc.selection.expected_gain import EXPECTED_GAIN
from segqc.store import assessments
from segqc.store.labels import ORIGINAL
from segqc.store.records import LabelRecord
from segqc.store.scans import ScanReplaced, UnknownScan
from segqc.training import Progress
from segqc.volumes import Volume, VolumeError, read_labels, temporary_labels

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScoringSummary:
    """How many scans were scored, had a current score, or could not be scored (with the reasons).

    ``marked`` is how many of the scans that wait are unlike the training's; None where nothing could mark them.
    """

    scored: int
    skipped: int
    failed: dict[str, str]
    marked: int | None = None


def score(dataset: Dataset, method: str, progress: Progress, *, force: bool = False) -> ScoringSummary:
    """Score every scan that waits for a label; a scan with a current score is skipped.

    "segqc" makes a mask where the serving segmentation network has not made one, and assesses it; where its report card
    lets another score order the scans, that one is computed, too. Every other score is a function of that network's
    predictions under test-time augmentation. The lowest score is the worst.

    Args:
        dataset: the folder.
        method: the strategy whose score is wanted.
        progress: called after each scan.
        force: score again what has a current score.

    Raises:
        StrategyError: if there is no such strategy, or it has no score.
        ModelError: if a network that the method needs is not trained yet.
    """
    bundle = _bundle(dataset, method)
    by_estimate = score_of(method).function is None
    entries = dataset.waiting()
    known = {} if force or by_estimate else dataset.score_versions(method)
    scored, skipped, failed = 0, 0, {}
    for i, entry in enumerate(entries):
        progress.step(i, len(entries), f"scoring by {method}", entry.id)
        try:
            if by_estimate:
                fresh = _score_segqc(dataset, entry, bundle, force)
            else:
                fresh = known.get(entry.id) != bundle.segmenter().version
                if fresh:
                    _write_scores(dataset, entry, bundle.segmenter())
        except (VolumeError, ScanReplaced, UnknownScan, OSError) as error:
            # one bad file must not keep all other scans from being scored
            logger.warning("%s is not scored: %s", entry.id, error)
            failed[entry.id] = str(error)
            continue
        scored, skipped = scored + fresh, skipped + (not fresh)
    progress.step(len(entries), len(entries), f"scoring by {method}", "done")
    report = bundle.manifest.report if by_estimate else None
    if report is not None and report.ranked_by != method and report.ranked_by in scores():
        failed |= score(dataset, report.ranked_by, progress, force=force).failed
    return ScoringSummary(scored, skipped, failed, _marked(dataset, entries, bundle) if by_estimate else None)


def _marked(dataset: Dataset, entries: Sequence[ScanEntry], bundle: NetworkBundle) -> int | None:
    reference = bundle.assessor().card.unlikeness
    if reference is None or not reference.can_mark:
        return None
    with dataset.store.read() as transaction:
        return len(assessments.marked(transaction) & {entry.id for entry in entries})


def _bundle(dataset: Dataset, method: str) -> NetworkBundle:
    """The bundle that serves, with the networks that the method needs."""
    needs_assessor = score_of(method).function is None  # an unknown method is reported before a missing network
    bundle = dataset.bundle()
    if bundle is None or not bundle.holds("segmentation"):
        raise ModelError("scoring needs a segmentation network; train one first (segqc train segmentation)")
    bundle.segmenter()  # while its files are there: an old bundle's may go
    if needs_assessor:
        if not bundle.holds("segqc"):
            raise ModelError("scoring by segqc needs a SegQC network; train one first (segqc train segqc)")
        bundle.assessor()
    return bundle


def mask_to_assess(dataset: Dataset, entry: ScanEntry, segmenter: Segmenter) -> LabelRecord | None:
    """The scan's mask, unless there is none or another network than the current one made it."""
    mask = dataset.mask(entry.id)
    outdated = mask is not None and mask.bundle is not None and mask.bundle.segmenter_version != segmenter.version
    return None if outdated else mask


def _score_segqc(dataset: Dataset, entry: ScanEntry, bundle: NetworkBundle, force: bool) -> bool:
    mask = mask_to_assess(dataset, entry, bundle.segmenter())
    if mask is not None and not force:
        with dataset.store.read() as transaction:
            known = assessments.of_bundle(transaction, mask.id, bundle.number) is not None
            # a bundle that serves again may have lost its scores to another one
            shown = known and assessments.is_shown(transaction, entry.id, mask.id, bundle.number)
            if known and not (shown and not assessments.has_score(transaction, entry.id, EXPECTED_GAIN)):
                return False
    assess_scan(dataset, entry, bundle)
    return True


def assess_scan(dataset: Dataset, entry: ScanEntry, bundle: NetworkBundle) -> AssessmentResult:
    """Assess a scan's mask, made now where there is none of the bundle's network; keep mask and assessment.

    Raises:
        ModelError: if the bundle has not both networks.
        VolumeError: if scan or mask can't be used.
        ScanReplaced: if the scan's file holds another content by now.
    """
    scan = dataset.read_scan(entry)
    mask, labels, prediction = current_mask(dataset, entry, scan, bundle)
    source = mask.bundle.segmenter_version if mask.bundle is not None else None
    result = assess(bundle, scan, labels, prediction, scan_id=entry.id, segmenter_version=source)
    dataset.write_assessment(result.assessment, mask, bundle.number, content=entry.sha256)
    return result


def current_mask(
    dataset: Dataset, entry: ScanEntry, scan: Volume, bundle: NetworkBundle
) -> tuple[LabelRecord, Volume, Prediction | None]:
    """A scan's mask, made and kept now where there is none of the bundle's network, and that network's prediction.

    The prediction, made anew for a mask that is stored, is None of a mask that another one made.
    """
    segmenter = bundle.segmenter()
    mask = mask_to_assess(dataset, entry, segmenter)
    if mask is None:
        prediction = segmenter.predict(scan)
        mask = keep_mask(dataset, entry.id, prediction.labels, bundle, content=entry.sha256)
        return mask, prediction.labels, prediction
    labels = read_labels(dataset.store.label_file(mask), scan=scan, values=segmenter.values)
    return mask, labels, segmenter.predict(scan) if mask.bundle is not None else None


def assess(
    bundle: NetworkBundle,
    scan: Volume,
    labels: Volume,
    prediction: Prediction | None,
    *,
    scan_id: str,
    segmenter_version: str | None,
) -> AssessmentResult:
    """Assess a mask by a bundle, as a served one where its own network made it.

    Args:
        bundle: with both networks.
        scan: the scan.
        labels: its label map.
        prediction: the bundle's network's, if it has made the label map.
        scan_id: the name that the assessment carries.
        segmenter_version: of the network that made the label map, if one did.
    """
    assessor = bundle.assessor()
    return assessor.assess(
        scan,
        labels,
        scan_id=scan_id,
        segmenter_version=segmenter_version,
        plausible=None if prediction is None else prediction.plausible,
        soft=None if prediction is None else bundle.segmenter().soft_outputs(prediction, assessor.structures),
    )


def keep_mask(
    dataset: Dataset,
    name: str,
    labels: Volume,
    bundle: NetworkBundle,
    tag: str = ORIGINAL,
    *,
    content: str | None = None,
) -> LabelRecord:
    """Store a bundle's mask of a scan, of the content that it was made of; see `Dataset.save_mask`."""
    with temporary_labels(labels) as path:
        return dataset.save_mask(name, path, bundle, tag=tag, content=content)


def _write_scores(dataset: Dataset, entry: ScanEntry, segmenter: Segmenter) -> None:
    settings = dataset.settings.training_settings("segmentation")
    prediction = segmenter.predict_tta(dataset.read_scan(entry), gammas=settings.gammas)
    # one run of the group gives all scores
    for method, wanted in scores().items():
        if wanted.function is not None:
            value = wanted.function(prediction, segmenter.structures)
            dataset.write_score(method, entry.id, value, segmenter.version, entry.sha256)
