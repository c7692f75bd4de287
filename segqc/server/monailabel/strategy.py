"""MONAI Label's strategies and scoring methods: the next scan as its clients see it, and the pool's scores."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Collection, Mapping
from typing import Any, Final, TypeAlias

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy

from segqc.loop.dataset import Dataset
from segqc.loop.planted_errors import plant_error
from segqc.loop.scoring import score
from segqc.quality.drift import drift_sentence
from segqc.quality.report_card import AT_RANDOM, BY_ESTIMATE, ReportCard, estimate_sentence, order_sentence
from segqc.selection import score_of, strategies
from segqc.server.actors import current_actor
from segqc.server.monailabel.datastore import scan_info
from segqc.store import assessments, labels, leases, scans
from segqc.store.records import LeaseRecord, ScanRecord
from segqc.training import LineProgress
from segqc.types import UNLIKE, Assessment, DriftAlarm, bounds
from segqc.volumes.slices import Slices, in_words

Answer: TypeAlias = dict[str, Any]  # MONAI Label's form: JSON

WORST_SLICES: Final = 5
_TITLED_REASON: Final = 80  # characters of a reason in a title
_NOT_IN_FILE_NAMES: Final = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')
DRIFTED: Final = "drift alarm"
"""The verdict on estimates that audit draws have raised an alarm against."""


def describe(assessment: Assessment | None, asked: Collection[int] = ()) -> Answer:
    """What the answer says of a scan's mask: estimated Dice, worst slices, and the error boxes in these slices.

    An interval is ``{"low": 0.82, "high": 0.91, "level": 0.9}``, or None where there is not enough data for one, or the
    scan is unlike the training's: ``unlike_training`` says so.

    Args:
        assessment: of the mask.
        asked: the slices that are to be corrected, if not all: their boxes are told, too.
    """
    if assessment is None:
        nothing: Answer = {"estimated_dice": None, "estimated_dice_interval": None, "worst_slices": [], "boxes": []}
        return {**nothing, "unlike_training": None}
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
        if box.slice_index in slices or box.slice_index in asked
    ]
    return {
        "estimated_dice": assessment.dice,
        "estimated_dice_interval": bounds(assessment.dice_interval),
        "unlike_training": unlike_training(assessment),
        "estimated_dice_by_structure": {q.name: q.estimated.dice for q in assessment.structures if q.present},
        "estimated_dice_interval_by_structure": {
            q.name: bounds(q.intervals.dice) for q in assessment.structures if q.present
        },
        "worst_slices": list(slices),
        "boxes": boxes,
        "through_plane_axis": assessment.through_plane_axis,
        "models": {"segmentation": assessment.segmenter_version, "segqc": assessment.assessor_version},
    }


def unlike_training(assessment: Assessment) -> Answer | None:
    """How unlike the training's scans a scan is, and what that means, if anything; None where nobody knows."""
    found = assessment.unlikeness
    if found is None:
        return None
    return {"score": found.score, "p_value": found.p_value, "message": UNLIKE if found.is_marked else None}


def reliability(card: ReportCard | None, alarm: DriftAlarm | None, ordered_by: str) -> Answer:
    """Whether estimated Dice and order can be relied on, in an annotator's words.

    A drift alarm is later than the report card, and its word on the estimate counts. None without either.

    Args:
        card: of the bundle that serves.
        alarm: against it.
        ordered_by: the strategy that stands in for the estimates' order, or `BY_ESTIMATE`.
    """
    if card is None and alarm is None:
        return {"reliability": None}
    estimate = card.worst.estimate_verdict if card is not None and alarm is None else DRIFTED
    messages = [drift_sentence(alarm)] if alarm is not None else []
    if card is not None:
        messages += [estimate_sentence(card)] if alarm is None else []
        messages.append(order_sentence(card, ordered_by))
    order = card.worst.order_verdict if card is not None else None
    return {"reliability": {"estimate": estimate, "order": order, "messages": messages}}


