"""The history of a scan, and what reviewers decide of it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import TypeAdapter

from segqc.loop.review import STATE_OF, review
from segqc.server.errors import RequestError
from segqc.server.monailabel.facade import current_app
from segqc.server.parameters import MAX_INTEGER, ReviewBody
from segqc.server.routers.dependencies import AskingUser, open_store
from segqc.store import events, labels, scans
from segqc.store.records import EventRecord, JsonObject, LabelRecord

router = APIRouter()


@router.get("/segqc/labels/{scan}", tags=["SegQC"], summary="All versions of a scan's labels")
def label_history(scan: str) -> list[JsonObject]:
    """Tell who made which version of a scan's labels, from which, and when; oldest first."""
    with open_store().read() as transaction:
        return [_to_json(version) for version in labels.history(transaction, scans.get(transaction, scan).name)]


@router.post("/segqc/labels/{scan}/restore", tags=["SegQC"], summary="Restore a version")
def restore_label(
    scan: str,
    version: Annotated[int, Query(ge=0, le=MAX_INTEGER, description="The version's number.")],
    user: AskingUser,
) -> JsonObject:
    """Make an earlier version the current label of its tag again; it becomes a version of its own."""
    store = open_store()
    with store.read() as transaction:
        if version not in [v.id for v in labels.history(transaction, scans.get(transaction, scan).name)]:
            raise RequestError(404, f"the scan {scan!r} has no label version {version}.")
    return _to_json(store.restore_label(version, user.actor()))


@router.post("/segqc/review/{scan}", tags=["SegQC"], summary="Review a scan")
def review_scan(scan: str, user: AskingUser, params: ReviewBody) -> JsonObject:
    """Approve, reject, exclude or reopen a scan: ``{"decision": "reject", "reason": "...", "seen": 12}``."""
    dataset = current_app().context.dataset
    store = dataset.store
    with store.read() as transaction:
        scan = scans.get(transaction, scan).name
    review(dataset, scan, STATE_OF[params.decision], user.actor(params.client_id), params.reason, seen=params.seen)
    with store.read() as transaction:
        now = scans.get(transaction, scan)
    return {"scan": now.name, "state": now.state, "reason": now.reason}


@router.get("/segqc/events/{scan}", tags=["SegQC"], summary="All that happened to a scan")
def scan_events(scan: str) -> list[JsonObject]:
    """Tell who did what to a scan, and how that is known; oldest first."""
    with open_store().read() as transaction:
        return [_to_json(event) for event in events.history(transaction, "scan", scans.get(transaction, scan).id)]


def _to_json(record: LabelRecord | EventRecord) -> JsonObject:
    """A record of the store as clients see it."""
    body: JsonObject = TypeAdapter(type(record)).dump_python(record, mode="json")
    return body
