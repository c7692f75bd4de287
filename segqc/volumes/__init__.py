"""Scans and label maps on disk, and the frame that networks work in.

The one door for files: NIfTI (``.nii``, ``.nii.gz``), NRRD (``.nrrd``) and a folder of one DICOM series become a
`Volume` in the file's own voxel order, and go back in the same geometry; label maps are read from ``.seg.nrrd`` and
``.mha`` as well. Files are placed in the world as ITK places them, so that masks lie in 3D Slicer where the scan lies.
No file costs more than its header promises and `ReadLimits` allow. What cannot be read faithfully is refused with a
`VolumeError` that names the file and the finding.

World coordinates are RAS millimetres throughout (NIfTI's convention); NRRD and DICOM are converted at the boundary.
"""

from __future__ import annotations

from segqc.volumes.atomic import atomic_write, remove, sync
from segqc.volumes.dicom import check_dicom_image, read_dicom_volume
from segqc.volumes.dicom_headers import is_dicom_image, read_dataset
from segqc.volumes.dicom_series import (
    DicomContents,
    DicomVolume,
    dicom_files,
    sort_into_volumes,
    visible_files,
)
from segqc.volumes.files import read_grid, read_labels, read_scan, temporary_labels, write_labels, write_scan
from segqc.volumes.frame import (
    SMOOTHING_RATIO,
    THROUGH_PLANE_RATIO,
    Box,
    CanonicalFrame,
    canonical_frame,
    native_support,
    through_plane_axis,
    to_canonical,
    to_native,
    touched,
)
from segqc.volumes.labelmaps import NO_STRUCTURES
from segqc.volumes.limits import ReadLimits
from segqc.volumes.nrrd import read_nrrd_header
from segqc.volumes.slice_layout import SliceLayout, slice_layout
from segqc.volumes.suffixes import (
    LABEL_SUFFIXES,
    NIFTI_SUFFIXES,
    NRRD_SUFFIXES,
    SCAN_SUFFIXES,
    as_spelled,
    is_scan_path,
    label_id,
    label_suffix,
    scan_id,
    scan_suffix,
)
from segqc.volumes.volume import AffineArray, Array, Volume, VolumeError

__all__ = [
    "LABEL_SUFFIXES",
    "NIFTI_SUFFIXES",
    "NO_STRUCTURES",
    "NRRD_SUFFIXES",
    "SCAN_SUFFIXES",
    "SMOOTHING_RATIO",
    "THROUGH_PLANE_RATIO",
    "AffineArray",
    "Array",
    "Box",
    "CanonicalFrame",
    "DicomContents",
    "DicomVolume",
    "ReadLimits",
    "SliceLayout",
    "Volume",
    "VolumeError",
    "as_spelled",
    "atomic_write",
    "canonical_frame",
    "check_dicom_image",
    "dicom_files",
    "is_dicom_image",
    "is_scan_path",
    "label_id",
    "label_suffix",
    "native_support",
    "read_dataset",
    "read_dicom_volume",
    "read_grid",
    "read_labels",
    "read_nrrd_header",
    "read_scan",
    "remove",
    "scan_id",
    "scan_suffix",
    "slice_layout",
    "sort_into_volumes",
    "sync",
    "temporary_labels",
    "through_plane_axis",
    "to_canonical",
    "to_native",
    "touched",
    "visible_files",
    "write_labels",
    "write_scan",
]
