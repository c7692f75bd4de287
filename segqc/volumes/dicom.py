"""Folders of DICOM series: their pixels, and a volume written as one."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Final, cast

import numpy as np
import numpy.typing as npt
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, RLELossless, generate_uid

from segqc.volumes.dicom_headers import first_line, read_dataset, read_header
from segqc.volumes.dicom_images import ImagePlanes, describe_kind, quantise
from segqc.volumes.dicom_pixels import pixels_finding
from segqc.volumes.dicom_series import DicomVolume, sort_into_volumes, visible_files
from segqc.volumes.inputs import InputFile
from segqc.volumes.volume import Array, Source, Volume, VolumeError

logger = logging.getLogger(__name__)

_MAX_NAMED: Final = 5
_MAX_OTHER_BYTES: Final = 1 << 28  # of a file, beside its pixels


def open_dicom(file: InputFile) -> Source:
    """Open the one volume of a folder; what else lies there is named in a warning.

    Raises:
        VolumeError: if there is none, or there are several.
    """
    contents = sort_into_volumes(visible_files(file.path), tick=file.check_time)
    if len(contents.volumes) > 1:
        titles = [volume.title for volume in contents.volumes]
        shown = "; ".join(titles[:_MAX_NAMED]) + (" and more" if len(titles) > _MAX_NAMED else "")
        raise file.error(f"holds {len(titles)} volumes ({shown}); give one volume a folder.")
    if not contents.volumes:
        # images that are no volume tell more than a report beside them
        found = sorted(contents.left_out, key=lambda entry: not entry.are_images)
        raise file.error(found[0].reason if found else "holds no DICOM images; give a folder of one DICOM series.")
    for entry in contents.left_out:
        logger.warning(
            "%s: %d files beside the series are not used, first %s: %s",
            file.shown,
            len(entry.files),
            entry.files[0].name,
            entry.reason,
        )
    return _source(contents.volumes[0], file)


def read_dicom_volume(volume: DicomVolume, file: InputFile) -> Volume:
    """Read a volume that `sort_into_volumes` has found, as `read_scan` does.

    Args:
        volume: the volume.
        file: the folder that it lies in, with the limits and what messages name it.

    Raises:
        VolumeError: as `read_scan`.
    """
    source = _source(volume, file)
    return Volume(source.voxels(), source.affine, source.acquisition_axis)


def _source(volume: DicomVolume, file: InputFile) -> Source:
    columns, rows, _ = volume.shape
    file.check_size(volume.shape)

    def voxels() -> Array:
        array = np.empty(volume.shape, dtype=np.float32)
        for index, path in enumerate(volume.files):
            file.check_time()
            try:
                array[:, :, index] = _slice_pixels(path, rows, columns).T
            except VolumeError as error:
                raise file.error(str(error)) from error
        return array

    return Source(volume.shape, volume.affine, 2, voxels)


def check_dicom_image(path: Path) -> None:
    """Check that a file is one DICOM image of a series, whole.

    Raises:
        VolumeError: if it is not. The message does not name the file's folder.
    """
    header = read_header(path)
    if not header.is_image or not header.key.series:
        reason = f"is no image ({header.sop_class})" if header.key.series else "names no series"
        raise VolumeError(f"{path.name} {reason}; send a DICOM slice of the scan.")
    item = read_dataset(path)
    try:
        _check_pixel_bytes(item, path)
    except VolumeError:
        raise
    except Exception as error:  # values are converted when they are asked for, with errors of many kinds
        raise VolumeError(f"{path.name} is truncated or damaged ({first_line(error)}); copy it again.") from error


def _slice_pixels(file: Path, rows: int, columns: int) -> npt.NDArray[np.float32]:
    """Return one slice, ``(rows, columns)``, rescaled."""
    if file.stat().st_size > 16 * rows * columns + _MAX_OTHER_BYTES:
        raise VolumeError(f"{file.name} is far larger than its pixels need; export the series again.")
    item = read_dataset(file)
    try:
        _check_pixel_bytes(item, file)
        pixels = _stored_values(item)
        # an empty slope or one of zero means nothing, to other readers as well
        slope, intercept = float(item.get("RescaleSlope") or 1) or 1.0, float(item.get("RescaleIntercept") or 0)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = (pixels.astype(np.float64) * slope + intercept).astype(np.float32)
    except VolumeError:
        raise
    except (NotImplementedError, RuntimeError) as error:  # no decoder, or none for so many bits
        syntax = item.file_meta.TransferSyntaxUID.name
        raise VolumeError(
            f"the pixels of {file.name} cannot be decoded here ({syntax}); decompress the series, for instance with "
            "gdcmconv --raw."
        ) from error
    except Exception as error:  # pydicom and its decoders raise many kinds, none with a common base
        raise VolumeError(
            f"the pixels of {file.name} cannot be read ({first_line(error)}); copy or decompress it."
        ) from error
    if scaled.shape != (rows, columns):
        raise VolumeError(
            f"{file.name} holds pixels of the shape {scaled.shape}, not {(rows, columns)}; copy it again."
        )
    if not np.isfinite(scaled).all():
        raise VolumeError(f"{file.name} has a rescale slope or intercept beyond all numbers; repair the header.")
    return scaled


def _check_pixel_bytes(item: FileDataset, file: Path) -> None:
    """Refuse a header that promises other pixels than the file can hold, before there is memory taken for them."""
    if finding := pixels_finding(item):
        raise VolumeError(f"{file.name} {finding}")


def _stored_values(item: FileDataset) -> Array:
    """Return the stored values: of each word the bits that count, with their sign (DICOM PS3.5, 8.1.1)."""
    words = item.pixel_array
    syntax = item.file_meta.TransferSyntaxUID
    if syntax.is_compressed and syntax != RLELossless:
        return words  # JPEG and its kin compress values; there are no other bits
    allocated = int(item.BitsAllocated)
    stored = int(item.get("BitsStored") or allocated)
    high = int(item.HighBit) if item.get("HighBit") is not None else stored - 1
    if not (0 < stored <= allocated and stored - 1 <= high < allocated) or words.dtype.itemsize * 8 != allocated:
        raise ValueError(f"HighBit {high}, BitsStored {stored} and BitsAllocated {allocated} contradict each other")
    unsigned = words.astype(words.dtype.newbyteorder("=")).view(f"u{words.dtype.itemsize}")
    shifted = unsigned << (allocated - 1 - high)  # drops what lies above the high bit
    kind = "i" if int(item.get("PixelRepresentation") or 0) else "u"
    return cast(Array, shifted.view(f"{kind}{words.dtype.itemsize}") >> (allocated - stored))


def write_dicom(volume: Volume, folder: Path, target: Path) -> None:
    """Write a volume to a new folder of one MR series, on its way to `target`, after which the series is named.

    Raises:
        VolumeError: if its in-plane axes are sheared.
    """
    images = volume.array.transpose(2, 1, 0)
    columns, rows, count = volume.shape
    planes = ImagePlanes.from_ras((count, rows, columns), volume.affine)
    name = target.name
    if planes.shear > 1e-4:
        raise VolumeError(f"{target}: DICOM cannot hold a volume whose in-plane axes are sheared; write .nii.gz.")
    pixels = quantise(images)
    # UIDs follow from the content: the same volume is the same series, however often it is written.
    described = f"{name} {pixels.slope} {pixels.intercept}"
    digest = hashlib.sha256(pixels.stored.tobytes() + volume.affine.tobytes() + described.encode())
    folder.mkdir()
    for index in range(count):
        item = _slice_dataset(name, digest.hexdigest(), index)
        planes.describe(item)
        planes.place(item, index)
        pixels.describe(item)
        item.PixelData = pixels.frame(index)
        item.save_as(folder / f"{index + 1:05d}.dcm", write_like_original=False)


def _slice_dataset(name: str, digest: str, index: int) -> FileDataset:
    """Return an MR image's header, all but its geometry and pixels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[digest, "instance", str(index)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    item.is_little_endian, item.is_implicit_VR = True, False
    item.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    item.StudyInstanceUID = generate_uid(entropy_srcs=[digest, "study"])
    item.SeriesInstanceUID = generate_uid(entropy_srcs=[digest, "series"])
    item.FrameOfReferenceUID = generate_uid(entropy_srcs=[digest, "frame"])
    item.PatientID = item.PatientName = item.SeriesDescription = name[:64]
    item.PatientBirthDate = item.PatientSex = item.StudyDate = item.StudyTime = item.StudyID = ""
    item.AccessionNumber = item.ReferringPhysicianName = ""
    item.SeriesNumber = 1
    describe_kind(item, "MR")
    return item
