"""Pseudo-labels of a folder: chosen from what the serving bundle says, kept as label versions, handed to trainings.

A round plans first and makes after that, as two steps: the plan is a function of the store's state and is recorded
whole, and what it asks for can be made scan by scan, and continued after a kill.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from segqc.errors import SegqcError
from segqc.loop.requests import PlannedPseudoLabel, PseudoLabelPlan, PseudoLabelResult
from segqc.networks.bundle import NETWORKS, NetworkBundle
from segqc.networks.model_file import ModelError
from segqc.progress import Progress
from segqc.quality.pseudo_labels import (
    AuditBound,
    Candidate,
    PseudoLabelChoice,
    PseudoLabelRules,
    audit_bound,
    bound_in_words,
    choose_pseudo_labels,
    weakest_interval,
)
from segqc.store import assessments, labels, pseudo_labels, scans
from segqc.store.events import SERVER
from segqc.store.labels import IGNORED, ORIGINAL, PSEUDO, NewLabel
from segqc.store.records import Actor, LabelRecord, PseudoLabelRecord, ScanRecord
from segqc.store.scans import ScanReplaced, UnknownScan
from segqc.store.store import LabelChange
from segqc.types import Assessment
from segqc.volumes import Volume, VolumeError, temporary_labels

if TYPE_CHECKING:
    from segqc.loop.dataset import Dataset, ScanEntry
    from segqc.training.segmentation import PseudoCases

logger = logging.getLogger(__name__)

_WAITING: Final[tuple[Literal["unlabelled"]]] = ("unlabelled",)
_OFF: Final = "pseudo-labels are turned off"
_NOT_WAITING: Final = "a person has labelled the scan, or it waits for no label"


class _ObsoleteError(SegqcError):
    """A planned pseudo-label that cannot be one any more."""


def uses_pseudo_labels(dataset: Dataset) -> bool:
    """Whether a round has to do with pseudo-labels: they are wanted, or were, and have to be dropped."""
    if dataset.settings.pseudo_labels.mode != "off":
        return True
    with dataset.store.read() as transaction:
        return bool(pseudo_labels.listing(transaction) or pseudo_labels.left_over(transaction))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    """The scans that wait for a person's first label, as the bundle that serves sees them, and which it accepts."""

    bundle: NetworkBundle | None
    masks: Mapping[str, LabelRecord]
    numbers: Mapping[str, int]
    supervised: int
    choice: PseudoLabelChoice


def choose_now(dataset: Dataset) -> PseudoLabelChoice:
    """The scans whose masks the rule of the settings accepts now, and why it does not accept the others.

    Scans that a person has worked on, under whatever tag, are neither.
    """
    return _choose(dataset).choice


def _choose(dataset: Dataset) -> _Waiting:
    rules = dataset.settings.pseudo_labels
    try:
        bundle = dataset.bundle()
    except ModelError as error:  # nobody can tell what its networks have seen
        logger.warning("%s", error)
        bundle = None
    dataset.refresh()
    with dataset.store.read() as transaction:
        by_people = pseudo_labels.of_people(transaction)
        waiting = [s for s in scans.listing(transaction, states=_WAITING) if s.missing_since is None]
        waiting = [s for s in waiting if s.name not in by_people]
        masks = labels.current_of_all(transaction, ORIGINAL)
        starts = labels.starts(transaction)
        assessed = assessments.latest_of_all(transaction)
    labelled = dataset.cases()  # before the splits: new scans in the folder are taken in now
    splits = dataset.patient_splits()
    supervised = sum(splits[case.patient].split == "train" for case in labelled)
    segmenter = bundle.manifest.networks["segmentation"].version if bundle and bundle.holds("segmentation") else None
    candidates = []
    for scan in waiting:
        mask = masks.get(scan.name)
        assessment = assessed.get(scan.name) if mask is not None and starts.get(scan.name) == mask.id else None
        candidates.append(_candidate(scan, mask, assessment, segmenter))
    return _Waiting(
        bundle=bundle,
        masks=masks,
        numbers={scan.name: scan.id for scan in waiting},
        supervised=supervised,
        choice=choose_pseudo_labels(candidates, rules, supervised=supervised),
    )


