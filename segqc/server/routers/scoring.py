"""Scorings of the scans that wait."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from segqc.loop.requests import ScoringRequest
from segqc.selection import scores
from segqc.server import job_answers
from segqc.server.errors import RequestError
from segqc.server.monailabel.facade import current_app
from segqc.server.names import known
from segqc.server.parameters import AllJobs, Enqueue, OnlyOpen, RunSync, ScoringBody, ScoringParams
from segqc.server.routers.dependencies import AskingUser, open_store
from segqc.server.waiting import all_described, described
from segqc.store.records import JsonObject

router = APIRouter()


@router.get("/scoring/", tags=["Scoring"], summary="Status of the last scoring")
def scoring_status(all: AllJobs = False, check_if_running: OnlyOpen = False) -> Any:
    """Tell how the scorings are."""
    return job_answers.status(open_store(), "scoring", every=all, only_running=check_if_running)


@router.post("/scoring/", tags=["Scoring"], summary="Score by all methods")
def scoring_all(user: AskingUser, params: ScoringBody, run_sync: RunSync = False) -> Any:
    """Queue all scoring methods; by an ensemble only where there is one."""
    methods = [method for method in current_app().scoring_methods if _has_folds() or not _by_ensemble(method)]
    requests = {method: _scoring(method, params) for method in methods}
    store, actor = open_store(), user.actor(params.client_id)
    put = {method: job_answers.submit(store, actor, request) for method, request in requests.items()}
    return all_described(store, put, "scoring", wait=run_sync)


@router.post("/scoring/{method}", tags=["Scoring"], summary="Score by a method")
def scoring_start(
    user: AskingUser, method: str, params: ScoringBody, run_sync: RunSync = False, enqueue: Enqueue = False
) -> Any:
    """Queue a scoring method."""
    store, request = open_store(), _scoring(method, params)
    job = job_answers.submit(store, user.actor(params.client_id), request, wait=enqueue)
    return described(store, job, "scoring", wait=run_sync)


def _scoring(method: str, params: ScoringParams) -> ScoringRequest:
    app = current_app()
    known("scoring method", method, app.scoring_methods)
    app.context.segmenter()
    if method == "segqc":
        app.context.assessor()
    if _by_ensemble(method) and not _has_folds():
        raise RequestError(
            409,
            "the bundle that serves holds no networks of the folds, as its SegQC network came without: train it again "
            "(POST /train/segqc, or 'segqc train segqc').",
        )
    return ScoringRequest(method=method, force=params.force)


def _by_ensemble(method: str) -> bool:
    return scores()[method].of_ensemble is not None


def _has_folds() -> bool:
    bundle = current_app().context.dataset.bundle()
    return bundle is not None and bundle.folds_version() is not None


@router.delete("/scoring/", tags=["Scoring"], summary="Stop the running scoring")
def scoring_stop(user: AskingUser) -> JsonObject | None:
    """Stop the scoring that runs; started again it goes on with the scans that are left."""
    return job_answers.stop(open_store(), user.actor(), "scoring")
