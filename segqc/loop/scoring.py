"""Score the scans of a dataset folder that no person has labelled yet; continue where an earlier run stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from segqc.loop import error_maps
from segqc.loop.dataset import Dataset, ScanEntry
from segqc.loop.error_maps import ErrorSteps
from segqc.networks.assessor import AssessmentResult
from segqc.networks.bundle import NetworkBundle
from segqc.networks.model_file import ModelError
from segqc.networks.segmenter import Prediction, Segmenter
from segqc.selection import Score, score_of, scores
from segqc.selection.expected_gain import EXPECTED_GAIN
from segqc.store import assessments
from segqc.store.labels import LIKELY_ERRORS_TAG, ORIGINAL, PROPOSAL, made_of_network, mask_source
from segqc.store.records import LabelRecord, ScanRecord
from segqc.store.scans import ScanReplaced, UnknownScan
from segqc.training import Progress
from segqc.types import MaskSource
from segqc.volumes import Volume, VolumeError, read_labels, temporary_labels, through_plane_axis
from segqc.volumes.slices import Slices, unchanged

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MaskOrigin:
    """Who made a label map.

    Attributes:
        source: who made it as it is.
        segmenter_version: of the network that made it, or the slices of it that a person let be; None where nobody
            knows.
        network_slices: of a person's label map, the slices in which it holds exactly what a network made.
    """

    source: MaskSource = "network"
    segmenter_version: str | None = None
    network_slices: Slices = ()


BY_A_NETWORK: Final = MaskOrigin()
"""Of a mask of which nobody knows more."""


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

    "segqc" makes a mask where the serving segmentation network has not made one, and assesses it. It notes that
    network's features of each scan, and of the labelled ones. Where its report card lets another score order the scans,
    or the server's default strategy goes by another one, that one is computed, too. Every other score is a function of
    that network's predictions under test-time augmentation, or of the masks by the networks of the folds. The lowest
    score is the worst.

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
    wanted = score_of(method)
    entries = dataset.waiting()
    scoring = _scoring(dataset, method, wanted, bundle, force=force)
    scored, skipped, failed = 0, 0, {}
    for i, entry in enumerate(entries):
        progress.step(i, len(entries), f"scoring by {method}", entry.id)
        try:
            fresh = scoring(entry)
        except (VolumeError, ScanReplaced, UnknownScan, OSError) as error:
            # one bad file must not keep all other scans from being scored
            logger.warning("%s is not scored: %s", entry.id, error)
            failed[entry.id] = str(error)
            continue
        scored, skipped = scored + fresh, skipped + (not fresh)
    progress.step(len(entries), len(entries), f"scoring by {method}", "done")
    if not wanted.is_estimate:
        return ScoringSummary(scored, skipped, failed)
    _note_features(dataset, bundle.segmenter(), progress)
    for other in _further(dataset, bundle):
        failed |= score(dataset, other, progress, force=force).failed
    return ScoringSummary(scored, skipped, failed, _marked(dataset, entries, bundle))


def _scoring(
    dataset: Dataset, method: str, wanted: Score, bundle: NetworkBundle, *, force: bool
) -> Callable[[ScanEntry], bool]:
    """What scores a scan, and says whether its score was not current."""
    if wanted.is_estimate:
        return lambda entry: _score_segqc(dataset, entry, bundle, force)
    by_ensemble = wanted.of_ensemble is not None
    version = bundle.folds_version() if by_ensemble else bundle.segmenter().version
    known = {} if force else dataset.score_versions(method)

    def scoring(entry: ScanEntry) -> bool:
        if known.get(entry.id) == version:
            return False
        if by_ensemble:
            _write_ensemble_scores(dataset, entry, bundle)
        else:
            _write_tta_scores(dataset, entry, bundle.segmenter())
        return True

    return scoring


def _further(dataset: Dataset, bundle: NetworkBundle) -> list[str]:
    """The scores beside the estimates that the scans that wait are handed out by."""
    report = bundle.manifest.report
    names = {dataset.settings.server.strategy, *([] if report is None else [report.ranked_by])}
    found = [name for name, score in scores().items() if name in names and not score.is_estimate]
    if bundle.folds_version() is not None:
        return found
    for name in [name for name in found if scores()[name].of_ensemble is not None]:
        logger.warning("no scan is scored by %s: the bundle %d holds no networks of the folds", name, bundle.number)
        found.remove(name)
    return found


def _note_features(dataset: Dataset, segmenter: Segmenter, progress: Progress) -> None:
    """Note the network's features of all scans that have a mask or a label and no such features yet.

    Scans whose mask was made now have some; the others were assessed by an earlier bundle with this network, or are
    labelled. What cannot be used is left out: the scan is compared with no other.
    """
    known = dataset.feature_versions()
    missing = [entry for entry in dataset.scans() if known.get(entry.id) != segmenter.version]
    for i, entry in enumerate(missing):
        progress.step(i, len(missing), "features of the scans", entry.id)
        mask = dataset.mask(entry.id)
        path = entry.final or (dataset.store.label_file(mask) if mask is not None else None)
        if path is None:
            continue
        try:
            scan = dataset.read_scan(entry)
            write_features(dataset, entry, segmenter, scan, read_labels(path, scan=scan))
        except (VolumeError, ScanReplaced, UnknownScan, OSError) as error:
            logger.warning("%s is compared with no other scan: %s", entry.id, error)


def write_features(dataset: Dataset, entry: ScanEntry, segmenter: Segmenter, scan: Volume, labels: Volume) -> None:
    """Keep a segmentation network's features of a scan around its mask or label; nothing where it has none.

    Raises:
        ScanReplaced: if the scan's file holds another content by now.
    """
    mask = np.any([structure.mask(labels.array) for structure in segmenter.structures], axis=0)
    values = segmenter.features(scan, mask)
    if values is not None:
        dataset.write_features(entry.id, segmenter.version, values, entry.sha256)


def _marked(dataset: Dataset, entries: Sequence[ScanEntry], bundle: NetworkBundle) -> int | None:
    reference = bundle.assessor().card.unlikeness
    if reference is None or not reference.can_mark:
        return None
    with dataset.store.read() as transaction:
        return len(assessments.marked(transaction) & {entry.id for entry in entries})


def _bundle(dataset: Dataset, method: str) -> NetworkBundle:
    """The bundle that serves, with the networks that the method needs."""
    wanted = score_of(method)  # an unknown method is reported before a missing network
    bundle = dataset.bundle()
    if bundle is None or not bundle.holds("segmentation"):
        raise ModelError("scoring needs a segmentation network; train one first (segqc train segmentation)")
    bundle.segmenter()  # while its files are there: an old bundle's may go
    if wanted.of_ensemble is not None:
        bundle.fold_networks()
    if wanted.is_estimate:
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
    result = assess(bundle, scan, labels, prediction, scan_id=entry.id, origin=origin_of(dataset, mask, scan))
    dataset.write_assessment(result.assessment, mask, bundle.number, content=entry.sha256)
    error_maps.write(dataset, mask.id, bundle.number, error_maps.quantised(result.errors))
    write_features(dataset, entry, bundle.segmenter(), scan, labels)
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
    labels = dataset.store.read_label(mask, scan=scan, values=segmenter.values)
    return mask, labels, segmenter.predict(scan) if mask.bundle is not None else None


def assess(
    bundle: NetworkBundle,
    scan: Volume,
    labels: Volume,
    prediction: Prediction | None,
    *,
    scan_id: str,
    origin: MaskOrigin,
) -> AssessmentResult:
    """Assess a mask by a bundle, as a served one where its own network made it, or what a person let be of it.

    Args:
        bundle: with SegQC-Net.
        scan: the scan.
        labels: its label map.
        prediction: of the bundle's network that made the label map, or those slices; None where it did not, or where
            it is to be made now.
        scan_id: the name that the assessment carries.
        origin: who made the label map.
    """
    assessor = bundle.assessor()
    prediction = prediction or own_prediction(bundle, scan, origin)
    return assessor.assess(
        scan,
        labels,
        scan_id=scan_id,
        segmenter_version=origin.segmenter_version if origin.source == "network" else None,
        plausible=None if prediction is None else prediction.plausible,
        soft=None if prediction is None else bundle.segmenter().soft_outputs(prediction, assessor.structures),
        source=origin.source,
        network_slices=origin.network_slices,
    )


def own_prediction(bundle: NetworkBundle, scan: Volume, origin: MaskOrigin) -> Prediction | None:
    """The prediction of a bundle's network, if it made the mask, or those slices of it that a person let be."""
    if origin.segmenter_version is None or not bundle.holds("segmentation"):
        return None
    segmenter = bundle.segmenter()
    return segmenter.predict(scan) if segmenter.version == origin.segmenter_version else None