def plan_pseudo_labels(dataset: Dataset) -> PseudoLabelPlan:
    """Choose the scans whose masks are accepted now, and say what that changes; nothing is changed yet.

    Looked at are the scans that wait for a person's first label, with the masks and the assessments of the bundle that
    serves. An accepted mask that was accepted before by the same bundle and settings is kept; others are made anew.
    """
    rules = dataset.settings.pseudo_labels
    waiting = _choose(dataset)
    bundle, choice = waiting.bundle, waiting.choice
    with dataset.store.read() as transaction:
        before = {record.label.scan: record for record in pseudo_labels.listing(transaction)}
        left_over = pseudo_labels.left_over(transaction)
    chosen, kept = [], []
    for accepted in choice.accepted:
        mask, record = waiting.masks[accepted.scan], before.get(accepted.scan)
        number = waiting.numbers[accepted.scan]
        if record is not None and _is_as_planned(record, mask.id, bundle, rules, str(rules), number):
            kept.append(accepted.scan)
        else:
            chosen.append(
                PlannedPseudoLabel(
                    scan=accepted.scan, mask=mask.id, dice=accepted.dice, low=accepted.low, level=accepted.level
                )
            )
    names = {accepted.scan for accepted in choice.accepted}
    audits = pseudo_label_audits(dataset, rules)
    why = _OFF if rules.mode == "off" else _NOT_WAITING
    dropped = {
        scan: choice.refused.get(scan, why) for scan in sorted(before.keys() | left_over.keys()) if scan not in names
    }
    return PseudoLabelPlan(
        rule=str(rules),
        bundle=None if bundle is None else bundle.number,
        supervised=waiting.supervised,
        chosen=tuple(chosen),
        kept=tuple(kept),
        dropped=dropped,
        refused=dict(sorted(Counter(choice.refused.values()).items())),
        audited=audits.audited,
        bad=audits.bad,
        bad_bound=audits.bound,
    )


def _candidate(
    scan: ScanRecord, mask: LabelRecord | None, assessment: Assessment | None, segmenter: str | None
) -> Candidate:
    if mask is None or assessment is None:
        return Candidate(scan.name, scan.split)
    made_by = mask.bundle.segmenter_version if mask.source == "network" and mask.bundle is not None else None
    return Candidate(
        scan.name,
        scan.split,
        is_whole=all(quality.present for quality in assessment.structures),
        is_served=made_by is not None and made_by == segmenter and assessment.mask_kind == "served",
        dice=assessment.dice,
        interval=weakest_interval(assessment),
    )


def _is_as_planned(
    record: PseudoLabelRecord, mask: int, bundle: NetworkBundle | None, rules: PseudoLabelRules, rule: str, scan: int
) -> bool:
    """Whether a pseudo-label is of this mask, accepted by this bundle and by these settings."""
    by = record.label.bundle
    is_of = record.label.parent == mask and by is not None and bundle is not None and by.id == bundle.number
    settings = rule, rules.max_error, rules.is_audited(scan)
    return is_of and (record.rule, record.max_error, record.is_audited) == settings


def plan_in_words(plan: PseudoLabelPlan) -> str:
    """What a plan means: a sentence or two."""
    accepted = len(plan.chosen) + len(plan.kept)
    text = f"pseudo-labels ({plan.rule}): {accepted} accepted, {len(plan.chosen)} of them new or made anew"
    if plan.dropped:
        reasons = Counter(plan.dropped.values()).most_common()
        text += f"; {len(plan.dropped)} dropped ({', '.join(f'{count}: {reason}' for reason, count in reasons)})"
    if not accepted and plan.refused:
        text += f"; no scan can be one ({', '.join(f'{count}: {reason}' for reason, count in plan.refused.items())})"
    audits = bound_in_words(AuditBound(plan.audited, plan.bad, plan.bad_bound))
    return f"{text}. Audits: {audits}"


