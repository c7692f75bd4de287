"""How unlike the scans of the training a scan is: one number of its features, with a conformal p-value.

Each network knows the features of the scans that it has trained from by their mean and deviations. The distance of
another scan is the root of its mean squared z-value (a Mahalanobis distance with a diagonal covariance: there are more
features than scans), over the median of what the training's own have when each is left out in turn. The score is the
mean over the networks.

The p-value is cross-conformal (Vovk, "Cross-conformal predictors", Annals of Mathematics and Artificial Intelligence
74, 2015): a patient that a network has not trained from has a distance by this network, to which that of the new scan
by the same network is compared. So both are made alike, and nothing of either was in the training. For a new patient
exchangeable with the calibrating ones p is at most alpha with a probability of at most 2 alpha, in practice of about
alpha. A patient counts once, however many scans and networks it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from segqc.quality.intervals import patients_needed
from segqc.quality.metrics import Values
from segqc.types import UNLIKE_LEVEL, Unlikeness

MIN_PATIENTS: Final = patients_needed(1 - UNLIKE_LEVEL)
"""With fewer calibrating patients no p-value is small enough to mark a scan."""
_MIN_TRAINED: Final = 3  # patients that distances can be measured among, one left out
_FLOOR: Final = 0.1  # of deviations, as a part of their root median square: few scans may agree by chance
_TINY: Final = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class ScanFeatures:
    """The features of a scan by each network, (networks, features), and which of the networks have not trained from it.

    Attributes:
        patient, scan: whose they are.
        values: the features.
        unseen_by: the numbers of the networks that have not trained from the patient; none, if all have.
    """

    patient: str
    scan: str
    values: Values
    unseen_by: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HeldOutPatient:
    """A patient that a network has not trained from, and the distances of its scans by this network."""

    patient: str
    distances: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class NetworkReference:
    """What one network has seen of scans, and how far from that the scans of other patients are.

    Attributes:
        mean, deviation: of each feature, over the scans that it has trained from.
        scale: the median distance of one of their patients from the others; divides all distances.
        held_out: the calibrating patients.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    scale: float
    held_out: tuple[HeldOutPatient, ...] = ()

    def distance(self, features: Values) -> float:
        """How far a scan with these features (features,) is; about 1 where it is like the training's."""
        z = (features - np.array(self.mean)) / np.array(self.deviation)
        return float(np.sqrt(np.mean(z**2)) / self.scale)


@dataclass(frozen=True, slots=True)
class UnlikenessReference:
    """What scans are compared with, by each network of an ensemble; small enough to lie on a model's card."""

    networks: tuple[NetworkReference, ...]

    @property
    def patients(self) -> tuple[str, ...]:
        """The patients that calibrate, ascending."""
        return tuple(sorted({held.patient for network in self.networks for held in network.held_out}))

    @property
    def can_mark(self) -> bool:
        """Whether there are enough calibrating patients for any scan to be marked."""
        return len(self.patients) >= MIN_PATIENTS

    def of(self, features: Values) -> Unlikeness:
        """How unlike the training's a scan is.

        Args:
            features: by each network, (networks, features).

        Raises:
            ValueError: if they are not of as many networks.
        """
        distances = [n.distance(own) for n, own in zip(self.networks, features, strict=True)]
        shares: dict[str, list[float]] = {}
        for network, distance in zip(self.networks, distances, strict=True):
            for held in network.held_out:
                shares.setdefault(held.patient, []).append(_share_from(held.distances, distance))
        return _unlikeness(float(np.mean(distances)), [float(np.mean(of)) for of in shares.values()])


def fit_unlikeness(scans: Sequence[ScanFeatures]) -> tuple[UnlikenessReference, Mapping[str, Unlikeness]] | None:
    """Learn what scans of the training look like, and calibrate on those that a network has not trained from.

    Args:
        scans: all labelled scans, features of the same networks.

    Returns:
        The reference, and how unlike the others each calibrating scan is, by its name: its own score among theirs.
        None where a network has trained from fewer than three patients.
    """
    count = len(scans[0].values) if scans else 0
    networks = []
    for k in range(count):
        network = _fit(
            np.array([s.values[k] for s in scans if k not in s.unseen_by]),
            [s.patient for s in scans if k not in s.unseen_by],
        )
        if network is None:
            return None
        networks.append(network)
    if not networks:
        return None
    held_out = [s for s in scans if s.unseen_by]
    distances = [{k: networks[k].distance(s.values[k]) for k in s.unseen_by} for s in held_out]
    reference = UnlikenessReference(tuple(_with_held_out(n, k, held_out, distances) for k, n in enumerate(networks)))
    scores = [float(np.mean([*of_networks.values()])) for of_networks in distances]
    return reference, _among_each_other(held_out, scores)


def _fit(features: Values, patients: Sequence[str]) -> NetworkReference | None:
    """The reference of a network by the scans that it has trained from, (scans, features); None with too few."""
    names, index = np.unique(patients, return_inverse=True)
    if len(names) < _MIN_TRAINED:
        return None
    medians = []
    for patient in range(len(names)):
        others = _moments(features[index != patient], index[index != patient], 1.0)
        medians.append(float(np.mean([others.distance(own) for own in features[index == patient]])))
    return _moments(features, index, max(float(np.median(medians)), _TINY))


def _moments(features: Values, patient: npt.NDArray[np.intp], scale: float) -> NetworkReference:
    """Mean and deviation of each feature, each patient counting once."""
    weight = 1 / np.bincount(patient)[patient]
    total = weight.sum()
    mean = weight @ features / total
    variance = weight @ (features - mean) ** 2 / (total - 1)
    deviation = np.sqrt(variance + _FLOOR**2 * np.median(variance) + _TINY**2)
    return NetworkReference(tuple(mean.tolist()), tuple(deviation.tolist()), scale)


def _with_held_out(
    network: NetworkReference, number: int, scans: Sequence[ScanFeatures], distances: Sequence[Mapping[int, float]]
) -> NetworkReference:
    of_patient: dict[str, list[float]] = {}
    for scan, by_network in zip(scans, distances, strict=True):
        if number in by_network:
            of_patient.setdefault(scan.patient, []).append(by_network[number])
    held_out = tuple(HeldOutPatient(patient, tuple(sorted(of))) for patient, of in of_patient.items())
    return NetworkReference(network.mean, network.deviation, network.scale, held_out)


def _among_each_other(scans: Sequence[ScanFeatures], scores: Sequence[float]) -> dict[str, Unlikeness]:
    """Each scan among those of the other patients; networks differ, their distances are of one scale."""
    of_patient: dict[str, list[float]] = {}
    for scan, score in zip(scans, scores, strict=True):
        of_patient.setdefault(scan.patient, []).append(score)
    return {
        scan.scan: _unlikeness(
            score, [_share_from(of, score) for patient, of in of_patient.items() if patient != scan.patient]
        )
        for scan, score in zip(scans, scores, strict=True)
    }


def _share_from(distances: Sequence[float], least: float) -> float:
    return float(np.mean(np.array(distances) >= least))


def _unlikeness(score: float, shares: Sequence[float]) -> Unlikeness:
    """The p-value by the share of each calibrating patient's scans that are as unlike."""
    enough = len(shares) >= MIN_PATIENTS
    # rounded, so that whole patients in thirds stay whole
    return Unlikeness(score, round((1 + sum(shares)) / (len(shares) + 1), 9) if enough else None)
