"""The page of a scan: its slices with mask and likely errors, its history, and what a reviewer does with it."""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path as FilePath
from typing import Annotated, Any, Final
from urllib.parse import quote, urlencode

import numpy as np
from fastapi import APIRouter, Depends, File, Form, Path, Query, Request, Response, UploadFile

from segqc.errors import SegqcError
from segqc.loop.history import VersionSummary
from segqc.loop.review import STATE_OF, Decision, review
from segqc.plots import COLOURS
from segqc.server.dicomweb.cache import BoundedCache
from segqc.server.dicomweb.segmentations import to_segmentation
from segqc.server.errors import RequestError
from segqc.server.monailabel.facade import current_app
from segqc.server.ohif.viewer import viewer_address
from segqc.server.pages import pictures
from segqc.server.pages.now import now_shown
from segqc.server.pages.page import AskedPage, Columns, Seen, csv_file
from segqc.server.pages.pictures import Layers, draw
from segqc.server.pages.shown import HeatState, ShownScan, history, shown_scan
from segqc.server.parameters import MAX_INTEGER, LabelParams
from segqc.server.routers.checks import check_of
from segqc.server.routers.datastore import EmptyLabelError, save_label_of
from segqc.server.routers.dependencies import AskingUser, in_turn
from segqc.store.labels import FINAL
from segqc.store.records import LabelRecord
from segqc.types import PredictionInterval, SliceQuality, Structure, StructureQuality, applying
from segqc.volumes import Volume, read_grid, temporary_labels, write_labels
from segqc.volumes.dicom_seg import SEGMENTATION_SUFFIX

router = APIRouter(prefix="/scans/{scan}", include_in_schema=False)

Scan = Annotated[str, Path(max_length=500)]
Version = Annotated[int, Query(ge=1, le=MAX_INTEGER)]
Edge = Annotated[int, Query(ge=32, le=1200)]
_STRIP_EDGE: Final = 144
_VIEW_EDGE: Final = 720
_THUMBNAIL_EDGE: Final = 144
_FOR_EVER: Final = "private, max-age=31536000, immutable"
_NOT_KEPT: Final = "private, no-cache"
_THUMBNAILS_BYTES: Final = 32e6
_thumbnails: Final[BoundedCache[tuple[object, ...], bytes]] = BoundedCache(_THUMBNAILS_BYTES, len)
_FORMATS: Final[Mapping[str, str]] = {".nii.gz": "NIfTI", ".nrrd": "NRRD", SEGMENTATION_SUFFIX: "SEG"}


@dataclass(frozen=True, slots=True)
class SliceBar:
    """A slice of the strip: how large its bar is, from 0 to 1, and what it says."""

    index: int
    value: float | None
    share: float


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """A structure with its colour and what is estimated of it."""

    structure: Structure
    colour: str
    quality: StructureQuality | None


def _layers(mask: bool = False, heat: bool = False, boxes: bool = False, whole: bool = False) -> Layers:
    return Layers(mask, heat, boxes, whole)


AskedLayers = Annotated[Layers, Depends(_layers)]


