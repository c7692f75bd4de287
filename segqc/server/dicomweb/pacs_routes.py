"""DICOMweb where scans are series of a PACS: searches and images of these series, read from the PACS, and nothing else.

Addresses are made of identifiers that were checked, never of what a client sent, so that no other part of the PACS can
be reached. Who signs in there is the server; clients see neither its name nor its password.
"""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydicom.datadict import tag_for_keyword

from segqc.pacs.client import JsonItem, PacsClient, Parameters, is_uid, text_of
from segqc.pacs.errors import PacsRefused
from segqc.pacs.multipart import boundary_of, joined, parts
from segqc.pacs.source import PacsScans
from segqc.server.dicomweb.archive import unknown
from segqc.server.dicomweb.cache import BoundedCache
from segqc.server.dicomweb.media import JSON_TYPES, choose
from segqc.server.dicomweb.query import keyword_of
from segqc.server.dicomweb.routes import MAX_RESULTS, Frames, Instance, Series, Study, address_of, in_slot
from segqc.server.errors import RequestError
from segqc.server.monailabel.facade import current_app
from segqc.settings import PacsSettings
from segqc.store import pacs
from segqc.store.records import JsonObject, SeriesRecord

router = APIRouter(prefix="/dicomweb", tags=["DICOMweb"])

own_router = APIRouter(tags=["SegQC"])

_STUDY: Final = "/studies/{study}"
_SERIES: Final = f"{_STUDY}/series/{{series}}"
_INSTANCE: Final = f"{_SERIES}/instances/{{instance}}"
_LOOK_SECONDS: Final = 20.0
_PAGE: Final = 500
_MAX_PAGES: Final = 40
_MAX_KNOWN: Final = 1000  # series whose instances are remembered
_COUNT: Final = re.compile("[0-9]{1,9}")
_FRAMES: Final = re.compile("[1-9][0-9]{0,8}(,[1-9][0-9]{0,8}){0,15}")
_BULK: Final = re.compile("[0-9A-Fa-f]{8}(/[0-9]{1,6}/[0-9A-Fa-f]{8}){0,8}")
_OPTIONS: Final = frozenset({"limit", "offset", "includefield", "fuzzymatching", "accept", "charset"})  # no attributes
_STUDY_UID: Final = "0020000D"
_SERIES_UID: Final = "0020000E"
_INSTANCE_UID: Final = "00080018"
_JSON: Final = "application/dicom+json"
_PASSED_ON: Final = (400, 404, 406, 416)


def _tag_of(name: str) -> str:
    """The number of an attribute by its keyword, as answers name it; of one inside of sequences, the name itself.

    Raises:
        RequestError: 400 if DICOM knows none of this name.
    """
    keyword = keyword_of(name)
    tag = tag_for_keyword(keyword)
    return keyword if tag is None else f"{tag:08X}"


_OF_STUDY: Final = frozenset(map(_tag_of, (
    "SpecificCharacterSet", "StudyDate", "StudyTime", "AccessionNumber", "InstanceAvailability", "StudyDescription",
    "ReferringPhysicianName", "TimezoneOffsetFromUTC", "RetrieveURL", "PatientName", "PatientID", "IssuerOfPatientID",
    "PatientBirthDate", "PatientSex", "PatientAge", "StudyInstanceUID", "StudyID",
)))  # fmt: skip
"""What the PACS itself may tell of a study, and look for: it speaks of no series."""
_MODALITIES: Final = _tag_of("ModalitiesInStudy")
_STUDY_SERIES: Final = _tag_of("NumberOfStudyRelatedSeries")
_STUDY_INSTANCES: Final = _tag_of("NumberOfStudyRelatedInstances")
_SUMMARIES: Final = frozenset({_MODALITIES, _STUDY_SERIES, _STUDY_INSTANCES, *map(_tag_of, (
    "SOPClassesInStudy", "AnatomicRegionsInStudyCodeSequence", "NumberOfPatientRelatedStudies",
    "NumberOfPatientRelatedSeries", "NumberOfPatientRelatedInstances",
))})  # fmt: skip
"""What the PACS would tell of all series of a study or patient, those that are no scans included."""

Picture = Annotated[str, Path(description="rendered or thumbnail.", pattern="^(rendered|thumbnail)$")]
Bulk = Annotated[str, Path(description="The attribute, as its BulkDataURI says.")]
_instances: BoundedCache[tuple[str, str], frozenset[str]] = BoundedCache(_MAX_KNOWN)


def _source() -> PacsScans:
    found = current_app().context.dataset.pacs
    if found is None:
        raise RequestError(404, "the scans of this server are no series of a PACS.")
    return found


def _readable(study: str | None = None) -> dict[str, SeriesRecord]:
    """The series that may be read: those of the scans, all or of one study."""
    with current_app().context.dataset.store.read() as transaction:
        return pacs.readable_series(transaction, study)


