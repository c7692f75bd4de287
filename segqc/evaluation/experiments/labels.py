"""What estimates are worth by who made the mask: masks whose truth is known, of patients new to the networks.

A network's mask is wrong wherever the scan is hard; a person's is right but for a few errors. So masks of several
origins are made of one scan, and SegQC-Net, told who made them and not told, stands beside estimates of the truth that
never see the mask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Final, Literal, TypeAlias, get_args

import numpy as np

from segqc.evaluation.methods.estimates import AssessedMask, Estimator
from segqc.evaluation.methods.maps import CrossFittedMean, ScanOnly, SoftOutput
from segqc.evaluation.methods.tta import Tta
from segqc.networks.assessor import AssessmentResult, Assessor
from segqc.networks.bundle import NetworkBundle
from segqc.networks.segmenter import Segmenter
from segqc.quality.boxes import BoxSettings, find_boxes, largest_evidence
from segqc.quality.error_maps import difference, extract_errors
from segqc.quality.metrics import true_metrics
from segqc.quality.proposal import propose
from segqc.quality.variability import nearest_truth
from segqc.training.crossfit import early_networks
from segqc.training.implanted_errors import ErrorKind, implant_errors
from segqc.types import ErrorBox, FloatArray, LabelArray, MaskSource, Structure, StructureQuality, applying
from segqc.volumes import Volume, through_plane_axis
from segqc.volumes.slices import unchanged

Origin: TypeAlias = Literal[
    "untouched", "implanted", "second observer", "half corrected", "unchanged", "served", "strange"
]
"""Whose a mask is: an expert's as it is, or with implanted errors; another observer's; the served network's of which
somebody has corrected half the slices, or submitted it unchanged; the served network's; another network's."""
View: TypeAlias = Literal["raw", "extracted"]
"""Boxes of the error map as it is, which the panel, the check and the proposal show, and after error extraction."""

ORIGINS: Final[tuple[Origin, ...]] = get_args(Origin)
VIEWS: Final[tuple[View, ...]] = get_args(View)
OF_NETWORKS: Final[frozenset[Origin]] = frozenset({"served", "strange"})
TOLD: Final = "SegQC, told"
NOT_TOLD: Final = "SegQC, not told"
SCAN_ONLY: Final = "scan only"
FOLDS: Final = "cross-fitted mean"
SOFT: Final = "soft output"
TTA: Final = "TTA"
ESTIMATORS: Final = (TOLD, NOT_TOLD, SCAN_ONLY, FOLDS, SOFT, TTA)
IMPLANTED: Final = 3
"""Masks of a scan with implanted errors."""
STRANGE: Final = 2
"""Masks of a scan by strange networks, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxWorth:
    """What the boxes of one view are worth in a mask.

    Attributes:
        boxes: how many there are.
        found: how many of the errors that are to be found one of them touches.
        proposed: the true Dice of the mask's proposal, all of these boxes taken.
        accepted: that with those boxes only in which the proposal is nearer to the truth than the mask.
    """

    boxes: int
    found: int
    proposed: float
    accepted: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedMask:
    """One mask; a Dice is the mean over its structures that have a true one.

    Attributes:
        scan, patient, origin, kinds: what it is, and which errors were implanted.
        dice: the true one.
        estimates: that of each estimator; None where it says nothing of such masks.
        covered: the share of its structures whose prediction interval holds; None without one.
        evidence: the largest of an error in its error maps, told who made it (`largest_evidence`).
        errors: errors of single slices that are to be found.
        boxes: what the boxes of each view are worth.
    """

    scan: str
    patient: str
    origin: Origin
    kinds: tuple[ErrorKind, ...] = ()
    dice: float
    estimates: Mapping[str, float | None]
    covered: float | None
    evidence: float | None = None
    errors: int
    boxes: Mapping[View, BoxWorth]


# ---------------------------------------------------------------------------------------------------------- who judges