def estimate_warning(card: ReportCard | None, alarm: DriftAlarm | None) -> str | None:
    """Why the estimated Dice cannot be relied on; None where nothing speaks against it."""
    if alarm is not None:
        return drift_sentence(alarm)
    is_noise = card is not None and card.worst.estimate_verdict == "not better than the constant"
    return estimate_sentence(card) if card is not None and is_noise else None


def _title(
    scan: ScanRecord, assessment: Assessment | None, asked: Collection[int] | None, *, is_unreliable: bool
) -> str:
    """What 3D Slicer titles the volume with, and the name of the file that it downloads: the suffix has to stay."""
    told = []
    if scan.state == "rejected" and scan.reason:
        told.append(f"rejected: {_in_a_file_name(scan.reason)}")
    if assessment is not None and assessment.dice is not None:
        between = f", {interval}" if (interval := assessment.dice_interval) is not None else ""
        told.append(f"estimated Dice {assessment.dice:.2f}{between}{', unreliable' if is_unreliable else ''}")
        if asked is not None:
            told.append(f"correct {in_words(asked)} only")
    return f"{scan.name} ({'; '.join(told)}){scan.suffix}" if told else scan.file


def _in_a_file_name(text: str) -> str:
    """A short form of a text without what no file name may hold."""
    return textwrap.shorten(_NOT_IN_FILE_NAMES.sub(" ", text), _TITLED_REASON, placeholder=" \N{HORIZONTAL ELLIPSIS}")


class Sampling(Strategy):
    """Hands out a scan to whoever asks, in one of the orders of `segqc.selection`.

    An audit or a validation draw looks to the annotator like any other scan: who knows that this one is a test works
    otherwise. Where the settings ask for slices, it is one of the scans that are asked for as a whole. A mask with a
    planted error goes by the number of the network's.
    """

    def __init__(self, name: str, dataset: Dataset) -> None:
        strategy = strategies()[name]
        super().__init__(strategy.description)
        self.name = name
        self.dataset = dataset
        self._order = strategy.order
        self._follows_card = strategy.follows_report_card
        by_baseline = strategy.score is not None and not strategy.score.is_estimate
        self._remedy = (
            f"run segqc score --method {name}" if by_baseline else "train both networks; the pool is scored then"
        )

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> Answer | None:
        """Hand out a scan; None where none is left for this annotator.

        Args:
            request: may hold ``skip_reason`` (why the scan that the annotator has is put aside) or ``resume`` (a scan
                that was put aside, or whose label was rejected, and is wanted back).
            datastore: MONAI Label's; not asked.

        Raises:
            StoreError: if the scan cannot be had back.
        """
        reason, wanted = request.get("skip_reason") or None, request.get("resume") or None
        handed_out = self._hand_out(reason, wanted)
        if handed_out is None:
            return None
        lease, skipped, scan, shown = handed_out
        plant_error(self.dataset, lease)
        checked = self._checked_before(lease)
        card, alarm = self.dataset.report_card(), self.dataset.drift_alarm()
        warning = estimate_warning(card, alarm)
        strategy = _shown_strategy(lease, card)
        is_replaced = self._follows_card and card is not None and card.ranked_by != BY_ESTIMATE
        said: Answer = {
            **scan_info(scan),
            "id": scan.name,
            "name": _title(scan, shown, lease.slices, is_unreliable=warning is not None),
            "path": str(self.dataset.scan_file(scan)),
            "strategy": strategy,
            "lease": lease.id,
            "lease_until": lease.expires_at.isoformat(),
            "label_version": lease.label_version,
            "slices": None if lease.slices is None else list(lease.slices),
            "checked_slices": None if checked is None else list(checked),
            **describe(shown, lease.slices or ()),
            **reliability(card, alarm, strategy if is_replaced else BY_ESTIMATE),
        }
        notes = [] if lease.slices is None else [f"Correct {in_words(lease.slices)} only."]
        if checked:
            notes.append(f"Of its label, {in_words(checked)} {'were' if len(checked) > 1 else 'was'} checked before.")
        if skipped is not None:
            said["skipped"] = {"scan": skipped.scan, "lease": skipped.id, "reason": reason}
            notes.append(_skip_note(skipped.scan, reason, again=skipped.scan == lease.scan))
        if wanted is None and is_replaced and card is not None:
            notes.append(order_sentence(card, strategy))
        elif wanted is None and strategy == AT_RANDOM and self.name != AT_RANDOM:
            notes.append(
                f"No open scan has what the strategy {self.name!r} goes by yet ({self._remedy}); this one was drawn "
                "uniformly at random."
            )
        if shown is not None and warning is not None:
            notes.append(warning)
        if shown is not None and shown.is_unlike:
            notes.append(f"This scan is {UNLIKE}.")
        if notes:
            said["note"] = " ".join(notes)
        return said

    def _checked_before(self, lease: LeaseRecord) -> Slices | None:
        """The slices of the label that the annotator starts from that a person has looked at; None for all."""
        if lease.label_version is None:
            return ()
        with self.dataset.store.read() as transaction:
            return labels.checked_slices(labels.get(transaction, lease.label_version))

    def _hand_out(
        self, reason: str | None, wanted: str | None
    ) -> tuple[LeaseRecord, LeaseRecord | None, ScanRecord, Assessment | None] | None:
        """Take a scan whose file still holds what it is known for; None where none is left.

        Returns:
            The lease, the one that was put aside for it, the scan, and its assessment.
        """
        rules, actor = self.dataset.settings.annotation, current_actor()
        pseudo_audits = self.dataset.settings.pseudo_labels.mode != "off"
        while True:
            with self.dataset.store.write() as transaction:
                if wanted is not None:
                    name = scans.get(transaction, wanted).name
                    lease: LeaseRecord | None = leases.resume(transaction, name, actor, rules)
                else:
                    lease = leases.acquire(
                        transaction,
                        actor,
                        self.name,
                        self._order,
                        rules,
                        skip_reason=reason,
                        pseudo_audits=pseudo_audits,
                    )
                if lease is None:
                    return None
                skipped = leases.skipped_for(transaction, lease) if wanted is None else None
            with self.dataset.store.read() as transaction:
                scan = scans.get(transaction, lease.scan)
                shown = assessments.read(transaction, lease.assessment) if lease.assessment is not None else None
            if self.dataset.is_unchanged(scan):
                return lease, skipped, scan, shown
            with self.dataset.store.read() as transaction:
                now = leases.get(transaction, lease.id)
                scan = scans.get(transaction, now.scan)
            if now == lease and scan.missing_since is None:
                return lease, skipped, scan, shown  # only touched: the content is the same


