"""Folders of one DICOM series."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import DSfloat, format_number_as_ds

from segqc.volumes.volume import (
    LPS_TO_RAS,
    Array,
    Source,
    Volume,
    VolumeError,
    checked_affine,
    checked_shape,
    spacing_of,
)


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder, sorted by name; a DICOMDIR and hidden files are left out."""
    return [file for file in _visible_files(folder) if has_dicom_magic(file)]


def _visible_files(folder: Path) -> list[Path]:
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("."))
    return [file for file in files if file.name.upper() != "DICOMDIR"]


def has_dicom_magic(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def open_dicom(path: Path) -> Source:
    slices = _read_series(path)
    orientation = _common_orientation(path, slices)
    positions = np.array([_numbers(path, s, "ImagePositionPatient", 3) for s in slices])
    row_direction, column_direction = orientation
    heights = positions @ np.cross(row_direction, column_direction)
    order = np.argsort(heights, kind="stable")
    slices = [slices[int(i)] for i in order]
    step = _slice_step(path, slices, positions[order], heights[order], np.cross(row_direction, column_direction))

    first = slices[0]
    spacing = _numbers(path, first, "PixelSpacing", 2)
    affine = np.eye(4)
    # PixelSpacing is (between rows, between columns); moving along a row goes from column to column.
    affine[:3, 0] = row_direction * spacing[1]
    affine[:3, 1] = column_direction * spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[order[0]]
    shape = checked_shape(path, (int(first.Columns), int(first.Rows), len(slices)))

    def voxels() -> Array:
        array = np.empty(shape, dtype=np.float32)
        for index, item in enumerate(slices):
            array[:, :, index] = _slice_pixels(path, item).T
        return array

    return Source(shape, checked_affine(path, LPS_TO_RAS @ affine), 2, voxels)


def _read_series(path: Path) -> list[FileDataset]:
    """Read all DICOM images of a folder and check that they are slices of one series and one size."""
    slices = []
    for file in _visible_files(path):
        if not has_dicom_magic(file):
            if file.suffix.lower() in {".dcm", ".dicom", ".ima"}:
                raise VolumeError(f"{file}: is no DICOM file, or truncated; copy the series again.")
            continue
        try:
            dataset = pydicom.dcmread(file)
        except Exception as error:  # pydicom raises many kinds on damaged files, none with a common base
            raise VolumeError(f"{file}: is truncated or damaged ({error}); copy the series again.") from error
        slices.append(dataset)
    if not slices:
        raise VolumeError(f"{path}: holds no DICOM images; give a folder of one DICOM series.")
    for name, what in (("SeriesInstanceUID", "series"), ("Rows", "numbers of rows"), ("Columns", "numbers of columns")):
        found = {str(s.get(name)) for s in slices}
        if len(found) > 1:
            raise VolumeError(f"{path}: holds {len(found)} different {what}; give a folder of one DICOM series.")
        if found == {"None"}:
            raise VolumeError(f"{path}: its DICOM files have no {name}; give a folder of one DICOM image series.")
    if any(int(s.get("NumberOfFrames") or 1) > 1 for s in slices):
        raise VolumeError(f"{path}: holds a multi-frame DICOM file; convert it to NIfTI, or to one file a slice.")
    if any(int(s.get("SamplesPerPixel") or 1) != 1 for s in slices):
        raise VolumeError(f"{path}: holds colour images; give a series of one value a pixel.")
    return slices


def _numbers(path: Path, item: Dataset, name: str, count: int) -> npt.NDArray[np.float64]:
    try:
        numbers = np.array([float(value) for value in item[name].value], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise VolumeError(f"{path}: a slice has no usable {name}; give a series with its geometry.") from error
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise VolumeError(f"{path}: a slice has no usable {name}; give a series with its geometry.")
    return numbers


def _common_orientation(path: Path, slices: Sequence[FileDataset]) -> npt.NDArray[np.float64]:
    """Return the row and the column direction, ``(2, 3)`` unit vectors in LPS, that all slices share."""
    orientations = np.array([_numbers(path, s, "ImageOrientationPatient", 6) for s in slices])
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        raise VolumeError(f"{path}: its slices differ in orientation (a localizer?); give one parallel stack.")
    spacings = np.array([_numbers(path, s, "PixelSpacing", 2) for s in slices])
    if np.abs(spacings - spacings[0]).max() > 1e-3 * spacings[0].min():
        raise VolumeError(f"{path}: its slices differ in pixel spacing; give one stack of like slices.")
    directions = orientations[0].reshape(2, 3)
    lengths = np.linalg.norm(directions, axis=1)
    if np.abs(lengths - 1).max() > 1e-2 or abs(directions[0] @ directions[1]) > 1e-2:
        raise VolumeError(f"{path}: its ImageOrientationPatient is not two orthogonal unit vectors; repair the header.")
    return cast("npt.NDArray[np.float64]", directions / lengths[:, None])


def _slice_step(
    path: Path,
    slices: Sequence[FileDataset],
    positions: npt.NDArray[np.float64],
    heights: npt.NDArray[np.float64],
    normal: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return the vector from one slice to the next (LPS mm), from the sorted positions; refuse uneven stacks."""
    if len(slices) == 1:
        thickness = float(slices[0].get("SpacingBetweenSlices") or slices[0].get("SliceThickness") or 0)
        if thickness <= 0:
            raise VolumeError(f"{path}: holds one slice of unknown thickness; give the whole series.")
        return normal * thickness
    gaps = np.diff(heights)
    typical = float(np.median(gaps))
    if gaps.min() < 1e-3 or gaps.min() < 0.01 * typical:
        raise VolumeError(
            f"{path}: several slices lie at the same position (time points or echoes?); give one volume a folder."
        )
    step = cast("npt.NDArray[np.float64]", (positions[-1] - positions[0]) / (len(slices) - 1))
    expected = positions[0] + np.arange(len(slices))[:, None] * step
    tolerance = max(0.02, 0.02 * typical)
    if np.abs(gaps - typical).max() > tolerance or np.linalg.norm(positions - expected, axis=1).max() > tolerance:
        raise VolumeError(
            f"{path}: its {len(slices)} slices are unevenly spaced or not in line, "
            f"{gaps.min():.3f} to {gaps.max():.3f} mm apart; slices may be missing, copy the series again."
        )
    return step


def _slice_pixels(path: Path, item: FileDataset) -> npt.NDArray[np.float32]:
    """Return one slice, ``(rows, columns)``, rescaled."""
    name = Path(str(item.filename)).name
    try:
        pixels = item.pixel_array
    except Exception as error:  # pydicom and its decoders raise many kinds, none with a common base
        raise VolumeError(f"{path / name}: its pixels cannot be read ({error}); copy or decompress it.") from error
    slope, intercept = float(item.get("RescaleSlope", 1) or 1), float(item.get("RescaleIntercept", 0) or 0)
    return (pixels.astype(np.float64) * slope + intercept).astype(np.float32)


def write_dicom(volume: Volume, folder: Path, name: str) -> None:
    affine = LPS_TO_RAS @ volume.affine
    spacing = spacing_of(affine)
    directions = affine[:3, :3] / np.array(spacing)
    if abs(directions[:, 0] @ directions[:, 1]) > 1e-4:
        raise VolumeError(f"{folder}: DICOM cannot hold a volume whose in-plane axes are sheared; write .nii.gz.")
    normal = np.cross(directions[:, 0], directions[:, 1])
    stored, slope, intercept = _quantise(volume.array)
    # UIDs follow from the content: the same volume is the same series, however often it is written.
    digest = hashlib.sha256(stored.tobytes() + volume.affine.tobytes() + f"{name} {slope} {intercept}".encode())
    folder.mkdir()
    for index in range(volume.shape[2]):
        item = _slice_dataset(name, digest.hexdigest(), index)
        item.Rows, item.Columns = volume.shape[1], volume.shape[0]
        item.PixelSpacing = [_decimal(spacing[1]), _decimal(spacing[0])]
        item.SliceThickness = item.SpacingBetweenSlices = _decimal(abs(float(normal @ affine[:3, 2])))
        item.ImageOrientationPatient = [_decimal(x) for x in (*directions[:, 0], *directions[:, 1])]
        item.ImagePositionPatient = [_decimal(x) for x in affine[:3, 3] + index * affine[:3, 2]]
        item.PixelRepresentation = int(stored.dtype.kind == "i")
        item.RescaleSlope, item.RescaleIntercept = slope, intercept
        item.PixelData = stored[:, :, index].T.astype(stored.dtype.newbyteorder("<")).tobytes()
        item.save_as(folder / f"{index + 1:05d}.dcm", write_like_original=False)


def _slice_dataset(name: str, digest: str, index: int) -> FileDataset:
    """Return an MR image's header, all but its geometry and pixels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[digest, "instance", str(index)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    item.is_little_endian, item.is_implicit_VR = True, False
    item.SOPClassUID, item.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    item.StudyInstanceUID = generate_uid(entropy_srcs=[digest, "study"])
    item.SeriesInstanceUID = generate_uid(entropy_srcs=[digest, "series"])
    item.FrameOfReferenceUID = generate_uid(entropy_srcs=[digest, "frame"])
    item.PatientID = item.PatientName = item.SeriesDescription = name[:64]
    item.PatientBirthDate = item.PatientSex = item.StudyDate = item.StudyTime = item.StudyID = ""
    item.AccessionNumber = item.ReferringPhysicianName = item.Manufacturer = item.PositionReferenceIndicator = ""
    item.Modality, item.ImageType = "MR", ["DERIVED", "SECONDARY", "OTHER"]
    item.ScanningSequence, item.SequenceVariant, item.ScanOptions, item.MRAcquisitionType = "RM", "NONE", "", "2D"
    item.EchoTime = item.RepetitionTime = item.EchoTrainLength = ""
    item.SeriesNumber, item.InstanceNumber = 1, index + 1
    item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
    item.BitsAllocated, item.BitsStored, item.HighBit = 16, 16, 15
    return item


def _decimal(value: float) -> DSfloat:
    """Return a number as a DICOM decimal string, of 16 characters at most."""
    return DSfloat(format_number_as_ds(float(value)))


def _quantise(array: Array) -> tuple[Array, DSfloat, DSfloat]:
    """Return 16-bit pixels, rescale slope and intercept.

    Whole numbers of a range under 65,536 are kept exactly; other values to half a 65,535th of their range.
    """
    values = array.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if (values == np.rint(values)).all() and high - low <= 65535 and max(abs(low), abs(high)) < 2**31:
        if low >= -32768 and high <= 32767:
            return values.astype(np.int16), DSfloat("1"), DSfloat("0")
        return (values - low).astype(np.uint16), DSfloat("1"), _decimal(low)
    slope, intercept = _decimal((high - low) / 65535 or 1.0), _decimal(low)
    pixels = np.rint((values - float(intercept)) / float(slope))
    return np.clip(pixels, 0, 65535).astype(np.uint16), slope, intercept