@dataclass(frozen=True, slots=True, eq=False)
class UnseenNetworks:
    """The networks of a bundle that have not trained from a patient's labels.

    Attributes:
        assessor: SegQC-Net, or those members of it.
        served: makes the masks as they are served: the segmentation network, or where it has seen the patient, that of
            the patient's fold.
        folds: the segmentation networks of folds.
        strange: networks whose masks SegQC-Net takes for strange ones.
    """

    assessor: Assessor
    served: Segmenter
    folds: tuple[Segmenter, ...]
    strange: tuple[Segmenter, ...]


class BundleNetworks:
    """All networks of a bundle, and those of its folds at early epochs."""

    def __init__(self, bundle: NetworkBundle, training: Path) -> None:
        """Load them.

        Args:
            bundle: with both networks, and those of the folds.
            training: the folder of SegQC-Net's training, which may be gone.

        Raises:
            ModelError: if a network is missing or damaged.
            BackendError: if the backend cannot compute one on this machine.
        """
        self._assessor = bundle.assessor()
        self._segmenter = bundle.segmenter()
        self._folds = bundle.fold_networks()
        self._early = [early_networks(fold, training) for fold in self._folds]

    @property
    def structures(self) -> tuple[Structure, ...]:
        """What they segment and assess."""
        return self._assessor.structures

    @property
    def values(self) -> tuple[int, ...]:
        """The label values of the structures."""
        return self._assessor.values

    def unseen_by(self, patient: str) -> UnseenNetworks | None:
        """Those that have not trained from a patient's labels; None where nothing could judge, or make masks."""
        assessor = self._assessor.unseen_by(patient)
        unseen = [i for i, fold in enumerate(self._folds) if patient not in fold.card.seen]
        folds = tuple(self._folds[i] for i in unseen)
        is_new = patient not in self._segmenter.card.seen
        if assessor is None or not folds:
            return None
        early = tuple(network for i in unseen for network in self._early[i])
        served = self._segmenter if is_new else folds[0]
        return UnseenNetworks(assessor, served, folds, (*(folds if is_new else folds[1:]), *early))


# ----------------------------------------------------------------------------------------------------------- the masks


@dataclass(frozen=True, slots=True, eq=False)
class _Mask:
    origin: Origin
    labels: LabelArray
    kinds: tuple[ErrorKind, ...] = ()
    maker: Segmenter | None = None  # of a network's mask
    made_of: LabelArray | None = None  # the served mask that a person went on from


def judge_scan(
    networks: UnseenNetworks,
    scan: str,
    patient: str,
    image: Volume,
    truth: LabelArray,
    observers: Sequence[LabelArray] = (),
    *,
    seed: int,
    min_error_mm2: float,
) -> tuple[JudgedMask, ...]:
    """Make the masks of a scan, and judge them by every estimator; a function of the scan's name and the seed.

    Args:
        networks: none has seen the patient.
        scan: its name.
        patient: whose it is.
        image: the scan.
        truth: an expert's label map of it, (n0, n1, n2).
        observers: other observers' label maps of it.
        seed: of what is implanted and drawn.
        min_error_mm2: the smallest box of a true error that is to be found.
    """
    of_scan = int.from_bytes(hashlib.sha256(scan.encode()).digest()[:8])
    judge = _Judge(networks, image, truth, observers, min_error_mm2)
    made = _masks(networks, image, truth, observers, np.random.default_rng((seed, of_scan)))
    found = (judge.judge(scan, patient, mask) for mask in made)
    return tuple(mask for mask in found if mask is not None)


