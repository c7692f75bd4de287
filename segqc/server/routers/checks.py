"""The check of what a person has submitted."""

from __future__ import annotations

import functools
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request

from segqc.server.checks import CheckStatus
from segqc.server.monailabel.facade import current_app
from segqc.server.monailabel.strategy import describe
from segqc.server.parameters import MAX_INTEGER
from segqc.server.routers.dependencies import open_store, version_of
from segqc.store import labels
from segqc.store.records import JsonObject, LabelRecord

router = APIRouter()


@router.get("/segqc/labels/{scan}/check", tags=["SegQC"], summary="Check a label that a person made")
async def label_check(
    request: Request,
    scan: str,
    version: Annotated[int, Query(ge=0, le=MAX_INTEGER, description="The version's number.")],
) -> JsonObject:
    """Tell where SegQC-Net would look again; made now by the bundle that serves, if it has not said so yet.

    ``state`` is "done", "running" (ask again) or "none"; ``sentence`` says what was found, or why nothing is known.
    """
    label = await anyio.to_thread.run_sync(functools.partial(version_of, scan, version))
    return check_to_json(await _ask(request, label))


async def check_of(request: Request, version: int, *, wait: bool = True) -> CheckStatus:
    """How it is with the check of a label version that was just submitted; a submission never fails because of it."""

    def find() -> LabelRecord:
        with open_store().read() as transaction:
            return labels.get(transaction, version)

    return await _ask(request, await anyio.to_thread.run_sync(find), wait=wait)


async def _ask(request: Request, label: LabelRecord, *, wait: bool = True) -> CheckStatus:
    return await current_app().context.checks.ask(label, request.app.state.inference, wait=wait)


def check_to_json(status: CheckStatus) -> JsonObject:
    """A check as clients get it: the sentence first, as 3D Slicer shows the beginning of an answer."""
    body: dict[str, Any] = {"sentence": status.sentence, "state": status.state}
    if status.check is None:
        return body
    assessment = status.check.assessment
    boxed = {box.slice_index for quality in assessment.structures for box in quality.raw.boxes}
    errors = [
        {"structure": error.structure, "kind": error.kind, "slices": list(error.slices)}
        for error in status.check.errors
    ]
    numbers = {"version": status.check.label.id, "bundle": status.check.bundle}
    return {**body, "errors": errors, **numbers, **describe(assessment, boxed)}