@router.get("")
def show_scan(
    request: Request,
    page: AskedPage,
    scan: Scan,
    asked: AskedLayers,
    index: Annotated[int | None, Query(alias="slice", ge=0, le=MAX_INTEGER)] = None,
    version: Annotated[int | None, Query(ge=1, le=MAX_INTEGER)] = None,
    other: Annotated[int | None, Query(ge=1, le=MAX_INTEGER)] = None,
    drawn: bool = False,
) -> Response:
    """Show a scan: a version of its label, compared with another one where that is wished for."""
    shown = _shown(scan)
    layers = asked if drawn else Layers()
    label = shown.usual if version is None else shown.version(version)
    compared = shown.version(other) if other is not None else None
    past = history(shown.context, shown.record)
    problem: str | None = None
    bars: list[SliceBar] = []
    heat_state: HeatState = "none"
    heat_problem: str | None = None
    count = 0
    study = None
    try:
        count = shown.header.count
        study = shown.dicom.study_uid
        bars = _bars(shown, label, compared, count)
        heat_state, heat_problem = shown.heat(request.app.state.inference)
    except SegqcError as error:  # its file is gone, or cannot be read: the rest of the page can be shown
        problem, count, bars = str(error), 0, []
    of_layers: dict[str, int | None] = {name: 1 for name, is_drawn in asdict(layers).items() if is_drawn}
    chosen = {"slice": index, "version": version, "other": other, **({"drawn": 1, **of_layers} if drawn else {})}
    first = _first(bars) if compared is not None or count == 0 else shown.worst(label)
    return page.render(
        "scan.html.jinja",
        shown=shown,
        warning=page.warning if shown.assessment is not None else None,
        record=shown.record,
        past=past,
        title=past.title,
        check=next((v.check for v in past.versions if label is not None and v.label.id == label.id), None),
        is_checking=shown.final is not None and shown.context.checks.is_running(shown.final),
        label=label,
        compared=compared,
        layers=layers,
        legend=_legend(shown),
        bars=bars,
        count=count,
        index=min(index if index is not None else first, max(0, count - 1)),
        ranked=sorted(range(len(bars)), key=lambda i: -bars[i].share),
        problem=problem,
        heat_state=heat_state,
        heat_problem=heat_problem,
        study=study,
        viewer=viewer_address(shown.dicom) if study is not None else None,
        slicer=_slicer_address(request, study) if study is not None else None,
        server=str(request.base_url).rstrip("/"),
        here=f"/scans/{quote(shown.record.name, safe='')}",
        link=functools.partial(_link, shown.record.name, chosen),
        picture=functools.partial(_picture_address, shown, label, compared, layers),
        strip_edge=_STRIP_EDGE,
        view_edge=_VIEW_EDGE,
        colours={"added": pictures.ADDED, "removed": pictures.REMOVED, "changed": pictures.CHANGED},
        formats=_FORMATS,
        jobs=now_shown(),
    )


def _shown(name: str) -> ShownScan:
    return shown_scan(current_app().context, name)


def _first(bars: list[SliceBar]) -> int:
    """The slice with the largest difference."""
    return max(bars, key=lambda bar: bar.share).index if bars else 0


def _bars(shown: ShownScan, label: LabelRecord | None, other: LabelRecord | None, count: int) -> list[SliceBar]:
    """The bars of the strip: voxels that differ where two versions are compared, else the error sums."""
    if label is not None and other is not None:
        values: list[float] = [float(v) for v in _differing(shown, label, other)]
    else:
        values = shown.error_sums()
    largest = max(values, default=0.0) or 1.0
    if len(values) != count:
        return [SliceBar(index, None, 0.0) for index in range(count)]
    return [SliceBar(index, value, value / largest) for index, value in enumerate(values)]


def _differing(shown: ShownScan, label: LabelRecord, other: LabelRecord) -> list[int]:
    """How many voxels of each slice two versions differ in.

    Raises:
        RequestError: 409 if they do not lie on one grid.
    """
    one, two = shown.array(label), shown.array(other)
    if one.shape != two.shape:
        raise RequestError(409, f"the versions {label.id} and {other.id} do not lie on one grid.")
    in_plane = tuple(a for a in range(3) if a != shown.header.layout.slice_axis)
    return [int(n) for n in np.count_nonzero(one != two, axis=in_plane)]


def _legend(shown: ShownScan) -> list[LegendEntry]:
    assessed = {q.name: q for q in shown.assessment[1].structures} if shown.assessment is not None else {}
    return [
        LegendEntry(structure, COLOURS[number % len(COLOURS)], assessed.get(structure.name))
        for number, structure in enumerate(shown.context.structures())
    ]


def _link(
    scan: str,
    chosen: Mapping[str, int | None],
    **changes: int | None,
) -> str:
    """The address of the page with some choices changed."""
    query = {name: value for name, value in {**chosen, **changes}.items() if value is not None}
    return f"/scans/{quote(scan, safe='')}{f'?{urlencode(query)}' if query else ''}"


