"""Proposals as files: what SegQC-Net would change of a label, for clients of MONAI Label and for programs."""

from __future__ import annotations

import asyncio
import functools
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response

from segqc.loop.proposals import Proposal, proposal_of
from segqc.loop.submission import current_start
from segqc.server.errors import RequestError
from segqc.server.monailabel.facade import current_app
from segqc.server.parameters import MAX_INTEGER
from segqc.server.routers.dependencies import AskingUser, known_image, open_store, send_label, version_of
from segqc.store.records import Actor, LabelRecord

router = APIRouter()


@router.get("/segqc/labels/{scan}/proposal", tags=["SegQC"], summary="Download a proposal")
async def download_proposal(
    request: Request,
    scan: str,
    version: Annotated[int, Query(ge=0, le=MAX_INTEGER, description="The label version that it is made of.")],
    user: AskingUser,
) -> Response:
    """Send a label version as SegQC-Net would correct it, with the values that clients count by; made now if need be.

    409 tells why there is none: another label counts by now, or no network judges such a label.
    """
    label = await anyio.to_thread.run_sync(functools.partial(version_of, scan, version))
    proposal = await proposal_for(request, label)
    return await anyio.to_thread.run_sync(send_label, proposal.label, user.known_actor())


async def proposal_for(request: Request, label: LabelRecord) -> Proposal:
    """The proposal of a label version by the bundle that serves; annotators do not wait for its making."""

    def work() -> Proposal:
        context = current_app().context
        return proposal_of(context.dataset, label, context.bundle("segqc"))

    return await asyncio.get_running_loop().run_in_executor(request.app.state.inference, work)


async def propose_for(request: Request, scan: str, actor: Actor) -> None:
    """Have the proposal of what somebody goes on from made, where it is not yet.

    Raises:
        RequestError: 404 if the scan has no label.
    """

    def find() -> LabelRecord:
        name = known_image(scan)
        with open_store().read() as transaction:
            start = current_start(transaction, name, actor)
        if start is None:
            raise RequestError(404, f"the scan {scan!r} has no label that something could be proposed for.")
        return start

    await proposal_for(request, await anyio.to_thread.run_sync(find))
