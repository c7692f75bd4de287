"""A trained segmentation network: load it, predict a label map, predict with the test-time augmentation group."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from segqc.networks.augmentation import Member, tta_group
from segqc.networks.inference import NOWHERE, Window, all_windows, canonical_scan, not_air, windows_near
from segqc.networks.model import TrainedNetwork
from segqc.networks.unet import MeanOfNetworks
from segqc.quality.error_maps import bounding_box, entropy_map
from segqc.types import BackendName, BoolArray, FloatArray, LabelArray, Structure
from segqc.volumes import CanonicalFrame, Volume, native_support, to_native

HalfArray: TypeAlias = npt.NDArray[np.float16]

PLAUSIBLE: Final = 0.01
"""The probability of foreground from which a structure may be there, whatever the mask says."""
_NEGLIGIBLE: Final = 1e-4  # a probability of foreground that adds nothing to a soft output's sums


@dataclass(frozen=True, slots=True)
class Prediction:
    """A label map and the class logits behind it.

    Attributes:
        labels: the label map, on the scan's grid.
        logits: background first, (1 + V, a, b, c) in the canonical frame; where the network did not look, background.
        frame: the frame.
    """

    labels: Volume
    logits: FloatArray
    frame: CanonicalFrame

    @property
    def probabilities(self) -> FloatArray:
        """The class probabilities on the scan's grid: background first, shape (1 + V, n0, n1, n2)."""
        return _softmax(to_native(self.logits, self.frame, order=1))

    @property
    def plausible(self) -> BoolArray:
        """Where foreground has a probability of `PLAUSIBLE` at least: (a, b, c) in the canonical frame."""
        return np.asarray(self.foreground_log_odds >= _log_odds(PLAUSIBLE))

    @property
    def foreground_log_odds(self) -> FloatArray:
        """The logit of the probability of foreground: (a, b, c) in the canonical frame."""
        background, *classes = torch.from_numpy(self.logits)
        return np.asarray((functools.reduce(torch.logaddexp, classes) - background).numpy(), np.float32)


@dataclass(frozen=True, slots=True)
class SoftOutput:
    """What a network's soft output says of one structure of its own mask.

    Attributes:
        dice: the mask's Dice with the probabilities in place of the truth.
        entropy: of the probabilities, in nats per voxel of the mask.
    """

    dice: float
    entropy: float


@dataclass(frozen=True, slots=True)
class TtaPrediction:
    """The median mask, each member's mask mapped back, and the members' mean probabilities (1 + V, n0, n1, n2)."""

    labels: Volume
    members: tuple[LabelArray, ...]
    mean_probabilities: FloatArray