def _masks(
    networks: UnseenNetworks,
    image: Volume,
    truth: LabelArray,
    observers: Sequence[LabelArray],
    rng: np.random.Generator,
) -> Iterator[_Mask]:
    yield _Mask("untouched", truth)
    for _ in range(IMPLANTED):
        implanted = implant_errors(truth, image, networks.assessor.structures, rng)
        yield _Mask("implanted", implanted.labels, implanted.kinds)
    for observer in observers:
        yield _Mask("second observer", observer)
    served = _predicted(networks.served, image)
    yield _Mask("half corrected", half_corrected(served, truth, through_plane_axis(image), rng), made_of=served)
    yield _Mask("unchanged", served, made_of=served)
    yield _Mask("served", served, maker=networks.served)
    drawn = rng.permutation(len(networks.strange))[:STRANGE]
    for network in (networks.strange[int(i)] for i in sorted(drawn)):
        yield _Mask("strange", _predicted(network, image), maker=network)


def _predicted(network: Segmenter, image: Volume) -> LabelArray:
    return np.asarray(network.predict(image).labels.array, np.uint8)


def half_corrected(mask: LabelArray, truth: LabelArray, axis: int, rng: np.random.Generator) -> LabelArray:
    """The mask with the truth in a random half of the slices that hold anything.

    Args:
        mask: a label map (n0, n1, n2).
        truth: the true one.
        axis: the through-plane axis.
        rng: draws the slices.
    """
    there = np.flatnonzero(((mask > 0) | (truth > 0)).any(axis=tuple(a for a in range(3) if a != axis)))
    chosen = rng.permutation(there)[: len(there) // 2]
    corrected = mask.copy()
    np.moveaxis(corrected, axis, 0)[chosen] = np.moveaxis(truth, axis, 0)[chosen]
    return corrected


# ---------------------------------------------------------------------------------------------------------- judge them


@dataclass(slots=True, eq=False)
class _Judge:
    """All estimators of one scan's masks."""

    networks: UnseenNetworks
    image: Volume
    truth: LabelArray
    observers: Sequence[LabelArray]
    min_error_mm2: float
    others: Mapping[str, Estimator] = field(init=False)

    def __post_init__(self) -> None:
        assessor, structures = self.networks.assessor, self.networks.assessor.structures
        others: dict[str, Estimator] = {FOLDS: CrossFittedMean(self.networks.folds), SOFT: SoftOutput(structures)}
        if assessor.card.hide_mask:  # it has trained from empty masks
            others[SCAN_ONLY] = ScanOnly([assessor])
        self.others = others

    def judge(self, scan: str, patient: str, mask: _Mask) -> JudgedMask | None:
        """What is said, and what is true, of a mask; None where no structure has a true Dice."""
        structures = self.networks.assessor.structures
        told = self._assess(mask, is_told=True)
        blind = told if mask.origin in OF_NETWORKS else self._assess(mask, is_told=False)
        said = {
            name: [q.estimated.dice for q in result.assessment.structures]
            for name, result in ((TOLD, told), (NOT_TOLD, blind))
        }
        maker = mask.maker or self.networks.served
        assessed = AssessedMask(self.image, self._volume(mask.labels), maker)
        others = {**self.others, TTA: Tta(structures)} if mask.origin == "served" else self.others
        said |= {name: [e.metrics.dice for e in other.estimate(assessed)] for name, other in others.items()}
        true = [true_metrics(s.mask(mask.labels), s.mask(self.truth)).dice for s in structures]
        there = [k for k, dice in enumerate(true) if dice is not None and said[TOLD][k] is not None]
        if not there:
            return None
        qualities = told.assessment.structures
        errors = self._errors(mask.labels)
        return JudgedMask(
            scan=scan,
            patient=patient,
            origin=mask.origin,
            kinds=mask.kinds,
            dice=_known_mean([true[k] for k in there]) or 0.0,
            estimates={
                name: _known_mean([said[name][k] for k in there]) if name in said else None for name in ESTIMATORS
            },
            covered=_covered([qualities[k] for k in there], [true[k] for k in there]),
            evidence=max(largest_evidence(error, through_plane_axis(self.image)) for error in told.errors),
            errors=sum(map(len, errors)),
            boxes={
                "raw": self._worth([q.raw.boxes for q in qualities], told.errors, mask.labels, errors),
                "extracted": self._worth([q.extracted.boxes for q in qualities], told.errors, mask.labels, errors),
            },
        )

    def _assess(self, mask: _Mask, *, is_told: bool) -> AssessmentResult:
        assessor, served = self.networks.assessor, self.networks.served
        made_of = mask.made_of if is_told else None
        is_persons = is_told and mask.origin not in OF_NETWORKS
        source: MaskSource = "person" if is_persons else "network"
        slices = () if made_of is None else unchanged(made_of, mask.labels, through_plane_axis(self.image))
        soft = None
        if mask.origin == "served" or made_of is not None:
            soft = served.soft_outputs(served.predict(self.image), assessor.structures)
        labels = self._volume(mask.labels)
        return assessor.assess(self.image, labels, scan_id="scan", soft=soft, source=source, network_slices=slices)

    def _volume(self, labels: LabelArray) -> Volume:
        return Volume(labels, self.image.affine, self.image.acquisition_axis)

    def _errors(self, mask: LabelArray) -> list[tuple[ErrorBox, ...]]:
        """The errors of single slices that are to be found, of each structure: what is left after extraction.

        Where observers differ, a mask that agrees with one of them is right.
        """
        axis, assessor = through_plane_axis(self.image), self.networks.assessor
        truth = nearest_truth(mask, self.truth, self.observers)
        settings = BoxSettings(min_area_mm2=self.min_error_mm2, max_area_mm2=float("inf"), min_area_share=None)
        found = []
        for structure in assessor.structures:
            held = structure.mask(mask)
            extraction = assessor.settings.extraction.for_structure(structure.name)
            error = extract_errors(
                difference(held, structure.mask(truth)), held, axis, self.image.spacing_mm, extraction
            )
            found.append(find_boxes(error, axis, self.image.spacing_mm, settings))
        return found

    def _worth(
        self,
        boxes: Sequence[Sequence[ErrorBox]],
        maps: FloatArray,
        mask: LabelArray,
        errors: Sequence[Sequence[ErrorBox]],
    ) -> BoxWorth:
        """What boxes are worth, of each structure; ``errors`` are to be found."""
        structures, axis = self.networks.assessor.structures, through_plane_axis(self.image)
        whole = propose(mask, maps, structures, boxes, axis)
        helping = [[box for box in of if _is_nearer(whole, mask, self.truth, box, axis)] for of in boxes]
        pairs = zip(errors, boxes, strict=True)
        return BoxWorth(
            boxes=sum(map(len, boxes)),
            found=sum(any(_touch(error, box) for box in own) for wanted, own in pairs for error in wanted),
            proposed=self._dice(whole),
            accepted=self._dice(propose(mask, maps, structures, helping, axis)),
        )

    def _dice(self, mask: LabelArray) -> float:
        found = [true_metrics(s.mask(mask), s.mask(self.truth)).dice for s in self.networks.assessor.structures]
        return _known_mean([dice for dice in found if dice is not None]) or 0.0


def _covered(qualities: Sequence[StructureQuality], true: Sequence[float | None]) -> float | None:
    holds = [
        ends.low <= dice <= ends.high
        for quality, dice in zip(qualities, true, strict=True)
        if dice is not None and (ends := applying(quality.intervals.dice)) is not None
    ]
    return fmean(holds) if holds else None


def _is_nearer(proposed: LabelArray, mask: LabelArray, truth: LabelArray, box: ErrorBox, axis: int) -> bool:
    of_box = (box.slice_index, slice(box.start[0], box.stop[0]), slice(box.start[1], box.stop[1]))
    new, old, true = (np.moveaxis(labels, axis, 0)[of_box] for labels in (proposed, mask, truth))
    return bool((new != true).sum() < (old != true).sum())


def _touch(one: ErrorBox, other: ErrorBox) -> bool:
    sides = zip(one.start, one.stop, other.start, other.stop, strict=True)
    return one.slice_index == other.slice_index and all(a < d and c < b for a, b, c, d in sides)


def _known_mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where one is not known, or there is none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None
