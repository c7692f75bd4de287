"""The routes of DICOMweb: searches (QIDO-RS) and retrievals (WADO-RS), below ``/dicomweb``.

All that reads files runs in threads of its own number, so that viewers cannot take all of the server's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Final, TypeAlias, TypeVar

import anyio
import anyio.to_thread
from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse

from segqc.server.dicomweb.archive import Archive, unknown
from segqc.server.dicomweb.media import (
    IMAGE_TYPES,
    JSON_TYPES,
    BulkType,
    choose,
    multipart,
    single_part,
    wants_parts,
)
from segqc.server.dicomweb.query import Found, Query
from segqc.server.dicomweb.rendering import THUMBNAIL, Window, parse_quality, parse_viewport, render
from segqc.server.dicomweb.search import (
    OF_INSTANCE,
    OF_SERIES,
    OF_STUDY,
    found_series,
    found_slices,
    found_studies,
    series_address,
)
from segqc.server.dicomweb.series import DicomScan, ScanHeader, ScanImages, dataset, metadata, to_file, to_json
from segqc.server.errors import RequestError
from segqc.server.monailabel.facade import current_app
from segqc.store.records import JsonObject

SLOTS: Final = 4
"""So many requests are answered at once; others wait without taking a thread."""
MAX_RESULTS: Final = 5000
"""Of one search; further ones are told page by page."""

router = APIRouter(prefix="/dicomweb", tags=["DICOMweb"])
scan_router = APIRouter(tags=["SegQC"])

T = TypeVar("T")
Finder: TypeAlias = Callable[[Archive, Iterable[DicomScan], str], Iterator[Found]]
Study = Annotated[str, Path(description="StudyInstanceUID: the scan.")]
Series = Annotated[str, Path(description="SeriesInstanceUID: the scan's only series.")]
Instance = Annotated[str, Path(description="SOPInstanceUID: a slice.")]
Frames = Annotated[str, Path(description="Numbers of frames, with commas between; a slice has the frame 1 only.")]

_STUDY: Final = "/studies/{study}"
_SERIES: Final = f"{_STUDY}/series/{{series}}"
_INSTANCE: Final = f"{_SERIES}/instances/{{instance}}"
_FRAME: Final = re.compile("[1-9][0-9]{0,8}")
_MAX_FRAMES: Final = 16  # asked for at once
_MORE: Final = "There are additional results that can be requested."
_USUAL_PORTS: Final = (80, 443, None)
_FUZZY: Final = "The fuzzymatching parameter is not supported. Only literal matching has been performed."


@dataclass(frozen=True)
class Chosen:
    """What an address names: a scan, or one slice of it."""

    archive: Archive
    header: ScanHeader
    index: int | None

    @property
    def images(self) -> ScanImages:
        """The scan's images."""
        return self.archive.images(self.header.scan)

    @property
    def slices(self) -> Iterable[int]:
        """The numbers of the slices."""
        return range(self.header.count) if self.index is None else [self.index]

    @property
    def representative(self) -> int:
        """The slice, or the scan's middle one."""
        return self.header.count // 2 if self.index is None else self.index


def open_archive() -> Archive:
    """The dataset folder's scans as DICOM."""
    return current_app().context.archive


def _choose(study: str, series: str | None = None, instance: str | None = None) -> Chosen:
    """What an address names.

    Raises:
        RequestError: 404 if there is no such thing.
    """
    archive = open_archive()
    scan = archive.study(study)
    if series is not None and series != scan.series_uid:
        raise unknown("series", series)
    header = archive.header(scan)
    index = None if instance is None else header.instances.get(instance)
    if instance is not None and index is None:
        raise unknown("instance", instance)
    return Chosen(archive, header, index)


async def in_slot(request: Request, work: Callable[[], T]) -> T:
    """Do something in a thread, when one of the slots is free."""
    slots: anyio.CapacityLimiter = request.app.state.dicomweb_slots
    return await anyio.to_thread.run_sync(work, limiter=slots)


def address_of(request: Request) -> str:
    """Where DICOMweb is, as the client calls this server."""
    base = request.base_url
    host, port = request.scope.get("server") or (None, None)
    if base.port is None and base.hostname == host and port not in _USUAL_PORTS:
        base = base.replace(port=port)  # dicomweb-client leaves the port out of the Host header
    return f"{base}{router.prefix.removeprefix('/')}"


# ------------------------------------------------------------------------------------------------------------- searches


@router.get("/studies", summary="Search for studies")
async def search_studies(request: Request) -> Response:
    """Find scans, each as a study, by any attribute; page by ``limit`` and ``offset``, more by ``includefield``."""
    return await _search(request, found_studies, None, OF_STUDY)