def _check(study: str, series: str | None = None, instance: str | None = None) -> list[str]:
    """The series of a study that may be read, or the one that is named.

    Raises:
        RequestError: 404 if there is none.
    """
    found = list(_readable(study)) if is_uid(study) else []
    if not found:
        raise unknown("study", study)
    if series is None:
        return found
    if series not in found:
        raise unknown("series", series)
    if instance is not None and not (is_uid(instance) and instance in _instances_of(study, series, instance)):
        raise unknown("instance", instance)
    return [series]


def _instances_of(study: str, series: str, wanted: str) -> frozenset[str]:
    """The instances of a series, looked up again where the wanted one was none of them."""
    client = _source().client

    def look() -> frozenset[str]:
        found = client.query(f"/studies/{study}/series/{series}/instances", [("includefield", "SeriesInstanceUID")])
        return frozenset(text_of(i, _INSTANCE_UID) for i in found if text_of(i, _SERIES_UID) in ("", series))

    known = _instances.get((study, series), look)
    return known if wanted in known else look()


# ------------------------------------------------------------------------------------------------------------- searches


@router.get("/studies", summary="Search for studies")
async def search_studies(request: Request) -> Response:
    """Find studies that hold scans; modalities, numbers and paging count these scans' series only."""
    return await in_slot(request, lambda: _search_studies(request))


@router.get("/series", summary="Search for series of all studies")
async def search_series(request: Request) -> Response:
    """Find series that are scans."""
    return await in_slot(request, lambda: _search_series(request, "/series", _readable()))


@router.get("/instances", summary="Search for instances of all studies")
async def search_instances(request: Request) -> Response:
    """Find images of scans."""
    return await in_slot(request, lambda: _search_series(request, "/instances", _readable()))


@router.get(f"{_STUDY}/series", summary="Search for the series of a study")
async def search_series_of_study(request: Request, study: Study) -> Response:
    """Find the series of a study that are scans."""

    def work() -> Response:
        return _search_series(request, f"/studies/{study}/series", _check(study))

    return await in_slot(request, work)


@router.get(f"{_STUDY}/instances", summary="Search for the instances of a study")
async def search_instances_of_study(request: Request, study: Study) -> Response:
    """Find images of the scans of a study."""

    def work() -> Response:
        return _search_series(request, f"/studies/{study}/instances", _check(study))

    return await in_slot(request, work)


@router.get(f"{_SERIES}/instances", summary="Search for the instances of a series")
async def search_instances_of_series(request: Request, study: Study, series: Series) -> Response:
    """Find images of a scan."""

    def work() -> Response:
        return _search_series(request, f"/studies/{study}/series/{series}/instances", _check(study, series))

    return await in_slot(request, work)


def _search_studies(request: Request) -> Response:
    wanted: list[str] = []
    asked: list[tuple[str, str]] = []
    for name, value in request.query_params.multi_items():
        if name in _OPTIONS or (tag := _tag_of(name)) in _OF_STUDY:
            asked.append((name, value))
        elif tag == _MODALITIES:
            wanted.append(value)
        else:
            raise RequestError(400, f"studies are not searched by {name[:80]}; search for series.")
    studies: dict[str, list[SeriesRecord]] = {}
    for series in _readable().values():
        studies.setdefault(series.study_uid, []).append(series)
    allowed = {uid for uid, held in studies.items() if all(_holds(held, value) for value in wanted)}
    return _search(request, "/studies", _STUDY_UID, allowed, asked, lambda item: _of_study(item, studies))


def _holds(series: Sequence[SeriesRecord], modalities: str) -> bool:
    """Whether one of a study's series has one of some modalities, which may be patterns."""
    patterns = re.findall(r"[^,\\\s]+", modalities) or ["*"]
    return any(fnmatch.fnmatchcase(s.modality, pattern) for s in series for pattern in patterns)


def _of_study(item: JsonItem, studies: Mapping[str, Sequence[SeriesRecord]]) -> JsonItem:
    """What is told of a study: as the PACS tells it where no series is spoken of, else by the scans' series."""
    series = studies[text_of(item, _STUDY_UID)]
    modalities = sorted({s.modality for s in series} - {""})
    return {
        **{tag: value for tag, value in item.items() if tag in _OF_STUDY},
        _MODALITIES: {"vr": "CS", "Value": modalities},
        _STUDY_SERIES: {"vr": "IS", "Value": [len(series)]},
        _STUDY_INSTANCES: {"vr": "IS", "Value": [sum(s.images for s in series)]},
    }


def _of_series(item: JsonItem) -> JsonItem:
    """What is told of a series, or of an image of it."""
    return {tag: value for tag, value in item.items() if tag not in _SUMMARIES}


