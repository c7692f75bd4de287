"""DICOM files sorted into the volumes that they are slices of, and what is left out with its reason."""

from __future__ import annotations

import bisect
import filecmp
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import numpy as np
import numpy.typing as npt

from segqc.volumes.dicom_headers import SPLITTERS, DicomHeader, SeriesKey, is_dicom, read_dataset, read_header
from segqc.volumes.volume import LPS_TO_RAS, AffineArray, VolumeError, affine_finding

_DICOM_SUFFIXES: Final = frozenset({".dcm", ".dicom", ".ima"})
_PACKED_SUFFIXES: Final = frozenset({".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz", ".7z", ".rar"})
_MAX_SPLITTERS: Final = 3  # that tell volumes apart together


@dataclass(frozen=True, slots=True)
class DicomVolume:
    """The slices of one volume.

    Attributes:
        files: a file for each slice, ascending along the normal ``row x column`` of the image orientation.
        shape: columns, rows and slices.
        affine: ``(4, 4)``, voxel index to RAS millimetres.
        key: patient, study and series.
        series_number: as the header says it, or empty.
        description: of the series, or empty.
        part: which of several volumes of its series this is (``"echo 2"``), or empty.
    """

    files: tuple[Path, ...]
    shape: tuple[int, int, int]
    affine: AffineArray
    key: SeriesKey
    series_number: str
    description: str
    part: str = ""

    @property
    def title(self) -> str:
        """How messages name the volume."""
        named = " ".join(filter(None, (self.series_number, self.description and f"'{self.description}'")))
        series = f"series {named or self.key.series}"
        return f"{series}, {self.part}" if self.part else series


@dataclass(frozen=True, slots=True)
class LeftOut:
    """DICOM files that are no part of a volume, and the reason, which reads on from a file's or folder's name."""

    files: tuple[Path, ...]
    reason: str
    are_images: bool = True


@dataclass(frozen=True, slots=True)
class DicomContents:
    """The volumes among some files, and the DICOM files that are part of none."""

    volumes: tuple[DicomVolume, ...]
    left_out: tuple[LeftOut, ...]


def visible_files(folder: Path) -> list[Path]:
    """The files of a folder, sorted by name, but for hidden ones and a DICOMDIR; links that lead nowhere are there."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file() or (file.is_symlink() and not file.exists()))
    return [file for file in files if not file.name.startswith(".") and file.name.upper() != "DICOMDIR"]


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder by their content, sorted by name; a DICOMDIR and hidden files are left out."""
    return [file for file in visible_files(folder) if is_dicom(file)]


def sort_into_volumes(files: Iterable[Path], *, tick: Callable[[], None] = lambda: None) -> DicomContents:
    """Sort files into volumes by what their headers say.

    Objects that are no images (reports, structure sets, presentation states) are left out, and other files are
    passed over, unless they are packed or cannot be read. A series becomes one volume, or several where one tag, or a
    few together, tell its echoes or time points apart.

    Args:
        files: of one folder, or of a session's folders.
        tick: called after each file.
    """
    headers: list[DicomHeader] = []
    left_out: list[LeftOut] = []
    lost: dict[Path, str] = {}  # DICOM or not, what could not be read
    unreadable: dict[Path, str] = {}  # of these, what is no file that anybody could read
    for file in files:
        try:
            if is_dicom(file):
                headers.append(read_header(file))
            else:
                with file.open("rb"):
                    lost[file] = f"{file.name} is no DICOM file, or truncated; copy the series again."
        except VolumeError as error:
            lost[file] = str(error)
        except OSError as error:
            unreadable[file] = f"cannot be read ({error.strerror}); copy the series again."
            lost[file] = f"{file.name} {unreadable[file]}"
        tick()
    left_out += _no_images(headers)
    series: dict[SeriesKey, list[DicomHeader]] = defaultdict(list)
    for header in headers:
        if header.is_image and header.key.series:
            series[header.key].append(header)
        elif header.is_image:
            lost[header.file] = f"{header.file.name} has no SeriesInstanceUID; copy the series again."
    damaged = _damaged(lost, (header for slices in series.values() for header in slices))
    volumes: list[DicomVolume] = []
    for key, slices in series.items():
        if key in damaged:
            files = (*(header.file for header in slices), *damaged[key])
            left_out.append(LeftOut(files, f"lacks a slice: {lost[damaged[key][0]]}"))
            continue
        found = _volumes_of_series(slices)
        volumes += found.volumes
        left_out += found.left_out
    explained = {file for entry in left_out for file in entry.files}
    alike: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for file, reason in lost.items():
        if file in explained:
            continue
        if file in unreadable:
            alike[file.parent, unreadable[file]].append(file)
        elif file.suffix.lower() in _PACKED_SUFFIXES:
            alike[file.parent, "is packed; unpack it, and import what comes of it."].append(file)
        elif is_dicom(file) or file.suffix.lower() in _DICOM_SUFFIXES:
            left_out.append(LeftOut((file,), reason))
    left_out += [LeftOut(tuple(found), reason) for (_, reason), found in alike.items()]
    return DicomContents(tuple(volumes), tuple(left_out))


