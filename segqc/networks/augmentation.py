"""The test-time augmentation group and its inverses (paper, section 3.1).

Arrays are canonical: the last three axes are spatial, the two in-plane axes are -3 and -2, the through-plane axis is
-1; any axes may lead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IN_PLANE = (-3, -2)


@dataclass(frozen=True, slots=True)
class Member:
    """One augmentation: a contrast change, then a transpose of the in-plane axes, then flips along them.

    Flips and transpose make the dihedral group of the square; a rotation by 90 degrees is a transpose and one flip.

    Attributes:
        name: unique within a group.
        flips: whether to flip along the first and the second in-plane axis, after the transpose.
        transpose: whether to exchange the in-plane axes.
        gamma: exponent on the intensities, scaled to [0, 1] over the spatial axes; None leaves them alone.
    """

    name: str
    flips: tuple[bool, bool] = (False, False)
    transpose: bool = False
    gamma: float | None = None

    def apply(self, image: torch.Tensor) -> torch.Tensor:
        """Augment an image (..., a, b, c); with `transpose` the result is (..., b, a, c).

        Each leading index (a channel) is scaled by its own range and back, so that binary channels keep their values.
        """
        if self.gamma is not None:
            image = _contrast(image, self.gamma)
        if self.transpose:
            image = image.transpose(*IN_PLANE)
        axes = self._flipped_axes()
        return image.flip(axes) if axes else image

    def invert(self, volume: torch.Tensor) -> torch.Tensor:
        """Bring what a network made of an augmented image (..., b, a, c) back to the image's frame, exactly.

        Only the spatial part has an inverse to apply: a mask or a map has no contrast.
        """
        axes = self._flipped_axes()
        if axes:
            volume = volume.flip(axes)
        return volume.transpose(*IN_PLANE) if self.transpose else volume

    def _flipped_axes(self) -> tuple[int, ...]:
        return tuple(axis for axis, flipped in zip(IN_PLANE, self.flips, strict=True) if flipped)


def tta_group(*, transposes: bool = True, gammas: Sequence[float] = ()) -> tuple[Member, ...]:
    """Return the augmentation group, identity first.

    Args:
        transposes: all 8 in-plane symmetries; without, the 4 that keep the in-plane shape and spacing.
        gammas: gammas; each one repeats the whole group with that contrast.

    Raises:
        ValueError: if a gamma is not positive, is 1, or is given twice.
    """
    if any(gamma <= 0 or gamma == 1 for gamma in gammas) or len(set(gammas)) < len(gammas):
        raise ValueError(f"gammas must be different, positive and not 1, got {list(gammas)}")
    return tuple(
        Member(_name((first, second), transpose, gamma), (first, second), transpose, gamma)
        for gamma in (None, *gammas)
        for transpose in ((False, True) if transposes else (False,))
        for first in (False, True)
        for second in (False, True)
    )


def _name(flips: tuple[bool, bool], transpose: bool, gamma: float | None) -> str:
    parts = ["transpose"] * transpose + ["flip0"] * flips[0] + ["flip1"] * flips[1]
    parts += [f"gamma{gamma:g}"] if gamma is not None else []
    return "-".join(parts) or "identity"


def _contrast(image: torch.Tensor, gamma: float) -> torch.Tensor:
    image = image if image.is_floating_point() else image.float()
    low = image.amin(dim=(-3, -2, -1), keepdim=True)
    span = image.amax(dim=(-3, -2, -1), keepdim=True) - low
    # a constant image stays as it is: its scaled intensities are 0
    scaled = (image - low) / torch.where(span > 0, span, torch.ones_like(span))
    return scaled.pow_(gamma).mul_(span).add_(low)