@router.get("/series", summary="Search for series of all studies")
async def search_series(request: Request) -> Response:
    """Find the series of all scans."""
    return await _search(request, found_series, None, OF_STUDY | OF_SERIES)


@router.get("/instances", summary="Search for instances of all studies")
async def search_instances(request: Request) -> Response:
    """Find slices of all scans."""
    return await _search(request, found_slices, None, OF_STUDY | OF_SERIES | OF_INSTANCE)


@router.get(f"{_STUDY}/series", summary="Search for the series of a study")
async def search_series_of_study(request: Request, study: Study) -> Response:
    """Find the series of a scan."""
    return await _search(request, found_series, lambda: _choose(study), OF_SERIES)


@router.get(f"{_STUDY}/instances", summary="Search for the instances of a study")
async def search_instances_of_study(request: Request, study: Study) -> Response:
    """Find slices of a scan."""
    return await _search(request, found_slices, lambda: _choose(study), OF_SERIES | OF_INSTANCE)


@router.get(f"{_SERIES}/instances", summary="Search for the instances of a series")
async def search_instances_of_series(request: Request, study: Study, series: Series) -> Response:
    """Find slices of a scan."""
    return await _search(request, found_slices, lambda: _choose(study, series), OF_INSTANCE)


async def _search(
    request: Request, find: Finder, choose_scan: Callable[[], Chosen] | None, usual: Collection[str]
) -> Response:
    """Search among all scans, or the one that is chosen."""

    def work() -> Response:
        media_type = choose(request, JSON_TYPES)
        query = Query.parse(request.query_params.multi_items())
        archive = open_archive()
        scans = archive.scans() if choose_scan is None else [choose_scan().header.scan]
        results = query.select(find(archive, scans, address_of(request)))
        told = [to_json(dataset(query.pick(attributes, usual))) for attributes in islice(results, MAX_RESULTS)]
        warnings = [_FUZZY] if query.fuzzy else []
        if next(results, None) is not None:
            warnings.append(_MORE)
        headers = {"Warning": ", ".join(f'299 {request.url.netloc} "{text}"' for text in warnings)} if warnings else {}
        return JSONResponse(told, headers=headers, media_type=media_type)

    return await in_slot(request, work)


# ------------------------------------------------------------------------------------------------------------- metadata


@router.get(f"{_STUDY}/metadata", summary="The headers of a study's images")
async def study_metadata(request: Request, study: Study) -> Response:
    """Send the headers of all images of a scan, without pixels."""
    return await in_slot(request, lambda: _metadata(request, _choose(study)))


@router.get(f"{_SERIES}/metadata", summary="The headers of a series' images")
async def series_metadata(request: Request, study: Study, series: Series) -> Response:
    """Send the headers of all images of a scan, without pixels."""
    return await in_slot(request, lambda: _metadata(request, _choose(study, series)))


@router.get(f"{_INSTANCE}/metadata", summary="An image's header")
async def instance_metadata(request: Request, study: Study, series: Series, instance: Instance) -> Response:
    """Send the header of a slice, without pixels."""
    return await in_slot(request, lambda: _metadata(request, _choose(study, series, instance)))


def _metadata(request: Request, chosen: Chosen) -> Response:
    media_type = choose(request, JSON_TYPES)
    place = series_address(address_of(request), chosen.header.scan)
    found = metadata(chosen.header, chosen.images, chosen.slices, place)
    return JSONResponse(found, media_type=media_type)


# --------------------------------------------------------------------------------------------------- images and frames


@router.get(_STUDY, summary="A study's images")
async def study_images(request: Request, study: Study) -> Response:
    """Send all images of a scan as DICOM files, as the parts of one message."""
    return await in_slot(request, lambda: _files(request, _choose(study)))


@router.get(_SERIES, summary="A series' images")
async def series_images(request: Request, study: Study, series: Series) -> Response:
    """Send all images of a scan as DICOM files, as the parts of one message."""
    return await in_slot(request, lambda: _files(request, _choose(study, series)))


@router.get(_INSTANCE, summary="An image")
async def instance_image(request: Request, study: Study, series: Series, instance: Instance) -> Response:
    """Send a slice as a DICOM file, as the part of a message, or alone where ``application/dicom`` is asked for."""
    return await in_slot(request, lambda: _files(request, _choose(study, series, instance)))


def _files(request: Request, chosen: Chosen) -> Response:
    kind: BulkType = "application/dicom"
    in_parts = wants_parts(request, kind, single=chosen.index is not None)
    images = chosen.images
    files = (to_file(chosen.header, images, index) for index in chosen.slices)
    return multipart(files, kind) if in_parts else single_part(next(files), kind)