def make_pseudo_labels(dataset: Dataset, plan: PseudoLabelPlan, progress: Progress) -> PseudoLabelResult:
    """Do what a plan says, or what is left of it to do.

    A scan that somebody has labelled meanwhile, or whose mask has changed, gets none.

    Args:
        dataset: the folder.
        plan: of `plan_pseudo_labels`.
        progress: called after each scan.

    Raises:
        ModelError: if the files of the bundle that the plan was made with are missing or damaged.
    """
    for scan, reason in plan.dropped.items():
        # a retired scan has another name as soon as its content is back
        with contextlib.suppress(UnknownScan), dataset.store.write() as transaction:
            pseudo_labels.end(transaction, scan, reason)
    _remove_left_over(dataset)
    if not plan.chosen or plan.bundle is None:
        return PseudoLabelResult(made=0, failed={})
    bundle = dataset.bundles.open(plan.bundle)
    rules = dataset.settings.pseudo_labels
    entries = {entry.id: entry for entry in dataset.waiting()}
    with dataset.store.read() as transaction:
        made = {record.label.scan: record for record in pseudo_labels.listing(transaction)}
        numbers = {scan.name: scan.id for scan in scans.listing(transaction, states=_WAITING)}
    failed: dict[str, str] = {}
    for i, planned in enumerate(plan.chosen):
        progress.step(i, len(plan.chosen), "pseudo-labels", planned.scan)
        record, number = made.get(planned.scan), numbers.get(planned.scan)
        if (
            record is not None
            and number is not None
            and _is_as_planned(record, planned.mask, bundle, rules, plan.rule, number)
        ):
            continue  # by an earlier attempt
        try:
            if rules.mode == "off":
                raise _ObsoleteError(_OFF)
            if planned.scan not in entries:
                raise _ObsoleteError(_NOT_WAITING)
            _make(dataset, entries[planned.scan], planned, plan.rule, bundle)
        except (_ObsoleteError, VolumeError, ScanReplaced, UnknownScan, OSError) as error:
            logger.warning("%s gets no pseudo-label: %s", planned.scan, error)
            failed[planned.scan] = str(error)
    progress.step(len(plan.chosen), len(plan.chosen), "pseudo-labels", "done")
    return PseudoLabelResult(made=len(plan.chosen) - len(failed), failed=failed)


def _remove_left_over(dataset: Dataset) -> None:
    """Take away what is shown of pseudo-labels that train no more; what somebody has done with it meanwhile stays."""
    with dataset.store.read() as transaction:
        left_over = pseudo_labels.left_over(transaction)
    for scan, found in left_over.items():
        removals = [NewLabel(scan, label.tag, "removal", SERVER, parent=label.id) for label in found]
        with (
            contextlib.suppress(UnknownScan, _ObsoleteError),
            dataset.store.change_labels([LabelChange(removal, None) for removal in removals]) as change,
        ):
            if change.replaces_edits or found != [labels.current(change.transaction, scan, r.tag) for r in removals]:
                raise _ObsoleteError("it was changed meanwhile")


