"""The label audit: every final label is judged by the networks that have not seen its patient."""

from __future__ import annotations

import logging
from typing import Final

from segqc.errors import sentence
from segqc.loop import error_maps
from segqc.loop.dataset import Dataset, ScanEntry
from segqc.loop.requests import AuditResult
from segqc.loop.scoring import origin_of
from segqc.networks.assessor import Assessor
from segqc.networks.bundle import NetworkBundle
from segqc.networks.model_file import ModelError
from segqc.store import label_verdicts, scans
from segqc.store.label_verdicts import AuditedLabel, LabelVerdict
from segqc.store.scans import ScanReplaced, UnknownScan
from segqc.training import Progress
from segqc.volumes import VolumeError

logger = logging.getLogger(__name__)

_NO_NETWORK: Final = "an audit of labels needs a SegQC network; train one first (segqc train segqc)"
_EVERY_NETWORK: Final = "Not judged: every network has trained from this patient's labels."
_ONE_NETWORK: Final = (
    "Not judged: the network has trained from this patient's labels; with ensemble = true in [training], one of each "
    "fold has not."
)


def audit(dataset: Dataset, progress: Progress, *, force: bool = False) -> AuditResult:
    """Judge the final labels that train; one that the serving bundle has judged is left out.

    Args:
        dataset: the folder.
        progress: called after each label.
        force: judge again what was judged.

    Raises:
        ModelError: if no network for people's masks serves.
    """
    bundle = _bundle(dataset)
    assessor = bundle.assessor()
    dataset.refresh()
    with dataset.store.read() as transaction:
        wanted = label_verdicts.listing(transaction)
        known = set() if force else label_verdicts.judged(transaction, bundle.number)
    left = [found for found in wanted if found.label.id not in known]
    judged, seen, failed = 0, 0, dict[str, str]()
    for i, found in enumerate(left):
        progress.step(i, len(left), "judging labels", found.scan, unit="labels")
        judge = assessor.unseen_by(found.patient)
        try:
            if judge is None:
                is_alone = assessor.card.members == 1
                _keep_problem(dataset, found, bundle, _ONE_NETWORK if is_alone else _EVERY_NETWORK)
                seen += 1
            else:
                _judge(dataset, found, bundle, judge)
                judged += 1
        except (VolumeError, ScanReplaced, UnknownScan, OSError) as error:
            # one bad file must not keep all other labels from being judged
            logger.warning("the label of %s is not judged: %s", found.scan, error)
            failed[found.scan] = str(error)
            _keep_problem(dataset, found, bundle, f"Not judged: {sentence(str(error))}")
    progress.step(len(left), len(left), "judging labels", "done", unit="labels")
    return AuditResult(judged=judged, known=len(wanted) - len(left), seen=seen, failed=failed)


def missing_network(bundle: NetworkBundle | None) -> str | None:
    """Why a bundle cannot judge labels, in a sentence; None where it can.

    Raises:
        ModelError: if its card is missing or damaged.
    """
    if bundle is None or not bundle.holds("segqc"):
        return _NO_NETWORK
    if bundle.card("segqc").people is None:
        return (
            f"the SegQC network of bundle {bundle.number} has none for people's masks beside it; train it again with "
            'output_form = "truth" (segqc train segqc)'
        )
    return None


def _bundle(dataset: Dataset) -> NetworkBundle:
    bundle = dataset.bundle()
    problem = missing_network(bundle)
    if bundle is None or problem is not None:
        raise ModelError(problem or _NO_NETWORK)
    return bundle


def _judge(dataset: Dataset, found: AuditedLabel, bundle: NetworkBundle, judge: Assessor) -> None:
    with dataset.store.read() as transaction:
        record = scans.get(transaction, found.scan)
    label = found.label
    scan = dataset.read_scan(ScanEntry(record.name, dataset.folder / record.file, None, None, record.sha256))
    labels = dataset.store.read_label(label, scan=scan, values=judge.values)
    origin = origin_of(dataset, label, scan)  # without what its network says: that may have trained from this label
    slices = origin.network_slices
    result = judge.assess(scan, labels, scan_id=found.scan, source=origin.source, network_slices=slices)
    verdict = LabelVerdict(assessment=result.assessment, networks=judge.card.members)
    with dataset.store.write() as transaction:
        scans.expect(transaction, found.scan, record.sha256)
        label_verdicts.write(transaction, label.id, bundle.number, verdict)
    error_maps.write(dataset, label.id, bundle.number, error_maps.quantised(result.errors), "audit-maps")


def _keep_problem(dataset: Dataset, found: AuditedLabel, bundle: NetworkBundle, problem: str) -> None:
    with dataset.store.write() as transaction:
        label_verdicts.write_problem(transaction, found.label.id, bundle.number, problem)