def origin_of(dataset: Dataset, label: LabelRecord, scan: Volume) -> MaskOrigin:
    """Who made a label version of a scan, and what a person let be of the last network's mask that it was made of.

    Raises:
        VolumeError: if one of both can't be used.
    """
    with dataset.store.read() as transaction:
        source = mask_source(transaction, label)
        made_of = made_of_network(transaction, label)
    if source == "network":
        by_segmenter = label.bundle is not None and label.tag not in (PROPOSAL, LIKELY_ERRORS_TAG)
        return MaskOrigin(source, label.bundle.segmenter_version if label.bundle and by_segmenter else None)
    if made_of is None:
        return MaskOrigin(source)
    before, after = (dataset.store.read_label(version, scan=scan) for version in (made_of, label))
    slices = unchanged(before.array, after.array, through_plane_axis(scan))
    by = made_of.bundle.segmenter_version if slices and made_of.bundle is not None else None
    return MaskOrigin(source, by, slices)


def error_map(dataset: Dataset, scan: ScanRecord, label: LabelRecord, bundle: NetworkBundle) -> ErrorSteps:
    """Where a label is likely to be wrong: 0 to 255 for an error probability of 0 to 1, the highest of all structures'.

    It is the one that was kept when the label was assessed (`segqc.loop.error_maps`); where there is none, it is
    computed and kept.

    Args:
        dataset: the folder.
        scan: the scan.
        label: a version of its label.
        bundle: with both networks.

    Returns:
        On the scan's grid, in its file's voxel order.

    Raises:
        ModelError: if the bundle has not both networks.
        VolumeError: if scan or label can't be used.
        ScanReplaced: if the scan's file holds another content by now.
    """
    kept = error_maps.read(dataset, label.id, bundle.number)
    if kept is not None:
        return error_maps.highest(kept)
    assessor = bundle.assessor()
    volume = dataset.read_scan(ScanEntry(scan.name, dataset.folder / scan.file, None, None, scan.sha256))
    labels = dataset.store.read_label(label, scan=volume, values=assessor.values)
    origin = origin_of(dataset, label, volume)
    prediction = own_prediction(bundle, volume, origin)
    plausible = None if prediction is None else prediction.plausible
    errors = error_maps.quantised(
        assessor.error_maps(volume, labels, plausible, source=origin.source, network_slices=origin.network_slices)
    )
    error_maps.write(dataset, label.id, bundle.number, errors)
    return error_maps.highest(errors)


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


def _write_tta_scores(dataset: Dataset, entry: ScanEntry, segmenter: Segmenter) -> None:
    settings = dataset.settings.training_settings("segmentation")
    prediction = segmenter.predict_tta(dataset.read_scan(entry), gammas=settings.gammas)
    structures = segmenter.structures
    # one run of the group gives all scores
    for method, wanted in scores().items():
        if wanted.function is not None:
            value = wanted.function(prediction, structures)
            of_structures = wanted.by_structure(prediction, structures) if wanted.by_structure is not None else {}
            version = segmenter.version
            dataset.write_score(method, entry.id, value, version, entry.sha256, by_structure=of_structures)


def _write_ensemble_scores(dataset: Dataset, entry: ScanEntry, bundle: NetworkBundle) -> None:
    scan, networks, version = dataset.read_scan(entry), bundle.fold_networks(), bundle.folds_version()
    members = [np.asarray(network.predict(scan).labels.array, np.uint8) for network in networks]
    for method, wanted in scores().items():
        if wanted.of_ensemble is not None and version is not None:
            value = wanted.of_ensemble(members, networks[0].structures)
            dataset.write_score(method, entry.id, value, version, entry.sha256, bundle=bundle.number)
