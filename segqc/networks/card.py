"""What a model file says of itself: its plan, structures, calibration and scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from pydantic import TypeAdapter

from segqc.networks.plan import NetworkPlan
from segqc.quality.calibration import MapCalibration, OutputForm, StructureCalibration
from segqc.quality.report_card import ReportCard
from segqc.quality.unlikeness import UnlikenessReference
from segqc.types import MaskDice, Structure

NetworkName: TypeAlias = Literal["segmentation", "segqc"]


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Everything about a model but its weights; it lies in the model file, so that the file alone is enough.

    ``seen`` names the patients whose labels the network, or a network it was started from, has trained from.
    ``members`` networks of the plan answer together, with the mean of their logits. With ``average_flips`` the answer
    is the mean over in-plane flips; with ``hide_mask`` half of these are looked at without the mask.
    ``map_calibration`` has one entry per structure, or none: then the logits are taken as they are.
    ``scores`` are the measures on the cases that validate, by the words that are shown. ``accuracy`` sums them up, from
    0 to 1: the mean Dice of a segmentation network, one minus the mean error of SegQC-Net's estimated Dice.
    ``validation`` has the Dice of a segmentation network's mask of each validation scan, the mean over its structures.
    ``report`` says what SegQC-Net's estimates are worth, ``unlikeness`` what scans are compared with. These three are
    no part of a model's version.
    ``people`` is the card of the network that judges people's masks, which lies in SegQC-Net's file.
    ``members_seen`` names, for each member, those of ``seen`` whose labels it has trained from; patients whose labels
    only chose its best epoch are not among them. Where nobody knows there is none.
    """

    kind: NetworkName
    plan: NetworkPlan
    structures: tuple[Structure, ...]
    values: tuple[int, ...]
    seen: tuple[str, ...]
    output_form: OutputForm = "truth"
    average_flips: bool = False
    hide_mask: bool = False
    transposes: bool = False
    calibration: tuple[StructureCalibration, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    accuracy: float | None = None
    validation: tuple[MaskDice, ...] = ()
    members: int = 1
    map_calibration: tuple[MapCalibration, ...] = ()
    report: ReportCard | None = None
    unlikeness: UnlikenessReference | None = None
    people: ModelCard | None = None
    members_seen: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        """Check that what the members have seen is known of all of them, or of none."""
        if len(self.members_seen) not in (0, self.members):
            raise ValueError(f"{self.members} members, and what {len(self.members_seen)} of them have seen")

    def seen_by(self, member: int) -> tuple[str, ...]:
        """The patients whose labels a member has trained from, by its number; all of ``seen`` where nobody knows."""
        return self.members_seen[member] if self.members_seen else self.seen


CARDS: TypeAdapter[ModelCard] = TypeAdapter(ModelCard)
