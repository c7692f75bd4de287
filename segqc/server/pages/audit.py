"""The audit: the final labels that are probably wrong, worst first, and those that a reviewer has found right."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Final
from urllib.parse import urlencode

from fastapi import APIRouter, Form, Path, Query, Response

from segqc.errors import SegqcError
from segqc.loop import error_maps
from segqc.loop.audit import missing_network
from segqc.networks.model_file import ModelError
from segqc.server.context import AppContext
from segqc.server.dicomweb.cache import BoundedCache
from segqc.server.errors import RequestError
from segqc.server.ohif.viewer import viewer_address
from segqc.server.pages import pictures
from segqc.server.pages.now import ShownJob, now_shown
from segqc.server.pages.page import AskedPage, Columns, csv_file
from segqc.server.pages.pictures import Layers, draw, part_of
from segqc.server.pages.shown import shown_scan
from segqc.server.parameters import MAX_COUNT, MAX_INTEGER, AuditParams
from segqc.server.routers.audit import put_audit
from segqc.store import bundles, label_verdicts
from segqc.store.label_verdicts import AUDIT_VIEWS, AuditCounts, AuditedLabel, AuditView
from segqc.types import UNLIKE, PredictionInterval, bounds

router = APIRouter(include_in_schema=False)

PAGE_SIZE: Final = 30
_EDGE: Final = 320
_FOR_EVER: Final = "private, max-age=31536000, immutable"
_NOT_KEPT: Final = "private, no-cache"
_PICTURES_BYTES: Final = 32e6
_pictures: Final[BoundedCache[tuple[object, ...], bytes]] = BoundedCache(_PICTURES_BYTES, len)

View = Annotated[AuditView, Query()]
Scan = Annotated[str, Path(max_length=500)]


@dataclass(frozen=True, slots=True)
class AuditNow:
    """How far the labels are judged.

    Attributes:
        bundle: the number of the bundle that serves; None without one.
        counts: how many labels each view lists.
        job: that judges labels now, or waits to.
        problem: why labels cannot be judged; None where they can.
    """

    bundle: int | None
    counts: AuditCounts
    job: ShownJob | None
    problem: str | None

    @property
    def judged(self) -> int:
        """How many labels the bundle has judged."""
        return self.counts["all"] - self.counts["not judged"]


def _now(context: AppContext) -> AuditNow:
    with context.dataset.store.read() as transaction:
        bundle = bundles.serving_number(transaction)
        counts = label_verdicts.counts(transaction)
    try:
        problem = missing_network(context.dataset.bundle())
    except ModelError as error:
        problem = str(error)
    job = next((shown for shown in now_shown() if shown.job.kind == "audit"), None)
    return AuditNow(bundle, counts, job, problem)


@router.get("/audit")
def show_audit(
    page: AskedPage,
    view: View = "open",
    number: Annotated[int, Query(alias="page", ge=1, le=MAX_COUNT // PAGE_SIZE)] = 1,
) -> Response:
    """Show a part of the labels."""
    context = page.app.context
    with context.dataset.store.read() as transaction:
        found = label_verdicts.listing(transaction, view, start=(number - 1) * PAGE_SIZE, limit=PAGE_SIZE)
    now = _now(context)
    return page.render(
        "audit.html.jinja",
        labels=found,
        audit_now=now,
        view=view,
        views=AUDIT_VIEWS,
        number=number,
        pages=max(1, math.ceil(now.counts[view] / PAGE_SIZE)),
        link=_link,
        here=_link(view, number),
        viewers={label.scan: _viewer(context, label.scan) for label in found},
        picture=lambda label: _picture_address(label, now.bundle),
        jobs=now_shown(),
    )


def _link(view: AuditView, number: int = 1) -> str:
    query = {**({"view": view} if view != "open" else {}), **({"page": number} if number > 1 else {})}
    return f"/audit?{urlencode(query)}" if query else "/audit"


def _viewer(context: AppContext, scan: str) -> str | None:
    """Where the viewer shows a scan; None where its file is gone."""
    with suppress(SegqcError):
        return viewer_address(context.archive.named(scan))
    return None


def _picture_address(label: AuditedLabel, bundle: int | None) -> str:
    """The query of a picture: all that it depends on is named, so that browsers may keep it."""
    return urlencode({"version": label.label.id, **({} if bundle is None else {"bundle": bundle})})


@router.get("/audit/now")
def now_fragment(page: AskedPage) -> Response:
    """Tell how far the labels are judged, as a part of the page."""
    return page.render("audit_now.html.jinja", audit_now=_now(page.app.context))


@router.get("/audit.csv")
def audit_csv(page: AskedPage, view: View = "all") -> Response:
    """Send the labels as a table."""
    with page.app.context.dataset.store.read() as transaction:
        found = label_verdicts.listing(transaction, view)
    return csv_file("audit", _COLUMNS, found)


def _interval(label: AuditedLabel) -> PredictionInterval | None:
    return label.worst.intervals.dice if label.worst is not None else None


def _end(end: str) -> Callable[[AuditedLabel], object]:
    return lambda label: (bounds(_interval(label)) or {}).get(end)


def _remark(label: AuditedLabel) -> str | None:
    interval = _interval(label)
    return UNLIKE if interval is not None and not interval.applies else None


_COLUMNS: Final[Columns[AuditedLabel]] = {
    "scan": lambda label: label.scan,
    "title": lambda label: label.title,
    "patient": lambda label: label.patient,
    "state": lambda label: label.state,
    "version": lambda label: label.label.id,
    "structure": lambda label: label.worst.name if label.worst is not None else None,
    "estimated Dice": lambda label: label.worst.estimated.dice if label.worst is not None else None,
    "low": _end("low"),
    "high": _end("high"),
    "level": _end("level"),
    "remark": _remark,
    "error volume in ml": lambda label: label.verdict.assessment.error_volume_ml if label.verdict is not None else None,
    "slices": lambda label: " ".join(map(str, label.slices)) or None,
    "what seems wrong": lambda label: label.message,
    "networks": lambda label: label.verdict.networks if label.verdict is not None else None,
    "made by": lambda label: label.label.actor.name,
    "made at": lambda label: label.label.made_at.isoformat(timespec="seconds"),
    "marked right": lambda label: label.mark.actor.name if label.mark is not None else None,
    "marked at": lambda label: label.mark.made_at.isoformat(timespec="seconds") if label.mark is not None else None,
}


@router.get("/audit/{scan}/picture")
def worst_picture(
    page: AskedPage,
    scan: Scan,
    version: Annotated[int | None, Query(ge=1, le=MAX_INTEGER)] = None,
    bundle: Annotated[int | None, Query(ge=1, le=MAX_INTEGER)] = None,
) -> Response:
    """Send a picture of the slice of a final label to look at first."""
    context = page.app.context
    with context.dataset.store.read() as transaction:
        found = label_verdicts.of_scan(transaction, scan)
        serving = bundles.serving_number(transaction)
    if found is None:
        raise RequestError(404, f"the scan {scan!r} has no final label that trains.")
    is_current = (version, bundle) == (found.label.id, serving)
    errors = _errors(context, found, serving)
    key = (str(context.dataset.folder), found.label.id, serving, found.verdict is not None, errors is not None)
    content = _pictures.get(key, lambda: _draw(context, found, errors))
    headers = {
        "Cache-Control": _FOR_EVER if is_current and errors is not None else _NOT_KEPT,
        "X-Content-Type-Options": "nosniff",
    }
    return Response(content, media_type=pictures.MEDIA_TYPE, headers=headers)


def _errors(context: AppContext, found: AuditedLabel, bundle: int | None) -> error_maps.ErrorSteps | None:
    if found.verdict is None or bundle is None:
        return None
    kept = error_maps.read(context.dataset, found.label.id, bundle, "audit-maps")
    return None if kept is None else error_maps.highest(kept)


def _draw(context: AppContext, found: AuditedLabel, errors: error_maps.ErrorSteps | None) -> bytes:
    slices = shown_scan(context, found.scan).slices(context.structures(), found.label, with_errors=False)
    if slices.labels is not None:
        slices = replace(slices, part=part_of(slices.header, [slices.labels], errors))
    assessment = found.verdict.assessment if found.verdict is not None else None
    index = found.worst_slice
    shown = replace(slices, errors=errors, assessment=assessment)
    return draw(shown, slices.header.count // 2 if index is None else index, Layers(), _EDGE)


@router.post("/audit")
def judge_all(page: AskedPage) -> Response:
    """Put the job that judges all final labels into the queue."""
    try:
        answer = put_audit(page.user, AuditParams())
    except SegqcError as error:
        return page.go("/audit", str(error), problem=True)
    note = answer.get("note")
    return page.go("/audit", str(note) if note else "The audit is put: a worker begins it within seconds.")


@router.post("/audit/{scan}")
def mark(
    page: AskedPage,
    scan: Scan,
    version: Annotated[int, Form(ge=1, le=MAX_INTEGER)],
    right: Annotated[bool, Form()] = True,
    back: Annotated[str, Form(max_length=100)] = "/audit",
) -> Response:
    """Note that a label is right, or take it back."""
    target = back if back == "/audit" or back.startswith("/audit?") else "/audit"
    change = label_verdicts.mark_right if right else label_verdicts.remove_mark
    try:
        with page.app.context.dataset.store.write() as transaction:
            title = change(transaction, scan, page.actor, version=version).title
    except SegqcError as error:
        return page.go(target, str(error), problem=True)
    word = "is marked right, until it changes" if right else "is to be looked at again"
    return page.go(target, f"The label of {title} {word}.")