def _make(dataset: Dataset, entry: ScanEntry, planned: PlannedPseudoLabel, rule: str, bundle: NetworkBundle) -> None:
    """Make a mask a pseudo-label, in one transaction that sees that nothing has changed since the plan.

    Raises:
        _ObsoleteError: if the scan does not wait any more, or has another mask.
    """
    from segqc.loop.scoring import assess, current_mask, origin_of  # imports PyTorch

    scan = dataset.read_scan(entry)
    mask, _, _ = checked = current_mask(dataset, entry, scan, bundle)
    if mask.id != planned.mask:
        raise _ObsoleteError("its mask has changed meanwhile")
    result = assess(bundle, scan, *checked[1:], scan_id=entry.id, origin=origin_of(dataset, mask, scan))
    rules = dataset.settings.pseudo_labels
    ignored = (result.errors > rules.max_error).any(axis=0)
    actor = Actor(kind="system", name=f"bundle {bundle.number}", identified_by="program")
    new = NewLabel(
        entry.id, PSEUDO, "pseudo-label", actor, parent=mask.id, bundle=bundle.number, scan_sha256=entry.sha256
    )
    with temporary_labels(Volume(ignored.astype(np.uint8), scan.affine, scan.acquisition_axis)) as path:
        changes = [LabelChange(new, dataset.store.label_file(mask)), LabelChange(replace(new, tag=IGNORED), path)]
        with dataset.store.change_labels(changes) as change:
            now, start = scans.get(change.transaction, entry.id), labels.start_of(change.transaction, entry.id)
            if now.state != "unlabelled" or pseudo_labels.is_of_people(change.transaction, entry.id):
                raise _ObsoleteError(_NOT_WAITING)
            if change.replaces_edits:  # not seen by any sync yet
                raise _ObsoleteError("somebody has put a label of their own in its pseudo-label's place")
            if start is None or start.id != planned.mask:
                raise _ObsoleteError("its mask has changed meanwhile")
            if now.split != "train":
                raise _ObsoleteError("its patient validates by now")
            pseudo_labels.end(change.transaction, entry.id, f"accepted anew by bundle {bundle.number}")
            label, ignored_label = change.versions
            pseudo_labels.add(
                change.transaction,
                label,
                ignored_label,
                dice=planned.dice,
                low=planned.low,
                level=planned.level,
                rule=rule,
                max_error=rules.max_error,
                is_audited=rules.is_audited(now.id),
            )


def pseudo_cases(dataset: Dataset) -> PseudoCases:
    """The accepted pseudo-labels, ready to train on; none where they are turned off.

    Each carries what the networks of its bundle have seen; where the bundle's files are gone, nobody knows that, and
    the pseudo-label is left out.
    """
    from segqc.training.cases import Case
    from segqc.training.segmentation import NO_PSEUDO_CASES, PseudoCases

    if dataset.settings.pseudo_labels.mode == "off":
        return NO_PSEUDO_CASES
    with dataset.store.read() as transaction:
        records = pseudo_labels.listing(transaction)
        waiting = {scan.name: scan for scan in scans.listing(transaction, states=_WAITING)}
    seen = _seen_by(dataset, {r.label.bundle.id for r in records if r.label.bundle is not None})
    cases, patients = [], set[str]()
    for record in records:
        scan, by = waiting[record.label.scan], record.label.bundle
        if scan.split != "train" or by is None or by.id not in seen:
            continue
        patients |= {*seen[by.id]}
        cases.append(
            Case(
                scan.name,
                scan.patient,
                dataset.folder / scan.file,
                dataset.store.label_file(record.label),
                str(dataset.store.view_file(record.label).relative_to(dataset.folder)),
                scan.sha256,
                dataset.settings.intake,
                weight=record.dice,
                ignored=dataset.store.label_file(record.ignored),
                fetch=dataset.fetcher(scan),
            )
        )
    return PseudoCases(tuple(cases), tuple(sorted(patients)))


def _seen_by(dataset: Dataset, bundles: set[int]) -> Mapping[int, set[str]]:
    """The patients that the networks of each bundle have seen; without the bundles whose files are gone."""
    found: dict[int, set[str]] = {}
    for number in bundles:
        try:
            bundle = dataset.bundles.open(number)
            found[number] = {name for n in NETWORKS if bundle.holds(n) for name in bundle.card(n).seen}
        except ModelError as error:
            logger.warning(
                "pseudo-labels of bundle %d do not train, as nobody knows what it has seen: %s", number, error
            )
    return found


def pseudo_label_audits(dataset: Dataset, rules: PseudoLabelRules, *, simulated: bool = False) -> AuditBound:
    """What people's corrections of randomly drawn pseudo-labels say of all that the rule accepts.

    Counted are those that this very rule has accepted, by whatever bundle: audits of a stricter one would vouch for
    masks of a kind that nobody has looked at.

    Args:
        dataset: the folder.
        rules: its settings.
        simulated: whether simulated corrections are wanted, instead of people's.
    """
    with dataset.store.read() as transaction:
        found = pseudo_labels.audited(transaction, simulated=simulated, rule=str(rules))
    return audit_bound([audit.true_dice for audit in found], rules.min_dice)
