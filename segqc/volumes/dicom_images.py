"""A volume as DICOM images: 16-bit pixels, one image a slice, and what their headers say of pixels and place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, MRImageStorage, SecondaryCaptureImageStorage
from pydicom.valuerep import DSfloat, format_number_as_ds

from segqc.volumes.volume import LPS_TO_RAS, AffineArray, Array, spacing_of

MAX_STEP: Final = 65535
"""The largest stored value less the smallest one."""


@dataclass(frozen=True)
class ImagePlanes:
    """Where the images of a stack lie.

    Attributes:
        shape: slices, rows and columns.
        affine: ``(4, 4)``, column, row and slice to LPS millimetres, as DICOM counts them.
    """

    shape: tuple[int, int, int]
    affine: AffineArray

    @classmethod
    def from_ras(cls, shape: tuple[int, int, int], affine: AffineArray) -> ImagePlanes:
        """The planes of a stack of slices, rows and columns, whose affine leads to RAS millimetres."""
        return cls(shape, LPS_TO_RAS @ affine)

    @property
    def shear(self) -> float:
        """The cosine between rows and columns: zero unless the grid is sheared."""
        directions = self.affine[:3, :2] / np.linalg.norm(self.affine[:3, :2], axis=0)
        return float(abs(directions[:, 0] @ directions[:, 1]))

    def describe(self, item: Dataset) -> None:
        """Note what all images of the stack have in common.

        Rows and columns that are not quite orthogonal are noted as the nearest directions that are.
        """
        spacing = spacing_of(self.affine)
        u, _, v = np.linalg.svd(self.affine[:3, :2] / np.array(spacing[:2]), full_matrices=False)
        directions = u @ v
        normal = np.cross(directions[:, 0], directions[:, 1])
        _, item.Rows, item.Columns = self.shape
        item.PixelSpacing = [decimal(spacing[1]), decimal(spacing[0])]
        item.SliceThickness = item.SpacingBetweenSlices = decimal(abs(float(normal @ self.affine[:3, 2])))
        item.ImageOrientationPatient = [decimal(x) for x in directions.T.ravel()]

    def place(self, item: Dataset, index: int) -> None:
        """Note which image of the stack it is, and where it lies."""
        item.InstanceNumber = index + 1
        item.ImagePositionPatient = [decimal(x) for x in self.affine[:3, 3] + index * self.affine[:3, 2]]


@dataclass(frozen=True)
class ImagePixels:
    """The stored values of a stack of images.

    Attributes:
        stored: ``(slices, rows, columns)``, int16 or uint16, little endian.
        slope: stored values are multiplied by it.
        intercept: added to them.
    """

    stored: Array
    slope: DSfloat
    intercept: DSfloat

    def describe(self, item: Dataset) -> None:
        """Note how the stored values are to be read."""
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated, item.BitsStored, item.HighBit = 16, 16, 15
        item.PixelRepresentation = int(self.stored.dtype.kind == "i")
        item.RescaleSlope, item.RescaleIntercept = self.slope, self.intercept

    def frame(self, index: int) -> bytes:
        """The pixels of one image as DICOM stores them: row by row, explicit little endian."""
        content: bytes = self.stored[index].tobytes()
        return content

    def values(self, index: int) -> npt.NDArray[np.float64]:
        """The intensities of one image, ``(rows, columns)``."""
        values: npt.NDArray[np.float64] = self.stored[index].astype(np.float64)
        return values * float(self.slope) + float(self.intercept)


def describe_kind(item: Dataset, modality: str) -> None:
    """Note what kind of image it is, with what DICOM wants to be there of a scanner that nothing is known of.

    Args:
        item: the header.
        modality: MR, CT, or another, whose images are noted as made by a program.
    """
    item.Modality, item.ImageType = modality, ["DERIVED", "SECONDARY", "OTHER"]
    item.Manufacturer = item.PositionReferenceIndicator = ""
    if modality == "MR":
        item.SOPClassUID = MRImageStorage
        item.ScanningSequence, item.SequenceVariant, item.ScanOptions, item.MRAcquisitionType = "RM", "NONE", "", "2D"
        item.EchoTime = item.RepetitionTime = item.EchoTrainLength = ""
    elif modality == "CT":
        item.SOPClassUID = CTImageStorage
        item.KVP = item.AcquisitionNumber = ""
    else:
        item.SOPClassUID, item.ConversionType = SecondaryCaptureImageStorage, "WSD"


def decimal(value: float) -> DSfloat:
    """Return a number as a DICOM decimal string, of 16 characters at most; zero has no sign."""
    return DSfloat(format_number_as_ds(float(value) + 0.0))


def quantise(images: Array) -> ImagePixels:
    """Store intensities in 16 bits.

    Whole numbers of a range under 65,536 are kept exactly; other values to half a 65,535th of their range.

    Args:
        images: ``(slices, rows, columns)``, finite.
    """
    low, high = float(images.min()), float(images.max())
    in_range = high - low <= MAX_STEP and max(abs(low), abs(high)) < 2**31
    slope, intercept, dtype = decimal(1), decimal(0), "<i2"
    if not (in_range and all((image == np.rint(image)).all() for image in images)):
        slope, intercept, dtype = decimal((high - low) / MAX_STEP or 1.0), decimal(low), "<u2"
    elif low < -32768 or high > 32767:
        intercept, dtype = decimal(low), "<u2"
    stored = np.empty(images.shape, dtype)
    bounds = np.iinfo(stored.dtype)
    for target, image in zip(stored, images, strict=True):
        steps = np.rint((image.astype(np.float64) - float(intercept)) / float(slope))
        target[...] = np.clip(steps, bounds.min, bounds.max)
    return ImagePixels(stored, slope, intercept)