def _picture_address(
    shown: ShownScan, label: LabelRecord | None, other: LabelRecord | None, layers: Layers, index: int, edge: int
) -> str:
    """Where a picture of a slice comes from: all that it depends on is named, so that browsers may keep it."""
    query: dict[str, Any] = {
        "edge": edge,
        "content": (shown.record.sha256 or "")[:8],
        **({"version": label.id} if label is not None else {}),
        **({"other": other.id} if other is not None else {}),
        **({"assessment": shown.assessment[0]} if shown.assessment is not None and other is None else {}),
        **{name: 1 for name, is_drawn in asdict(layers).items() if is_drawn},
    }
    return f"/scans/{quote(shown.record.name, safe='')}/slices/{index}?{urlencode(query)}"


def _slicer_address(request: Request, study: str) -> str:
    """What a browser hands to an installed 3D Slicer, which fetches the study by DICOMweb."""
    query = {"studyUID": study, "dicomweb_endpoint": f"{str(request.base_url).rstrip('/')}/dicomweb"}
    return f"slicer://viewer/?{urlencode(query)}"


@router.get("/slices/{index}")
def slice_picture(
    scan: Scan,
    index: Annotated[int, Path(ge=0, le=MAX_INTEGER)],
    layers: AskedLayers,
    version: Annotated[int | None, Query(ge=1, le=MAX_INTEGER)] = None,
    other: Annotated[int | None, Query(ge=1, le=MAX_INTEGER)] = None,
    assessment: Annotated[int | None, Query(ge=1, le=MAX_INTEGER)] = None,
    edge: Edge = _VIEW_EDGE,
) -> Response:
    """Send a picture of a slice; likely errors are those of the assessment, if it still is the scan's."""
    shown = _shown(scan)
    if index >= shown.header.count:
        raise RequestError(404, f"the scan {scan!r} has {shown.header.count} slices, numbered from 0.")
    is_current = shown.assessment is not None and shown.assessment[0] == assessment
    slices = shown.slices(
        shown.context.structures(),
        shown.version(version) if version is not None else None,
        other=shown.version(other) if other is not None else None,
        with_errors=is_current,
    )
    is_complete = not (layers.heat and is_current) or slices.errors is not None
    return _picture(draw(slices, index, layers, edge), is_kept=is_complete)


@router.get("/worst")
def worst_slice(scan: Scan, assessment: Annotated[int | None, Query(ge=1, le=MAX_INTEGER)] = None) -> Response:
    """Send a small picture of the slice to look at first."""
    shown = _shown(scan)
    has_errors, label = shown.errors() is not None, shown.assessed or shown.final
    key = (
        shown.record.name,
        shown.record.sha256,
        label.sha256 if label is not None else None,
        shown.assessment[0] if shown.assessment is not None else None,
        has_errors,
    )

    def make() -> bytes:
        slices = shown.slices(shown.context.structures(), label)
        return draw(slices, shown.worst(label), Layers(), _THUMBNAIL_EDGE)

    is_current = shown.assessment is not None and shown.assessment[0] == assessment
    return _picture(_thumbnails.get(key, make), is_kept=is_current and has_errors)