@router.get(f"{_INSTANCE}/frames/{{frames}}", summary="An image's pixels")
async def instance_frames(
    request: Request, study: Study, series: Series, instance: Instance, frames: Frames
) -> Response:
    """Send a slice's pixels: 16 bits, little endian, row by row; alone where ``application/octet-stream`` is asked."""
    return await in_slot(request, lambda: _frames(request, _choose(study, series, instance), frames))


def _frames(request: Request, chosen: Chosen, frames: str) -> Response:
    kind: BulkType = "application/octet-stream"
    numbers = _frame_numbers(frames)
    in_parts = wants_parts(request, kind, single=len(numbers) == 1)
    pixels = chosen.images.pixels.frame(chosen.representative)
    return multipart([pixels] * len(numbers), kind) if in_parts else single_part(pixels, kind)


def _frame_numbers(text: str) -> list[str]:
    """Numbers of frames, all of which are there.

    Raises:
        RequestError: 400 if they are no numbers, 404 if there is no such frame.
    """
    numbers = text.split(",")
    if len(numbers) > _MAX_FRAMES or not all(map(_FRAME.fullmatch, numbers)):
        raise RequestError(400, f"frames are numbers from 1 on with commas between, not {text[:80]!r}.")
    if set(numbers) != {"1"}:
        raise RequestError(404, f"a slice has the frame 1 only, not {text[:80]!r}.")
    return numbers


# ------------------------------------------------------------------------------------------------------------- pictures


@router.get(f"{_STUDY}/rendered", summary="A picture of a study")
@router.get(f"{_STUDY}/thumbnail", summary="A small picture of a study")
async def study_picture(request: Request, study: Study) -> Response:
    """Send a picture of a scan's middle slice: JPEG, or PNG where it is asked for."""
    return await in_slot(request, lambda: _picture(request, _choose(study)))


@router.get(f"{_SERIES}/rendered", summary="A picture of a series")
@router.get(f"{_SERIES}/thumbnail", summary="A small picture of a series")
async def series_picture(request: Request, study: Study, series: Series) -> Response:
    """Send a picture of a scan's middle slice: JPEG, or PNG where it is asked for."""
    return await in_slot(request, lambda: _picture(request, _choose(study, series)))


@router.get(f"{_INSTANCE}/rendered", summary="A picture of an image")
@router.get(f"{_INSTANCE}/thumbnail", summary="A small picture of an image")
async def instance_picture(request: Request, study: Study, series: Series, instance: Instance) -> Response:
    """Send a picture of a slice: JPEG, or PNG where it is asked for."""
    return await in_slot(request, lambda: _picture(request, _choose(study, series, instance)))


@router.get(f"{_INSTANCE}/frames/{{frames}}/rendered", summary="A picture of a frame")
@router.get(f"{_INSTANCE}/frames/{{frames}}/thumbnail", summary="A small picture of a frame")
async def frame_picture(request: Request, study: Study, series: Series, instance: Instance, frames: Frames) -> Response:
    """Send a picture of a slice: JPEG, or PNG where it is asked for."""
    _frame_numbers(frames)
    return await in_slot(request, lambda: _picture(request, _choose(study, series, instance)))


def _picture(request: Request, chosen: Chosen) -> Response:
    media_type = choose(request, IMAGE_TYPES)
    asked = request.query_params
    small = THUMBNAIL if request.url.path.rstrip("/").endswith("/thumbnail") else None
    picture = render(
        chosen.header,
        chosen.images,
        chosen.representative,
        media_type,
        window=Window.parse(asked["window"]) if "window" in asked else None,
        viewport=parse_viewport(asked["viewport"]) if "viewport" in asked else small,
        quality=parse_quality(asked["quality"]) if "quality" in asked else None,
    )
    return Response(picture, media_type=media_type)


# ------------------------------------------------------------------------------------------------------ a scan's names


@scan_router.get("/segqc/dicomweb/{scan}", summary="A scan's DICOM identifiers")
def scan_identifiers(scan: str) -> JsonObject:
    """Tell by which identifiers DICOMweb names a scan, and how its file's voxels become images.

    ``instances`` are in the order of the file's voxels across the slices. ``axes`` are the file's axes that columns,
    rows and slices run along, and ``flipped`` which of them are counted from their end.
    """
    archive = open_archive()
    found: DicomScan = archive.named(scan)
    header = archive.header(found)
    layout = header.layout
    return {
        "scan": found.record.name,
        "study": found.study_uid,
        "series": found.series_uid,
        "frame_of_reference": found.frame_of_reference_uid,
        "instances": list(header.instances),
        "axes": {"columns": layout.column_axis, "rows": layout.row_axis, "slices": layout.slice_axis},
        "flipped": {"columns": layout.flip_columns, "rows": layout.flip_rows, "slices": False},
    }
