"""What random audits certify of a folder's labels: for all of them, by a group in their patients' names, or by state.

A label that a person has wholly made or corrected counts as good: that is the assumption. Of all others, only audits
tell. One that was corrected in part is judged by the mask that it began with, on the assumption that a correction makes
no label worse. Nothing speaks for a mask of another network than the one that made most of those that wait, for a label
that was rejected, for a mask that was put aside, and for a scan without any: they count as bad, and so does an audit
draw that nobody answered by a correction of the whole scan, also where the scan was excluded after it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, get_args

from segqc.loop.errors import DatasetError
from segqc.quality.certificate import AuditedMask, Certificate, certify
from segqc.store.dataset_labels import DatasetLabel, DatasetLabels, LabelState, WaitingMask
from segqc.store.records import Draw

_STATES: Final[tuple[LabelState, ...]] = get_args(LabelState)
_JUDGED: Final[tuple[LabelState, ...]] = ("partly corrected", "pseudo-label", "network mask")
_OF_ALL: Final[tuple[Draw, ...]] = ("audit",)
_OF_PSEUDO_LABELS: Final[tuple[Draw, ...]] = ("audit", "pseudo-audit")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCertificate:
    """What can be said of a group of labels.

    Attributes:
        group: its name; empty for labels of no group.
        patients: how many patients the labels are of.
        said: the certificate.
        unanswered: scans whose audit nobody has answered, or that were put aside.
    """

    group: str
    patients: int
    said: Certificate
    unanswered: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What shall be certified: that a share of the labels has at least a Dice."""

    dice: float
    share: float


def certify_all(found: DatasetLabels, wanted: Wanted) -> GroupCertificate:
    """What can be said of all labels together."""
    return _certify("all", found.labels, found.labels, _OF_ALL, wanted)


def certify_groups(found: DatasetLabels, wanted: Wanted, pattern: str) -> list[GroupCertificate]:
    """What can be said of each group; each bound is for itself.

    Args:
        found: the labels.
        wanted: what shall be certified.
        pattern: a regular expression that finds the group in a patient's name, else in the scan's: its first group, or
            all that it matches.

    Raises:
        DatasetError: if the pattern is no regular expression, or no label is of a group.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DatasetError(f"the groups' pattern {pattern!r} is no regular expression: {error}") from error
    members: dict[str, list[DatasetLabel]] = defaultdict(list)
    for label in found.labels:
        match = expression.search(label.patient) or expression.search(label.scan)
        name = "" if match is None else match.group(1) if expression.groups else match.group()
        members[name or ""].append(label)
    if set(members) == {""}:
        raise DatasetError(f"the groups' pattern {pattern!r} finds nothing in the name of any patient or scan")
    groups = [_certify(name, own, own, _OF_ALL, wanted) for name, own in sorted(members.items())]
    return [group for group in groups if group.said.labels]


def certify_states(found: DatasetLabels, wanted: Wanted) -> list[GroupCertificate]:
    """What can be said of the labels of each state; pseudo-labels are judged by their own audits, too."""
    accepted = [label for label in found.labels if label.mask is not None and label.mask.accepted_at is not None]
    others = [label for label in found.labels if label.mask is not None and label.mask.accepted_at is None]
    audited: Mapping[LabelState, tuple[Sequence[DatasetLabel], Sequence[Draw]]] = {
        "partly corrected": (found.labels, _OF_ALL),
        "pseudo-label": (accepted, _OF_PSEUDO_LABELS),
        "network mask": (others, _OF_ALL),
    }
    return [
        _certify(state, own, *audited.get(state, ((), ())), wanted)
        for state in _STATES
        if (own := [label for label in found.labels if label.state == state])
    ]


def _certify(
    group: str,
    labels: Sequence[DatasetLabel],
    drawn_from: Sequence[DatasetLabel],
    draws: Sequence[Draw],
    wanted: Wanted,
) -> GroupCertificate:
    """Certify labels by random draws among the masks of scans: their own, and those of others that were corrected."""
    own = [label for label in labels if label.state is not None]
    names = {label.scan for label in own}
    masks, unanswered = list[AuditedMask](), list[str]()
    for label in drawn_from:
        if label.mask is None:
            continue
        mask = _audited(label, label.mask, draws, wanted.dice, is_wanted=label.scan in names)
        masks.append(mask)
        is_open = mask.is_good is None and label.scan in names and label.state != "corrected"
        if is_open and (mask.drawn_at is not None or label.mask.was_skipped):
            unanswered.append(label.scan)
    said = certify(len(own), sum(label.state == "corrected" for label in own), masks, share=wanted.share)
    patients = len({label.patient for label in own})
    return GroupCertificate(group=group, patients=patients, said=said, unanswered=tuple(unanswered))


def _audited(
    label: DatasetLabel, mask: WaitingMask, draws: Sequence[Draw], min_dice: float, *, is_wanted: bool
) -> AuditedMask:
    """What the draws of some kinds say of a mask.

    Args:
        label: the scan's.
        mask: of the scan.
        draws: the kinds of draws; those of pseudo-labels know the mask only since it is one.
        min_dice: a mask is good from this Dice on.
        is_wanted: whether the scan's label is one that shall be certified.
    """
    since = mask.made_at
    if "pseudo-audit" in draws and mask.accepted_at is not None:
        since = max(since, mask.accepted_at)
    drawn = [drawn.at for drawn in mask.draws if drawn.draw in draws and drawn.at >= since]
    is_left = label.state in _JUDGED and not mask.was_skipped
    return AuditedMask(
        made_at=since,
        left_at=mask.left_at,
        drawn_at=min(drawn, default=None),
        is_good=None if mask.true_dice is None else mask.true_dice >= min_dice,
        is_judged=is_wanted and is_left and not drawn,
    )
