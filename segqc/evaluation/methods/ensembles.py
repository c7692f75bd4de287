"""Agreement of an ensemble of segmentation networks on a scan."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from segqc.evaluation.methods.averages import average_metrics, average_slices
from segqc.evaluation.methods.estimates import AssessedMask, Estimate, slice_sums
from segqc.networks.cache import LatestCache
from segqc.networks.segmenter import Segmenter
from segqc.quality.metrics import true_metrics, true_slice_metrics
from segqc.types import LabelArray
from segqc.volumes import Volume, through_plane_axis

Against: TypeAlias = Literal["mask", "members"]


class EnsemblePairs:
    """Mean metrics between masks of one scan by several networks.

    With ``against="mask"`` each pair is the mask under assessment and a member's mask, which stands for the truth: an
    estimate of this mask. With ``against="members"`` the pairs are the members' own, each pair in both orders: the
    ensemble's disagreement on the scan, the same for all of the scan's masks, and the form in the literature, where
    the assessed mask is the ensemble's. The default is the first, as the masks to be assessed here come from anywhere.

    Slices are ordered by the mean number of voxels in which a pair differs. A slice counts where at least half of the
    pairs have a voxel in it.

    Raises:
        ValueError: if there is no network, or one only and the pairs are the members' own, or structures differ.
    """

    def __init__(self, segmenters: Sequence[Segmenter], *, against: Against = "mask", name: str = "") -> None:
        if len(segmenters) < (2 if against == "members" else 1) or len({s.structures for s in segmenters}) != 1:
            raise ValueError(f"pairs need an ensemble of the same structures, got {len(segmenters)} networks")
        self.name = name or ("ensemble" if against == "mask" else "ensemble pairs")
        self.segmenters = tuple(segmenters)
        self.structures = segmenters[0].structures
        self.against = against
        self._last: LatestCache[list[LabelArray]] = LatestCache()

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        """Estimate from the members' masks of the scan."""
        axis = through_plane_axis(mask.scan)
        members = self._members(mask.scan)
        estimates = []
        for structure in self.structures:
            masks = [structure.mask(m) for m in members]
            if self.against == "mask":
                assessed = structure.mask(mask.labels.array)
                pairs = [(assessed, m) for m in masks]
            else:
                pairs = list(itertools.permutations(masks, 2))
            differing = np.mean([first != second for first, second in pairs], axis=0, dtype=np.float32)
            error_score = slice_sums(differing, axis)
            estimates.append(
                Estimate(
                    metrics=average_metrics([true_metrics(m, t) for m, t in pairs], "mean"),
                    slices=average_slices([true_slice_metrics(m, t, axis) for m, t in pairs], "mean"),
                    slice_error_score=error_score,
                    # the share of members that contradict the mask is an error probability; of a pair's it is none
                    error=differing if self.against == "mask" else None,
                    scan_error_score=float(error_score.sum()),
                )
            )
        return tuple(estimates)

    def _members(self, scan: Volume) -> list[LabelArray]:
        known = self._last.get(scan)
        if known is not None:
            return known
        made = [np.asarray(s.predict(scan).labels.array, np.uint8) for s in self.segmenters]
        return self._last.keep(made, scan)
