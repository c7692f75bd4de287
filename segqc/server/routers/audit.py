"""The label audit: final labels in the order of their estimates, marks, and the job that judges them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from segqc.loop.audit import missing_network
from segqc.loop.requests import AuditRequest
from segqc.server import job_answers
from segqc.server.errors import RequestError
from segqc.server.monailabel.facade import current_app
from segqc.server.parameters import MAX_COUNT, AllJobs, AuditBody, AuditParams, MarkBody, OnlyOpen
from segqc.server.routers.dependencies import AskingUser, open_store
from segqc.store import bundles, label_verdicts, scans
from segqc.store.label_verdicts import AuditedLabel, AuditView
from segqc.store.records import JsonObject
from segqc.types import StructureQuality, bounds

router = APIRouter()


@router.get("/segqc/audit", tags=["SegQC"], summary="The final labels, the worst first")
def audited_labels(
    view: Annotated[AuditView, Query(description="Which labels; open: judged, and not marked right.")] = "open",
    start: Annotated[int, Query(ge=0, le=MAX_COUNT, description="How many are left out at the beginning.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="How many are told at most.")] = 100,
) -> JsonObject:
    """Tell what networks that have not seen the patient say of each final label; slices are numbered from 0."""
    with open_store().read() as transaction:
        found = label_verdicts.listing(transaction, view, start=start, limit=limit)
        counts = label_verdicts.counts(transaction)
        bundle = bundles.serving_number(transaction)
    return {
        "bundle": bundle,
        "total": counts[view],
        "not_judged": counts["not judged"],
        "labels": [_to_json(label) for label in found],
    }


@router.post("/segqc/audit", tags=["SegQC"], summary="Judge all final labels")
def start_audit(user: AskingUser, params: AuditBody) -> JsonObject:
    """Queue the judgement of all final labels; one that the serving bundle has judged is left out."""
    return put_audit(user, params)


def put_audit(user: AskingUser, params: AuditParams) -> JsonObject:
    """Put the job that judges all final labels, or join the one that is open.

    Raises:
        RequestError: 409 where no network for people's masks serves.
    """
    problem = missing_network(current_app().context.dataset.bundle())
    if problem is not None:
        raise RequestError(409, problem)
    return job_answers.submit(open_store(), user.actor(params.client_id), AuditRequest(force=params.force))


@router.get("/segqc/audit/job", tags=["SegQC"], summary="Status of the last audit")
def audit_status(all: AllJobs = False, check_if_running: OnlyOpen = False) -> Any:
    """Tell how far the judgement of the labels is."""
    return job_answers.status(open_store(), "audit", every=all, only_running=check_if_running)


@router.post("/segqc/audit/{scan}", tags=["SegQC"], summary="Mark a label as right")
def mark_label(scan: str, user: AskingUser, params: MarkBody) -> JsonObject:
    """Note that a version of a final label is right, or take it back: ``{"version": 12, "right": true}``."""
    with open_store().write() as transaction:
        name = scans.get(transaction, scan).name
        change = label_verdicts.mark_right if params.right else label_verdicts.remove_mark
        return _to_json(change(transaction, name, user.actor(params.client_id), version=params.version))


def _to_json(found: AuditedLabel) -> JsonObject:
    verdict, mark = found.verdict, found.mark
    return {
        "scan": found.scan,
        "title": found.title,
        "patient": found.patient,
        "state": found.state,
        "version": found.label.id,
        "made_by": found.label.actor.name,
        "made_at": found.label.made_at.isoformat(),
        "estimated_dice": verdict.assessment.dice if verdict is not None else None,
        "error_volume_ml": verdict.assessment.error_volume_ml if verdict is not None else None,
        "networks": verdict.networks if verdict is not None else None,
        "structures": [_structure(q) for q in verdict.assessment.structures] if verdict is not None else [],
        "slices": list(found.slices),
        "errors": [{"structure": e.structure, "kind": e.kind, "slices": list(e.slices)} for e in found.errors],
        "message": found.message,
        "right": None if mark is None else {"by": mark.actor.name, "at": mark.made_at.isoformat()},
    }


def _structure(quality: StructureQuality) -> JsonObject:
    ends = bounds(quality.intervals.dice)
    return {
        "name": quality.name,
        "present": quality.present,
        "estimated_dice": quality.estimated.dice,
        "interval": None if ends is None else {**ends},
    }