def _picture(content: bytes, *, is_kept: bool) -> Response:
    headers = {"Cache-Control": _FOR_EVER if is_kept else _NOT_KEPT, "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type=pictures.MEDIA_TYPE, headers=headers)


@router.get("/heat")
def heat_fragment(request: Request, page: AskedPage, scan: Scan) -> Response:
    """Tell how far the error map is, as a part of the page."""
    state, problem = _shown(scan).heat(request.app.state.inference)
    return page.render("heat.html.jinja", heat_state=state, heat_problem=problem, scan=scan)


@router.get("/check")
def check_fragment(page: AskedPage, scan: Scan) -> Response:
    """Tell how far the check of the final label is, as a part of the page."""
    shown = _shown(scan)
    is_checking = shown.final is not None and shown.context.checks.is_running(shown.final)
    return page.render("check.html.jinja", is_checking=is_checking)


# ------------------------------------------------------------------------------------------------------------- tables


@router.get("/slices.csv")
def slices_csv(scan: Scan) -> Response:
    """Send what is estimated of each slice and structure as a table."""
    shown = _shown(scan)
    structures = shown.assessment[1].structures if shown.assessment is not None else ()
    columns: Columns[tuple[StructureQuality, SliceQuality]] = {
        "scan": lambda _: shown.record.name,
        "slice": lambda row: row[1].index,
        "structure": lambda row: row[0].name,
        "error sum": lambda row: row[1].error_sum,
        "Dice": lambda row: row[1].metrics.dice,
        "IoU": lambda row: row[1].metrics.iou,
        "ARVD": lambda row: row[1].metrics.arvd,
        "RVD": lambda row: row[1].metrics.rvd,
        "boxes": lambda row: sum(box.slice_index == row[1].index for box in row[0].raw.boxes),
    }
    return csv_file(f"{shown.record.name} slices", columns, [(q, s) for q in structures for s in q.raw.slices])


def _ends(version: VersionSummary) -> PredictionInterval | None:
    return applying(version.check.assessment.dice_interval) if version.check is not None else None


_VERSION_COLUMNS: Final[Columns[VersionSummary]] = {
    "version": lambda v: v.label.id,
    "tag": lambda v: v.label.tag,
    "current": lambda v: v.is_current,
    "made by": lambda v: v.label.actor.name,
    "as": lambda v: v.label.source,
    "known by": lambda v: v.label.actor.identified_by,
    "at": lambda v: v.label.made_at.isoformat(timespec="seconds"),
    "from": lambda v: v.label.parent,
    "Dice before": lambda v: v.dice_before,
    "voxels changed": lambda v: v.correction.change.voxels_changed if v.correction is not None else None,
    "slices changed": lambda v: v.correction.change.slices_changed if v.correction is not None else None,
    "seconds": lambda v: v.correction.seconds if v.correction is not None else None,
    "estimated Dice": lambda v: v.check.assessment.dice if v.check is not None else None,
    "estimated Dice low": lambda v: ends.low if (ends := _ends(v)) is not None else None,
    "estimated Dice high": lambda v: ends.high if (ends := _ends(v)) is not None else None,
    "by bundle": lambda v: v.check.bundle if v.check is not None else None,
    "check": lambda v: v.check.sentence if v.check is not None else None,
    "sha256": lambda v: v.label.sha256,
}


@router.get("/versions.csv")
def versions_csv(scan: Scan) -> Response:
    """Send the history of the scan's labels as a table."""
    shown = _shown(scan)
    return csv_file(f"{shown.record.name} versions", _VERSION_COLUMNS, history(shown.context, shown.record).versions)


@router.get("/difference.csv")
def difference_csv(scan: Scan, version: Version, other: Version) -> Response:
    """Send how many voxels of each slice two versions differ in."""
    shown = _shown(scan)
    one, two = shown.version(version), shown.version(other)
    columns: Columns[tuple[int, int]] = {
        "scan": lambda _: shown.record.name,
        "slice": lambda row: row[0],
        "from": lambda _: other,
        "to": lambda _: version,
        "voxels changed": lambda row: row[1],
    }
    differing = enumerate(_differing(shown, one, two))
    return csv_file(f"{shown.record.name} {other} to {version}", columns, differing)


# ------------------------------------------------------------------------------------------------------------ actions


@router.post("/review")
def review_one(
    page: AskedPage,
    scan: Scan,
    decision: Annotated[Decision, Form()],
    reason: Annotated[str, Form(max_length=500)] = "",
    seen: Seen = None,
) -> Response:
    """Decide of the scan."""
    shown = _shown(scan)

    def decide() -> str:
        dataset = shown.context.dataset
        review(dataset, shown.record.name, STATE_OF[decision], page.actor, reason.strip() or None, seen=seen)
        return {
            "approve": "Approved.",
            "reject": "Rejected: the scan waits for a correction again.",
            "exclude": "Excluded: the scan is kept, and is neither handed out nor trained on.",
            "reopen": "Reopened: the scan waits for a label again.",
        }[decision]

    return _done(page, shown, decide)


@router.post("/restore")
def restore_version(page: AskedPage, scan: Scan, version: Annotated[int, Form(ge=1, le=MAX_INTEGER)]) -> Response:
    """Make an earlier version the current one of its tag again."""
    shown = _shown(scan)

    def restore() -> str:
        old = shown.version(version)
        made = shown.context.dataset.store.restore_label(old.id, page.actor)
        return f"Version {old.id} is the current label {made.tag!r} again, as version {made.id}."

    return _done(page, shown, restore)


@router.post("/label")
async def upload_label(
    request: Request,
    page: AskedPage,
    user: AskingUser,
    scan: Scan,
    file: Annotated[UploadFile | None, File()] = None,
    is_empty: Annotated[bool, Form(alias="empty")] = False,
) -> Response:
    """Keep an uploaded label map as the scan's final label; its values are those of the settings.

    An empty one is asked about first. It is kept as ``empty`` says, then: there is nothing to send again.
    """
    shown = _shown(scan)

    def save() -> dict[str, Any]:
        names = shown.context.labels()
        params = LabelParams(label_names={**names}) if names else LabelParams()
        sent = file if file is not None and not is_empty else _empty_label(shown)
        return save_label_of(user, shown.record.name, sent, params, FINAL, asks_if_empty=not is_empty)

    if not is_empty and (file is None or not file.filename):
        return page.go(_address(shown), "Choose a file first.", problem=True)
    try:
        kept = await in_turn(request, save)
    except EmptyLabelError:
        return page.render("empty.html.jinja", shown=shown, here=_address(shown))
    except SegqcError as error:
        return page.go(_address(shown), str(error), problem=True)
    status = await check_of(request, kept["version"])
    told = f" {status.sentence}" if status.state == "done" else ""
    return page.go(_address(shown), f"Version {kept['version']} kept as the final label.{told}")


def _empty_label(shown: ShownScan) -> UploadFile:
    grid = read_grid(shown.context.dataset.scan_file(shown.record), limits=shown.context.settings.intake)
    with temporary_labels(Volume(np.zeros(grid.shape, np.uint8), grid.affine, grid.acquisition_axis)) as path:
        return UploadFile(io.BytesIO(path.read_bytes()), filename=path.name)


def _done(page: AskedPage, shown: ShownScan, action: Callable[[], str]) -> Response:
    """Do something, and show the page with what came of it."""
    try:
        return page.go(_address(shown), action())
    except SegqcError as error:
        return page.go(_address(shown), str(error), problem=True)


def _address(shown: ShownScan) -> str:
    return f"/scans/{quote(shown.record.name, safe='')}"


@router.get("/versions/{version}/{name}")
def download_version(scan: Scan, version: Annotated[int, Path(ge=1, le=MAX_INTEGER)], name: str) -> Response:
    """Send a label version as a file, with the values of the settings; ``name`` ends with the format."""
    shown = _shown(scan)
    label = shown.version(version)
    suffix = next((s for s in _FORMATS if name.endswith(s)), None)
    if suffix is None:
        raise RequestError(404, f"a label is sent as {' or '.join(_FORMATS)}, not as {name[:80]!r}.")
    name = f"{shown.record.name}_{label.tag}_{label.id}{suffix}"
    if suffix == SEGMENTATION_SUFFIX:
        context = shown.context
        content = to_segmentation(context.dataset, context.archive, shown.dicom, label, context.labels())
        return _attachment(content, name)
    with tempfile.TemporaryDirectory(prefix="segqc-") as folder:
        path = FilePath(folder) / f"label{suffix}"
        write_labels(shown.context.dataset.store.read_label(label), path)
        return _attachment(path.read_bytes(), name)


def _attachment(content: bytes, name: str) -> Response:
    named = f"attachment; filename*=UTF-8''{quote(name, safe='')}"
    headers = {"Content-Disposition": named, "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type="application/octet-stream", headers=headers)
