"""A trained segmentation network: load it, predict a label map, predict with the test-time augmentation group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from segqc.networks.augmentation import Member, tta_group
from segqc.networks.inference import canonical_scan
from segqc.networks.model import TrainedNetwork
from segqc.types import FloatArray, LabelArray
from segqc.volumes import CanonicalFrame, Volume, to_native

HalfArray: TypeAlias = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A label map and the class probabilities behind it: background first, shape (1 + V, n0, n1, n2)."""

    labels: Volume
    probabilities: FloatArray


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
    def load(cls, path: Path) -> Segmenter:
        """Read a model file.

        Raises:
            ModelError: if the file is missing, foreign or damaged.
        """
        return cls(*cls._read(path))

    def predict(self, scan: Volume) -> Prediction:
        """Segment a scan; the result lies on the scan's own grid."""
        frame = self.frame(scan)
        x = torch.from_numpy(canonical_scan(scan, frame))[None, None]
        logits = to_native(self.run(x)[0].numpy(), frame, order=1)
        return Prediction(self._labels(logits, scan), _softmax(logits))

    def predict_tta(self, scan: Volume, gammas: Sequence[float] = ()) -> TtaPrediction:
        """Segment a scan once per member of the augmentation group, in one batched call (paper, section 3.1).

        The median mask is the class of largest median probability over the members.

        Args:
            scan: the scan.
            gammas: gammas that the group is multiplied with; none by default.
        """
        frame = self.frame(scan)
        x = torch.from_numpy(canonical_scan(scan, frame))[None, None]
        group = tta_group(transposes=self.card.transposes, gammas=gammas)
        # half precision: the whole group of a 512 x 512 x 200 scan must stay in memory for the median
        probabilities = self._member_probabilities(x, group)
        median = np.median(probabilities, axis=0).astype(np.float32)
        mean = probabilities.mean(axis=0, dtype=np.float32)
        members = tuple(self._member_labels(p, frame, scan) for p in probabilities)
        return TtaPrediction(
            labels=self._labels(to_native(_log(median), frame, order=1), scan),
            members=members,
            mean_probabilities=_normalised(to_native(mean, frame, order=1)),
        )

    def _member_probabilities(self, x: torch.Tensor, group: Sequence[Member]) -> HalfArray:
        """Probabilities (members, 1 + V, a, b, c) in the canonical frame; members of one shape run as one batch."""
        result = np.empty((len(group), self.card.plan.out_channels, *x.shape[2:]), np.float16)
        for transposed in (False, True):
            chosen = [i for i, member in enumerate(group) if member.transpose is transposed]
            if not chosen:
                continue
            batch = torch.cat([group[i].apply(x) for i in chosen])
            for i, logits in zip(chosen, self.run(batch), strict=True):
                result[i] = torch.softmax(group[i].invert(logits), dim=0).numpy()
        return result

    def _member_labels(self, probabilities: HalfArray, frame: CanonicalFrame, scan: Volume) -> LabelArray:
        logits = to_native(_log(probabilities.astype(np.float32)), frame, order=1)
        return np.asarray(self._labels(logits, scan).array, np.uint8)

    def _labels(self, logits: FloatArray, scan: Volume) -> Volume:
        table = np.array((0, *self.values), np.uint8)
        return Volume(table[logits.argmax(axis=0)], scan.affine, scan.acquisition_axis)


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