def _search_series(request: Request, path: str, allowed: Collection[str]) -> Response:
    asked = request.query_params.multi_items()
    for name, _ in asked:
        if name not in _OPTIONS and _tag_of(name) in _SUMMARIES:
            raise RequestError(400, f"series are not searched by {name[:80]}; search for studies.")
    return _search(request, path, _SERIES_UID, allowed, asked, _of_series)


def _search(
    request: Request,
    path: str,
    tag: str,
    allowed: Collection[str],
    asked: Parameters,
    describe: Callable[[JsonItem], JsonItem],
) -> Response:
    """Ask the PACS what a client asks, page by page, and describe what lies in the allowed studies or series."""
    media_type = choose(request, JSON_TYPES)
    source = _source()
    asked = [(name, value) for name, value in asked if name not in ("limit", "offset")]
    limit = min(_count(request, "limit", MAX_RESULTS), MAX_RESULTS)
    offset = _count(request, "offset", 0)
    found: list[Any] = []
    for item in _pages(source.client, path, [*asked, *_narrower(current_app().context.settings.pacs, path, asked)]):
        if text_of(item, tag) in allowed:
            found.append(item)
            if len(found) >= offset + limit:
                break
    told = [describe(item) for item in found[offset : offset + limit]]
    return JSONResponse(_rewritten(told, address_of(request)), media_type=media_type)


def _pages(client: PacsClient, path: str, parameters: Sequence[tuple[str, str]]) -> Iterator[Any]:
    own = [("includefield", "SeriesInstanceUID")] if path.endswith("instances") else []
    seen = 0
    first: Any = None
    for _ in range(_MAX_PAGES):
        page = client.query(path, [*parameters, *own, ("limit", str(_PAGE)), ("offset", str(seen))])
        if not page or page[0] == first:  # at the end, or of a PACS that knows no pages
            return
        yield from page
        first = page[0] if seen == 0 else first
        seen += len(page)
        if len(page) < _PAGE:
            return


def _narrower(settings: PacsSettings, path: str, asked: Parameters) -> Iterator[tuple[str, str]]:
    """The settings' own filters, where the client has named no other: fewer results have to be passed over."""
    names = {name for name, _ in asked}
    if path.startswith("/studies/"):
        return
    if settings.patient is not None and settings.patient.isascii() and not names & {"PatientID", "00100020"}:
        yield "PatientID", settings.patient
    keyword = "ModalitiesInStudy" if path == "/studies" else "Modality"
    if len(settings.modality) == 1 and not names & {"Modality", "00080060"}:
        yield keyword, settings.modality[0]


def _count(request: Request, name: str, default: int) -> int:
    value = request.query_params.get(name)
    if value is None:
        return default
    if not _COUNT.fullmatch(value):
        raise RequestError(400, f"{name} is a whole number from 0 on, not {value[:80]!r}.")
    return int(value)


def _rewritten(value: Any, address: str) -> Any:
    """What the PACS says, with its addresses replaced by this server's."""
    if isinstance(value, dict):
        return {key: _rewritten(item, address) for key, item in value.items()}
    if isinstance(value, list):
        return [_rewritten(item, address) for item in value]
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        _, found, rest = value.partition("/studies/")
        return f"{address}/studies/{rest}" if found else value
    return value


# ------------------------------------------------------------------------------------------------------------- metadata


@router.get(f"{_STUDY}/metadata", summary="The headers of a study's images")
async def study_metadata(request: Request, study: Study) -> Response:
    """Send the headers of all images of a study's scans, without pixels."""
    return await in_slot(request, lambda: _metadata(request, study, _check(study), ""))


@router.get(f"{_SERIES}/metadata", summary="The headers of a series' images")
async def series_metadata(request: Request, study: Study, series: Series) -> Response:
    """Send the headers of all images of a scan, without pixels."""
    return await in_slot(request, lambda: _metadata(request, study, _check(study, series), ""))


@router.get(f"{_INSTANCE}/metadata", summary="An image's header")
async def instance_metadata(request: Request, study: Study, series: Series, instance: Instance) -> Response:
    """Send the header of an image, without pixels."""

    def work() -> Response:
        return _metadata(request, study, _check(study, series, instance), f"/instances/{instance}")

    return await in_slot(request, work)


def _metadata(request: Request, study: str, series: Sequence[str], rest: str) -> Response:
    media_type = choose(request, JSON_TYPES)
    asked = request.query_params.multi_items()
    client = _source().client
    found = [item for uid in series for item in client.query(f"/studies/{study}/series/{uid}{rest}/metadata", asked)]
    return JSONResponse(_rewritten([_of_series(item) for item in found], address_of(request)), media_type=media_type)


# ----------------------------------------------------------------------------------------- images, frames and pictures


@router.get(_SERIES, summary="A series' images")
async def series_images(request: Request, study: Study, series: Series) -> Response:
    """Send all images of a scan as DICOM files, as the parts of one message."""
    return await _pass_on(request, lambda: _check(study, series), f"/studies/{study}/series/{series}")


