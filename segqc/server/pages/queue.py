"""The queue: which scans there are, how good their masks are thought to be, and what is to be done with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Final
from urllib.parse import urlencode

from fastapi import APIRouter, Form, Query
from fastapi.responses import Response

from segqc.errors import SegqcError
from segqc.loop.review import STATE_OF, Decision, review
from segqc.selection.expected_gain import EXPECTED_GAIN
from segqc.server.monailabel.facade import current_app
from segqc.server.ohif.viewer import viewer_address
from segqc.server.pages.in_pacs import pacs_standing
from segqc.server.pages.now import now_shown
from segqc.server.pages.page import AskedPage, Columns, Page, Seen, csv_file
from segqc.server.parameters import MAX_COUNT, SampleParams
from segqc.server.routers.dependencies import open_store
from segqc.server.routers.selection import DEFAULT_STRATEGY, next_scan, nothing_left
from segqc.store import bundles, findings, labels, queue
from segqc.store.database import Transaction
from segqc.store.queue import SORT_KEYS, VIEWS, QueuedScan, QueueView, SortKey, Wanted
from segqc.types import UNLIKE, bounds

router = APIRouter(include_in_schema=False)

PAGE_SIZE: Final = 50
_MAX_BULK: Final = 1000
_MAX_FINDINGS: Final = 20

View = Annotated[QueueView, Query()]
Search = Annotated[str, Query(max_length=200)]
Sort = Annotated[SortKey, Query()]


@router.get("/")
def show_queue(
    page: AskedPage,
    view: View = "open",
    search: Search = "",
    sort: Sort = "dice",
    descending: bool = False,
    number: Annotated[int, Query(alias="page", ge=1, le=MAX_COUNT // PAGE_SIZE)] = 1,
) -> Response:
    """Show a part of the queue."""
    wanted = Wanted(
        view=view,
        search=search.strip(),
        sort=sort,
        descending=descending,
        start=(number - 1) * PAGE_SIZE,
        limit=PAGE_SIZE,
    )
    with open_store().read() as transaction:
        found = queue.page(transaction, wanted, volume_score=EXPECTED_GAIN)
        counts = queue.counts(transaction)
        newest = labels.newest(transaction)
        has_bundle = bundles.serving_number(transaction) is not None
        in_pacs = pacs_standing(page.app.context.dataset, transaction)
        refused = findings.listing(transaction)
    pages = max(1, math.ceil(found.total / PAGE_SIZE))
    return page.render(
        "queue.html.jinja",
        found=found,
        counts=counts,
        newest=newest,
        wanted=wanted,
        views=VIEWS,
        sort_keys=SORT_KEYS,
        number=number,
        pages=pages,
        has_bundle=has_bundle,
        in_pacs=in_pacs,
        place=page.app.context.dataset.folder.resolve(),
        pacs=page.app.context.settings.pacs.url,
        warning=page.warning if has_bundle else None,
        findings=refused[:_MAX_FINDINGS],
        more_findings=max(0, len(refused) - _MAX_FINDINGS),
        link=lambda **changes: _link(wanted, number, changes),
        jobs=now_shown(),
    )


def _link(wanted: Wanted, number: int, changes: dict[str, Any]) -> str:
    """The address of the queue, with some choices changed; another choice begins at its first page."""
    chosen = {"view": wanted.view, "search": wanted.search, "sort": wanted.sort, "descending": wanted.descending}
    chosen |= {"page": 1, **changes} if changes else {"page": number}
    usual = {"view": "open", "search": "", "sort": "dice", "descending": False, "page": 1}
    query = {name: value for name, value in chosen.items() if value != usual[name]}
    return (
        f"/?{urlencode({k: str(v).lower() if isinstance(v, bool) else v for k, v in query.items()})}" if query else "/"
    )


@router.get("/queue.csv")
def queue_csv(view: View = "open", search: Search = "", sort: Sort = "dice", descending: bool = False) -> Response:
    """Send the whole list as a table."""
    wanted = Wanted(view=view, search=search.strip(), sort=sort, descending=descending, limit=None)
    with open_store().read() as transaction:
        found = _all(transaction, wanted)
    return csv_file("queue", _COLUMNS, found)


def _all(transaction: Transaction, wanted: Wanted) -> Sequence[QueuedScan]:
    return queue.page(transaction, replace(wanted, limit=None), volume_score=EXPECTED_GAIN).scans


def _end(end: str) -> Callable[[QueuedScan], object]:
    return lambda scan: (bounds(scan.interval) or {}).get(end)


_COLUMNS: Final[Columns[QueuedScan]] = {
    "scan": lambda scan: scan.name,
    "title": lambda scan: scan.title,
    "patient": lambda scan: scan.patient,
    "state": lambda scan: scan.state,
    "reason": lambda scan: scan.reason,
    "estimated Dice": lambda scan: scan.dice,
    "low": _end("low"),
    "high": _end("high"),
    "level": _end("level"),
    "remark": lambda scan: UNLIKE if scan.interval is not None and not scan.interval.applies else None,
    "error volume in ml": lambda scan: scan.error_volume_ml,
    "since": lambda scan: scan.since.isoformat(timespec="seconds"),
    "handed out to": lambda scan: "; ".join(lease.actor.name for lease in scan.leases) or None,
    "until": lambda scan: "; ".join(lease.expires_at.isoformat(timespec="seconds") for lease in scan.leases) or None,
}


@router.post("/next")
def take_next(page: AskedPage) -> Response:
    """Hand out the next scan, and open it in the viewer."""
    try:
        answer = next_scan(DEFAULT_STRATEGY, page.user, SampleParams())
    except SegqcError as error:
        return page.go("/", str(error), problem=True)
    if not answer:
        return page.go("/", nothing_left(page.app.context.dataset))
    return page.go(viewer_address(current_app().context.archive.named(str(answer["id"]))))


@router.post("/scans")
def review_many(
    page: AskedPage,
    decision: Annotated[Decision, Form()],
    scan: Annotated[list[str], Form(max_length=_MAX_BULK, default_factory=list)],
    reason: Annotated[str, Form(max_length=500)] = "",
    seen: Seen = None,
    back: Annotated[str, Form(max_length=1000)] = "/",
) -> Response:
    """Decide of many scans at once; of those that it cannot be said of, it is said why."""
    target = back if back == "/" or back.startswith("/?") else "/"
    if not scan:
        return page.go(target, "No scan was chosen.", problem=True)
    done, refused = _review_all(page, decision, scan, reason, seen)
    word = {"approve": "approved", "reject": "rejected", "exclude": "excluded", "reopen": "reopened"}[decision]
    notice = f"{done} {'scan' if done == 1 else 'scans'} {word}."
    if refused:
        notice = f"{notice} {len(refused)} could not be {word}: {refused[0]}"
    return page.go(target, notice, problem=bool(refused))


def _review_all(
    page: Page, decision: Decision, names: Sequence[str], reason: str, seen: int | None
) -> tuple[int, list[str]]:
    dataset, actor = page.app.context.dataset, page.actor
    refused = []
    for name in dict.fromkeys(names):
        try:
            review(dataset, name, STATE_OF[decision], actor, reason.strip() or None, seen=seen)
        except SegqcError as error:
            refused.append(str(error))
    return len(dict.fromkeys(names)) - len(refused), refused
