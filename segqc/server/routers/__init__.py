"""The routes whose MONAI Label originals trust the client too far, answer late or fail with a bare 500.

All are plain functions, which FastAPI runs in its thread pool; inference alone has slots of its own, so that waiting
inferences cannot take all threads.
"""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter

from segqc.server.auth import routes as auth
from segqc.server.dicomweb import pacs_routes
from segqc.server.dicomweb import routes as dicomweb
from segqc.server.ohif import routes as ohif
from segqc.server.routers import (
    audit,
    batch,
    checks,
    datastore,
    inference,
    leases,
    models,
    others,
    proposals,
    review,
    rounds,
    scoring,
    selection,
    sessions,
    training,
    viewer,
)

ROUTERS: Final[tuple[APIRouter, ...]] = (
    inference.router,
    selection.router,
    training.router,
    scoring.router,
    batch.router,
    datastore.router,
    review.router,
    audit.router,
    checks.router,
    proposals.router,
    rounds.router,
    leases.router,
    sessions.router,
    models.router,
    viewer.router,
    dicomweb.scan_router,
    auth.router,
    ohif.router,
    others.router,
)


def dicomweb_routers(*, from_pacs: bool) -> tuple[APIRouter, ...]:
    """The routes of DICOMweb: on the folder's files, or on the series of a PACS."""
    return (pacs_routes.router, pacs_routes.own_router) if from_pacs else (dicomweb.router,)