def _damaged(lost: Mapping[Path, str], headers: Iterable[DicomHeader]) -> dict[SeriesKey, list[Path]]:
    """Unreadable files by the series that they were slices of, most likely: those of their neighbours by name.

    Only files that are named like slices count; a text file beside a series is none of it.
    """
    peers: dict[tuple[Path, str], list[DicomHeader]] = defaultdict(list)
    for header in headers:
        if header.is_image:
            peers[header.file.parent, _pattern(header.file)].append(header)
    for group in peers.values():
        group.sort(key=lambda header: _in_order(header.file))
    found: dict[SeriesKey, list[Path]] = defaultdict(list)
    for file in lost:
        group = peers.get((file.parent, _pattern(file)), [])
        place = bisect.bisect([_in_order(header.file) for header in group], _in_order(file))
        for key in {header.key for header in group[max(0, place - 1) : place + 1]}:
            found[key].append(file)
    return found


def _pattern(file: Path) -> str:
    """What the names of a series' files have in common: all but numbers, decimal or hexadecimal."""
    return re.sub(r"[0-9a-f]*[0-9][0-9a-f]*", "#", file.name.lower())


def _in_order(file: Path) -> list[str | int]:
    """A key that sorts names by the numbers in them."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", file.name.lower()))]


def _no_images(headers: Sequence[DicomHeader]) -> list[LeftOut]:
    groups: dict[tuple[Path, str, SeriesKey], list[Path]] = defaultdict(list)
    for header in headers:
        if not header.is_image:
            groups[header.file.parent, header.sop_class, header.key].append(header.file)
    return [
        LeftOut(tuple(files), f"holds no image ({sop_class}).", are_images=False)
        for (_, sop_class, _), files in groups.items()
    ]


# ------------------------------------------------------------------------------------------------------------ series


class _SlicesMissingError(VolumeError):
    """The slices are of one stack, and some of it are not there."""


def _volumes_of_series(slices: Sequence[DicomHeader]) -> DicomContents:
    """Put a series together from all of its folders, or from each where these hold different stacks."""
    files = tuple(header.file for header in slices)
    try:
        return _volumes(slices)
    except VolumeError as error:
        whole = DicomContents((), (LeftOut(files, str(error)),))
        if isinstance(error, _SlicesMissingError):
            return whole
    folders: dict[Path, list[DicomHeader]] = defaultdict(list)
    for header in slices:
        folders[header.file.parent].append(header)
    if len(folders) == 1 or min(map(len, folders.values())) == 1:
        return whole
    volumes: list[DicomVolume] = []
    left_out: list[LeftOut] = []
    for part in folders.values():
        try:
            found = _volumes(part)
        except VolumeError as error:
            left_out.append(LeftOut(tuple(header.file for header in part), str(error)))
        else:
            volumes += found.volumes
            left_out += found.left_out
    return DicomContents(tuple(volumes), tuple(left_out)) if volumes else whole


def _volumes(slices: Sequence[DicomHeader]) -> DicomContents:
    """Put slices together.

    Raises:
        VolumeError: if they are no volume; the message reads on from a folder's name.
    """
    left_out: list[LeftOut] = []
    slices, copies = _without_copies(slices)
    if copies:
        left_out.append(LeftOut(tuple(copies), "holds further copies of the same slices."))
    for what, is_aside in (("a localizer", lambda header: header.is_localizer), ("a colour image", _is_colour_page)):
        others = [header for header in slices if not is_aside(header)]
        if others and len(others) < len(slices):
            dropped = tuple(header.file for header in slices if is_aside(header))
            left_out.append(LeftOut(dropped, f"holds {what} in the same series."))
            slices = others
    return DicomContents(tuple(_stacks(slices)), tuple(left_out))


def _is_colour_page(header: DicomHeader) -> bool:
    """Whether an image is a page that some program has drawn, as a dose report, and no slice of a place."""
    return _is_colour(header) and header.position is None


def _is_colour(header: DicomHeader) -> bool:
    return header.samples != 1 or not header.photometric.startswith("MONOCHROME")


def _without_copies(slices: Sequence[DicomHeader]) -> tuple[list[DicomHeader], list[Path]]:
    kept: dict[str, DicomHeader] = {}
    copies: list[Path] = []
    for header in slices:
        first = kept.setdefault(header.instance or str(header.file), header)
        if first is header:
            continue
        if not _same_image(first.file, header.file):
            raise VolumeError(
                f"holds two different images with one SOPInstanceUID, {first.file.name} and {header.file.name}; "
                "export the series again."
            )
        copies.append(header.file)
    return list(kept.values()), copies


def _same_image(first: Path, second: Path) -> bool:
    """Tell whether two files hold the same object, whoever wrote them."""
    try:
        return filecmp.cmp(first, second, shallow=False) or bool(read_dataset(first) == read_dataset(second))
    except Exception:  # values are converted to be compared, with errors of many kinds
        return False


# ------------------------------------------------------------------------------------------------------------ stacks


def _stacks(slices: Sequence[DicomHeader]) -> list[DicomVolume]:
    """The volumes of one series.

    Raises:
        VolumeError: if they cannot be told; the message has no file's name in front.
    """
    _check_images(slices)
    orientation = _common_orientation(slices)
    normal = np.cross(orientation[0], orientation[1])
    heights = np.array([header.position for header in slices]) @ normal
    positions = 1 + int((np.diff(np.sort(heights)) >= 1e-3).sum())
    if positions < len(slices):
        return _split(slices, orientation, len(slices) // positions)
    return [_stack(slices, orientation)]


def _check_images(slices: Sequence[DicomHeader]) -> None:
    if any(header.frames > 1 for header in slices):
        raise VolumeError("holds a multi-frame DICOM file; convert it to NIfTI, or to one file a slice.")
    if any(header.is_mosaic for header in slices):
        raise VolumeError("holds mosaics, which show all slices of a volume in one image; convert them with dcm2niix.")
    if any(map(_is_colour, slices)):
        raise VolumeError("holds colour images; give a series of one value a pixel.")
    for name, what in (("rows", "numbers of rows"), ("columns", "numbers of columns")):
        found = {getattr(header, name) for header in slices}
        if not all(found):
            raise VolumeError(f"has DICOM files without {name.capitalize()}; give a DICOM image series.")
        if len(found) > 1:
            raise VolumeError(f"holds {len(found)} different {what}; give one stack of like slices.")
    for name, tag in (
        ("orientation", "ImageOrientationPatient"),
        ("spacing", "PixelSpacing"),
        ("position", "ImagePositionPatient"),
    ):
        without = next((header for header in slices if getattr(header, name) is None), None)
        if without is not None:
            raise VolumeError(f"has a slice, {without.file.name}, with no usable {tag}; give a series with geometry.")


def _common_orientation(slices: Sequence[DicomHeader]) -> npt.NDArray[np.float64]:
    """Return the row and the column direction, ``(2, 3)`` unit vectors in LPS, that all slices share."""
    orientations = np.array([header.orientation for header in slices])
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        raise VolumeError("has slices that differ in orientation (a localizer?); give one parallel stack.")
    spacings = np.array([header.spacing for header in slices])
    if spacings.min() <= 0:
        raise VolumeError("has slices whose PixelSpacing is not positive; repair the header.")
    if np.abs(spacings - spacings[0]).max() > 1e-3 * spacings[0].min():
        raise VolumeError("has slices that differ in pixel spacing; give one stack of like slices.")
    directions = orientations[0].reshape(2, 3)
    lengths = np.linalg.norm(directions, axis=1)
    if np.abs(lengths - 1).max() > 1e-2 or abs(directions[0] @ directions[1]) > 1e-2:
        raise VolumeError("has an ImageOrientationPatient that is not two orthogonal unit vectors; repair the header.")
    return cast("npt.NDArray[np.float64]", directions / lengths[:, None])


def _split(slices: Sequence[DicomHeader], orientation: npt.NDArray[np.float64], count: int) -> list[DicomVolume]:
    """Split a series in which several slices share each position, by the fewest tags that tell its volumes apart.

    Args:
        slices: of the series.
        orientation: their row and column direction.
        count: how many volumes there are at least, and so how many values of a tag at most.
    """
    words = list(SPLITTERS.values())
    values = [len({header.splitters[i] for header in slices}) for i in range(len(words))]
    varying = [i for i, number in enumerate(values) if 1 < number <= count]
    found: dict[frozenset[frozenset[Path]], list[DicomVolume]] = {}
    for number in range(1, _MAX_SPLITTERS + 1):
        for columns in itertools.combinations(varying, number):
            word = words[columns[0]] if number == 1 else "volume"
            _try_split(slices, orientation, columns, word, found)
        if found:
            break
    if len(found) == 1:
        return next(iter(found.values()))
    raise VolumeError(
        "has several slices at the same position (time points or echoes?) that cannot be told apart; "
        "give one volume a folder."
    )


def _try_split(
    slices: Sequence[DicomHeader],
    orientation: npt.NDArray[np.float64],
    columns: Sequence[int],
    word: str,
    found: dict[frozenset[frozenset[Path]], list[DicomVolume]],
) -> None:
    """Add the volumes that the values of some tags give, if all of them are whole and lie on one grid."""
    groups: dict[tuple[str, ...], list[DicomHeader]] = defaultdict(list)
    for header in slices:
        groups[tuple(header.splitters[i] for i in columns)].append(header)
    try:
        values = sorted(groups, key=lambda key: [(_number(value), value) for value in key])
        stacks = [replace(_stack(groups[value], orientation), part=f"{word} {k}") for k, value in enumerate(values, 1)]
    except VolumeError:
        return
    first = stacks[0]
    if all(s.shape == first.shape and np.allclose(s.affine, first.affine, atol=1e-2) for s in stacks):
        found.setdefault(frozenset(frozenset(stack.files) for stack in stacks), stacks)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _stack(slices: Sequence[DicomHeader], orientation: npt.NDArray[np.float64]) -> DicomVolume:
    """Put parallel slices in order; refuse uneven stacks."""
    normal = np.cross(orientation[0], orientation[1])
    positions = np.array([header.position for header in slices])
    order = np.argsort(positions @ normal, kind="stable")
    slices, positions = [slices[int(i)] for i in order], positions[order]
    first = slices[0]
    if first.columns is None or first.rows is None or first.spacing is None:
        raise VolumeError("has a slice without geometry.")
    affine = np.eye(4)
    # PixelSpacing is (between rows, between columns); moving along a row goes from column to column.
    affine[:3, 0] = orientation[0] * first.spacing[1]
    affine[:3, 1] = orientation[1] * first.spacing[0]
    affine[:3, 2] = _slice_step(slices, positions, normal)
    affine[:3, 3] = positions[0]
    if finding := affine_finding(affine):
        raise VolumeError(f"has slices whose geometry {finding}; repair the header.")
    return DicomVolume(
        tuple(header.file for header in slices),
        (first.columns, first.rows, len(slices)),
        LPS_TO_RAS @ affine,
        first.key,
        first.series_number,
        first.description,
    )


def _slice_step(
    slices: Sequence[DicomHeader], positions: npt.NDArray[np.float64], normal: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the vector from one slice to the next (LPS mm), from the sorted positions."""
    if len(slices) == 1:
        if slices[0].is_localizer:
            raise VolumeError("is a localizer of one image; give the whole series.")
        thickness = slices[0].thickness
        if thickness is None or not 0 < thickness < np.inf:
            raise VolumeError("holds one slice of unknown thickness; give the whole series.")
        return normal * thickness
    gaps = np.diff(positions @ normal)
    typical = float(np.median(gaps))
    if gaps.min() < 1e-3 or gaps.min() < 0.01 * typical:
        raise VolumeError("has several slices at the same position (time points or echoes?); give one volume a folder.")
    step = cast("npt.NDArray[np.float64]", (positions[-1] - positions[0]) / (len(slices) - 1))
    expected = positions[0] + np.arange(len(slices))[:, None] * step
    tolerance = max(0.02, 0.02 * typical)
    if np.abs(gaps - typical).max() > tolerance or np.linalg.norm(positions - expected, axis=1).max() > tolerance:
        raise _SlicesMissingError(
            f"has {len(slices)} slices that are unevenly spaced or not in line, "
            f"{gaps.min():.3f} to {gaps.max():.3f} mm apart; slices may be missing, copy the series again."
        )
    return step