def _shown_strategy(lease: LeaseRecord, card: ReportCard | None) -> str:
    """The strategy that chose a scan; of an audit or validation draw, the one that other scans come by."""
    wanted = strategies().get(lease.strategy)
    if lease.draw == "strategy" or wanted is None or not wanted.follows_report_card:
        return lease.strategy
    return lease.strategy if card is None or card.ranked_by == BY_ESTIMATE else card.ranked_by


def _skip_note(scan: str, reason: str | None, *, again: bool) -> str:
    if again:
        return f"No other scan is left: {scan!r} is the one that you had."
    back = f"to have it back, ask with resume={scan!r} (or POST /segqc/leases/{scan}/resume)"
    if reason is not None:
        return f"The scan {scan!r} that you had was put aside as skipped: {reason}; {back}."
    return (
        f"The scan {scan!r} that you had was put aside as skipped, as you asked for another one; {back}. Please say "
        f'why you skipped it: POST /segqc/leases/{scan}/skip with {{"reason": "..."}}, or next time send skip_reason.'
    )


class PoolScoring(ScoringMethod):
    """One method over all scans that wait for a label; what the current models have scored is left as it is."""

    def __init__(self, method: str, dataset: Dataset) -> None:
        super().__init__(score_of(method).description)
        self.method = method
        self.dataset = dataset

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, object]:
        """Score at once; the server's routes leave it to a worker."""
        summary = score(self.dataset, self.method, LineProgress(), force=bool(request.get("force", False)))
        return {"method": self.method, **dataclasses.asdict(summary)}