class Segmenter(TrainedNetwork):
    """A segmentation network with exclusive classes: background and the label values of its card."""

    kind = "segmentation"

    @classmethod
    def load(cls, path: Path, backend: BackendName = "pytorch") -> Segmenter:
        """Read a model file.

        Args:
            path: the file.
            backend: what is to compute it.

        Raises:
            ModelError: if the file is missing, foreign or damaged.
            BackendError: if the backend is not there, or wrong on this machine.
        """
        card, (network,) = cls._read(path)
        return cls(card, network, backend).ready()

    @classmethod
    def load_members(cls, path: Path, backend: BackendName = "pytorch") -> tuple[Segmenter, ...]:
        """Read a file of `save_members`; errors as of `load`."""
        card, (network,) = cls._read(path)
        members = network.members if isinstance(network, MeanOfNetworks) else (network,)
        cards = (replace(card, members=1, seen=card.seen_by(i), members_seen=()) for i in range(card.members))
        return tuple(cls(own, member, backend).ready() for own, member in zip(cards, members, strict=True))

    @staticmethod
    def save_members(members: Sequence[Segmenter], path: Path) -> None:
        """Write several networks of one plan into one file."""
        of_members = tuple(member.card.seen for member in members)
        seen = tuple(sorted({patient for of_member in of_members for patient in of_member}))
        card = replace(members[0].card, seen=seen, members=len(members), members_seen=of_members)
        Segmenter(card, MeanOfNetworks([member.network for member in members])).save(path)

    def predict(self, scan: Volume) -> Prediction:
        """Segment a scan; the result lies on the scan's own grid."""
        frame = self.frame(scan)
        image = canonical_scan(scan, frame)
        windows, elsewhere = self._windows(image), (0.0, *[NOWHERE] * len(self.values))
        logits = self.run(torch.from_numpy(image)[None, None], windows=windows, elsewhere=elsewhere)[0].numpy()
        return Prediction(self._labels(logits, scan, frame), logits, frame)

    def soft_outputs(self, prediction: Prediction, structures: Sequence[Structure]) -> tuple[SoftOutput, ...]:
        """What its own probabilities say of its mask of each structure, in the canonical frame.

        Args:
            prediction: of this network.
            structures: structures of its label values.
        """
        near = prediction.foreground_log_odds >= _log_odds(_NEGLIGIBLE)
        logits = prediction.logits[:, near]  # a copy; elsewhere nothing is to be added up
        labels = np.where(logits[1:].max(axis=0) > logits[0], np.array(self.values)[logits[1:].argmax(axis=0)], 0)
        probabilities = _softmax(logits)
        found = []
        for structure in structures:
            p = probabilities[[1 + self.values.index(value) for value in structure.values]].sum(axis=0)
            mask = structure.mask(labels)
            size, expected = float(np.count_nonzero(mask)), float(p.sum(dtype=np.float64))
            shared = float(p[mask].sum(dtype=np.float64))
            # less than a voxel's worth of truth, and no mask: absent, and rightly so
            dice = 2 * shared / (size + expected) if size or expected >= 1 else 1.0
            found.append(SoftOutput(dice, float(entropy_map(p).sum(dtype=np.float64)) / max(1.0, size)))
        return tuple(found)

    def predict_tta(self, scan: Volume, gammas: Sequence[float] = ()) -> TtaPrediction:
        """Segment a scan once per member of the augmentation group (paper, section 3.1).

        The members share the scan's windows. The median mask is the class of largest median probability over them.

        Args:
            scan: the scan.
            gammas: gammas that the group is multiplied with; none by default.
        """
        return self.predict_both(scan, gammas)[1]

    def predict_both(self, scan: Volume, gammas: Sequence[float] = ()) -> tuple[Prediction, TtaPrediction]:
        """What `predict` and `predict_tta` say: the group's first member is the scan as it is. Arguments as there."""
        frame = self.frame(scan)
        image = torch.from_numpy(canonical_scan(scan, frame))
        contrasts = [Member("contrast", gamma=gamma).apply(image) for gamma in (None, *gammas)]
        logits = self._run(torch.stack(contrasts), tta_group(transposes=self.card.transposes))
        # half precision: the whole group of a 512 x 512 x 200 scan must stay in memory for the median
        probabilities = np.empty(logits.shape, np.float16)
        for member, of_member in zip(probabilities, logits, strict=True):
            member[:] = torch.softmax(torch.from_numpy(of_member), dim=0).numpy()
        plain = Prediction(self._labels(logits[0], scan, frame), logits[0].copy(), frame)
        del logits
        median = _median(probabilities)
        mean = probabilities.mean(axis=0, dtype=np.float32)
        others = (self._labels(_log(p.astype(np.float32)), scan, frame) for p in probabilities[1:])
        members = tuple(np.asarray(labels.array, np.uint8) for labels in (plain.labels, *others))
        return plain, TtaPrediction(
            labels=self._labels(_log(median), scan, frame),
            members=members,
            mean_probabilities=_normalised(to_native(mean, frame, order=1)),
        )

    def _windows(self, image: FloatArray) -> list[Window]:
        """The windows of a scan (a, b, c) that are more than air."""
        return windows_near(all_windows(image.shape, self.card.plan.patch), not_air(image))

    def _run(self, contrasts: torch.Tensor, members: Sequence[Member]) -> FloatArray:
        """Logits (G * M, 1 + V, a, b, c) of a scan in G contrasts (G, a, b, c), of M members each, brought back."""
        windows = self._windows(contrasts[0].numpy())

        def of_members(inputs: torch.Tensor) -> torch.Tensor:
            answers: dict[tuple[int, int], torch.Tensor] = {}
            for transpose in (False, True):  # members of one shape go together
                chosen = [
                    (g, m) for g in range(len(contrasts)) for m, of in enumerate(members) if of.transpose is transpose
                ]
                if chosen:
                    batch = torch.cat([members[m].apply(inputs[:, g : g + 1]) for g, m in chosen])
                    answers |= zip(chosen, self.backend(batch).split(len(inputs)), strict=True)
            return torch.cat([members[m].invert(answers[g, m]) for g, m in sorted(answers)], dim=1)

        count = len(contrasts) * len(members)
        elsewhere = (0.0, *[NOWHERE] * len(self.values)) * count
        logits = self.run(contrasts[None], of_members, windows=windows, elsewhere=elsewhere)
        return np.asarray(logits[0].numpy().reshape(count, -1, *contrasts.shape[1:]), np.float32)

    def _labels(self, logits: FloatArray, scan: Volume, frame: CanonicalFrame) -> Volume:
        """The label map of logits in the canonical frame: of largest logit after linear interpolation."""
        labels = np.zeros(frame.native_shape, np.uint8)
        # interpolated logits of a class exceed the background's only near voxels where they do so
        above_background = bounding_box((logits[1:] > logits[0]).any(axis=0))
        if above_background is not None:
            box = native_support(above_background, frame)
            found = np.zeros(labels[box].shape, np.uint8)
            best = np.zeros(found.shape, np.float32)
            for value, of_class in zip(self.values, logits[1:], strict=True):
                above = to_native(of_class - logits[0], frame, order=1, box=box)
                better = above > best
                found[better] = value
                np.maximum(best, above, out=best)
            labels[box] = found
        return Volume(labels, scan.affine, scan.acquisition_axis)


def _median(probabilities: HalfArray) -> FloatArray:
    """The median over the members."""
    result = np.empty(probabilities.shape[1:], np.float32)
    for c in range(result.shape[0]):  # a class at a time: the members are sorted in single precision
        result[c] = np.median(probabilities[:, c].astype(np.float32), axis=0, overwrite_input=True)
    return result


def _log_odds(probability: float) -> float:
    return float(np.log(probability / (1 - probability)))


def _log(probabilities: FloatArray) -> FloatArray:
    return np.asarray(np.log(np.maximum(probabilities, 1e-4)), np.float32)


def _softmax(logits: FloatArray) -> FloatArray:
    """Softmax over the first axis, in place: the array may be large."""
    logits -= logits.max(axis=0, keepdims=True)
    np.exp(logits, out=logits)
    return _normalised(logits)


def _normalised(weights: FloatArray) -> FloatArray:
    weights /= weights.sum(axis=0, keepdims=True)
    return weights
