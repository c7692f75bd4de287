"""Which scans are handed out to whom."""

from __future__ import annotations

from fastapi import APIRouter

from segqc.server.parameters import SampleBody, SkipBody
from segqc.server.routers.dependencies import AskingUser, open_store
from segqc.server.routers.selection import DEFAULT_STRATEGY, next_scan
from segqc.store import leases, scans
from segqc.store.records import JsonObject

router = APIRouter()


@router.get("/segqc/leases", tags=["SegQC"], summary="Which scans are handed out")
def open_leases() -> list[JsonObject]:
    """Tell which scan is handed out to whom, and until when; annotators do not see how it was drawn.

    ``slices`` are those that the annotator is asked for; null for the whole scan.
    """
    with open_store().read() as transaction:
        found = leases.listing(transaction, state="open")
    return [
        {
            "scan": f.scan,
            "to": f.actor.name,
            "until": f.expires_at.isoformat(),
            "slices": None if f.slices is None else list(f.slices),
        }
        for f in found
    ]


@router.post("/segqc/leases/{scan}/skip", tags=["SegQC"], summary="Put a scan aside, and say why")
def skip_scan(scan: str, user: AskingUser, params: SkipBody) -> JsonObject:
    """Put aside a scan that the annotator has, or say why it was put aside: ``{"reason": "..."}``."""
    with open_store().write() as transaction:
        name = scans.get(transaction, scan).name
        lease = leases.skip(transaction, name, user.actor(params.client_id), params.reason)
    return {"scan": lease.scan, "lease": lease.id, "state": lease.state, "reason": params.reason}


@router.post("/segqc/leases/{scan}/resume", tags=["SegQC"], summary="Have a scan back")
def resume_scan(scan: str, user: AskingUser, params: SampleBody) -> JsonObject:
    """Hand out a scan again that the annotator had and skipped, or whose label was rejected.

    It answers as a request for the next sample does.
    """
    return next_scan(DEFAULT_STRATEGY, user, params.model_copy(update={"resume": scan}))