@router.get(f"{_SERIES}/{{picture}}", summary="A picture of a series")
async def series_picture(request: Request, study: Study, series: Series, picture: Picture) -> Response:
    """Send a picture of a scan."""
    return await _pass_on(request, lambda: _check(study, series), f"/studies/{study}/series/{series}/{picture}")


@router.get(_INSTANCE, summary="An image")
async def instance_image(request: Request, study: Study, series: Series, instance: Instance) -> Response:
    """Send an image as a DICOM file."""
    return await _of_instance(request, study, series, instance, "")


@router.get(f"{_INSTANCE}/{{picture}}", summary="A picture of an image")
async def instance_picture(
    request: Request, study: Study, series: Series, instance: Instance, picture: Picture
) -> Response:
    """Send a picture of an image."""
    return await _of_instance(request, study, series, instance, f"/{picture}")


@router.get(f"{_INSTANCE}/frames/{{frames}}", summary="An image's pixels")
async def instance_frames(
    request: Request, study: Study, series: Series, instance: Instance, frames: Frames
) -> Response:
    """Send the pixels of frames."""
    _check_frames(frames)
    return await _of_instance(request, study, series, instance, f"/frames/{frames}")


@router.get(f"{_INSTANCE}/frames/{{frames}}/{{picture}}", summary="A picture of a frame")
async def frame_picture(
    request: Request, study: Study, series: Series, instance: Instance, frames: Frames, picture: Picture
) -> Response:
    """Send a picture of frames."""
    _check_frames(frames)
    return await _of_instance(request, study, series, instance, f"/frames/{frames}/{picture}")


@router.get(f"{_INSTANCE}/bulk/{{bulk:path}}", summary="A large value of an image's header")
async def bulk_value(request: Request, study: Study, series: Series, instance: Instance, bulk: Bulk) -> Response:
    """Send a value that headers only point to."""
    if not _BULK.fullmatch(bulk):
        raise unknown("value", bulk)
    return await _of_instance(request, study, series, instance, f"/bulk/{bulk}")


def _check_frames(frames: str) -> None:
    if not _FRAMES.fullmatch(frames):
        raise RequestError(400, f"frames are numbers from 1 on with commas between, not {frames[:80]!r}.")


async def _of_instance(request: Request, study: str, series: str, instance: str, rest: str) -> Response:
    path = f"/studies/{study}/series/{series}/instances/{instance}{rest}"
    return await _pass_on(request, lambda: _check(study, series, instance), path)


async def _pass_on(request: Request, check: Callable[[], object], path: str) -> Response:
    """Send what the PACS answers to a path, as it comes, if a check allows it."""

    def work() -> Response:
        check()
        accept = ", ".join(request.headers.getlist("accept")) or "*/*"
        try:
            answer, close = _source().client.open(path, accept, request.query_params.multi_items())
        except PacsRefused as error:
            if error.code in _PASSED_ON:
                raise RequestError(error.code or 404, str(error)) from error
            raise

        media_type = answer.headers.get("Content-Type", "application/octet-stream")
        mark = boundary_of(media_type)

        def body() -> Iterator[bytes]:
            try:
                # without the other headers of the parts, which name the PACS
                yield from answer.iter_bytes() if mark is None else joined(parts(answer.iter_bytes(), mark), mark)
            finally:
                close()

        return StreamingResponse(body(), answer.status_code, media_type=media_type)

    return await in_slot(request, work)


# ----------------------------------------------------------------------------------------------------------- the PACS


@own_router.get("/segqc/pacs", summary="Final labels in the PACS")
def pacs_status() -> JsonObject:
    """Tell which label versions lie in the PACS as DICOM SEG, which are on their way, and what went wrong last."""
    source = _source()
    with current_app().context.dataset.store.read() as transaction:
        found = pacs.segmentations(transaction)
        waiting = pacs.to_be_done(transaction)
    return {
        "problem": source.problem,
        "to_be_done": waiting,
        "segmentations": [
            {
                "scan": record.scan,
                "version": record.label,
                "state": record.state,
                "origin": record.origin,
                "series": record.series_uid,
                "attempts": record.attempts,
                "problem": record.problem,
                "since": record.changed_at.isoformat(),
            }
            for record in found
        ],
    }


@own_router.post("/segqc/pacs/sync", summary="Look through the PACS now")
def look_through() -> JsonObject:
    """Look for new, changed and removed series before the usual time; what takes longer is done after the answer."""
    _source().look_now()
    until = time.monotonic() + _LOOK_SECONDS
    datastore = current_app().datastore
    datastore.refresh(lambda: time.monotonic() > until)
    total: int = datastore.status()["total"]
    return {"scans": total, "problem": _source().problem}
