"""Which role each route needs: the one table.

A route that is not in it is not answered where users sign in; a test compares it with the application's routes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from starlette.routing import compile_path

from segqc.store.records import Role

Needed: TypeAlias = Role | Literal["nobody signed in"]

PUBLIC: Final = "nobody signed in"

# GET stands for HEAD, too. The first row that fits counts.
ROLES_OF_ROUTES: Final[Mapping[str, Needed]] = {
    # signing in
    "GET /auth/": PUBLIC,
    "POST /auth/token": PUBLIC,
    "GET /auth/token/valid": "annotator",
    "DELETE /auth/token": "annotator",
    "GET /auth/sign-in": PUBLIC,
    "POST /auth/sign-in": PUBLIC,
    "POST /auth/sign-out": PUBLIC,
    "GET /auth/tokens": "annotator",
    "POST /auth/tokens": "annotator",
    "GET /auth/oidc": PUBLIC,
    "GET /auth/oidc/callback": PUBLIC,
    # the server, and its description
    "GET /docs": "annotator",
    "GET /openapi.json": "annotator",
    "GET /info/": "annotator",
    "GET /logs/": "operator",
    # the page
    "GET /": "annotator",
    "GET /queue.csv": "annotator",
    "POST /next": "annotator",
    "POST /scans": "reviewer",
    "GET /scans/{scan}": "annotator",
    "GET /scans/{scan}/slices/{index}": "annotator",
    "GET /scans/{scan}/worst": "annotator",
    "GET /scans/{scan}/heat": "annotator",
    "GET /scans/{scan}/check": "annotator",
    "GET /scans/{scan}/slices.csv": "annotator",
    "GET /scans/{scan}/versions.csv": "annotator",
    "GET /scans/{scan}/difference.csv": "annotator",
    "GET /scans/{scan}/versions/{version}/{name}": "annotator",
    "POST /scans/{scan}/review": "reviewer",
    "POST /scans/{scan}/restore": "reviewer",
    "POST /scans/{scan}/label": "annotator",
    "GET /loop": "annotator",
    "GET /loop/now": "annotator",
    "GET /loop/rounds.csv": "annotator",
    "GET /loop/estimates.csv": "annotator",
    "GET /loop/bundles.csv": "annotator",
    "GET /loop/annotators.csv": "annotator",
    "GET /loop/corrections.csv": "annotator",
    "GET /loop/costs.csv": "annotator",
    "POST /loop/round": "operator",
    "POST /loop/jobs/{public_id}/stop": "operator",
    "GET /audit": "reviewer",
    "GET /audit.csv": "reviewer",
    "GET /audit/now": "reviewer",
    "POST /audit": "operator",
    "GET /audit/{scan}/picture": "reviewer",
    "POST /audit/{scan}": "reviewer",
    "GET /pages/status": "annotator",
    "GET /pages/assets/{tag}/{name}": PUBLIC,
    # annotation
    "POST /activelearning/{strategy}": "annotator",
    "POST /infer/{model}": "annotator",
    "POST /infer/wsi/{model}": "annotator",
    "POST /infer/wsi_v2/{model}": "annotator",
    "PUT /session/": "annotator",
    "GET /session/{session_id}": "annotator",
    "DELETE /session/{session_id}": "annotator",
    "GET /segqc/leases": "annotator",
    "POST /segqc/leases/{scan}/skip": "annotator",
    "POST /segqc/leases/{scan}/resume": "annotator",
    # scans and labels
    "GET /datastore/": "annotator",
    "PUT /datastore/": "annotator",
    "DELETE /datastore/": "operator",
    "GET /datastore/image": "annotator",
    "PUT /datastore/image": "annotator",
    "DELETE /datastore/image": "operator",
    "GET /datastore/image/info": "annotator",
    "PUT /datastore/image/info": "annotator",
    "GET /datastore/label": "annotator",
    "PUT /datastore/label": "annotator",
    "DELETE /datastore/label": "operator",
    "GET /datastore/label/info": "annotator",
    "PUT /datastore/label/info": "annotator",
    "PUT /datastore/updatelabelinfo": "annotator",
    "GET /datastore/dataset": "annotator",
    # reviews
    "GET /segqc/labels/{scan}": "annotator",
    "GET /segqc/labels/{scan}/check": "annotator",
    "GET /segqc/labels/{scan}/proposal": "annotator",
    "POST /segqc/labels/{scan}/restore": "reviewer",
    "POST /segqc/review/{scan}": "reviewer",
    "GET /segqc/events/{scan}": "annotator",
    "GET /segqc/audit": "reviewer",
    "POST /segqc/audit": "operator",
    "GET /segqc/audit/job": "reviewer",
    "POST /segqc/audit/{scan}": "reviewer",
    # networks and long work
    "GET /train/": "annotator",
    "POST /train/": "operator",
    "POST /train/{model}": "operator",
    "DELETE /train/": "operator",
    "GET /scoring/": "annotator",
    "POST /scoring/": "annotator",
    "POST /scoring/{method}": "annotator",
    "DELETE /scoring/": "annotator",
    "GET /batch/infer": "annotator",
    "POST /batch/infer/{model}": "operator",
    "DELETE /batch/infer": "operator",
    "GET /segqc/round": "annotator",
    "POST /segqc/round": "operator",
    "GET /model/{model}": "operator",
    "PUT /model/{model}": "operator",
    "DELETE /model/{model}": "operator",
    "GET /model/info/{model}": "operator",
    # scans as DICOM images, and viewers
    "GET /dicomweb/studies": "annotator",
    "GET /dicomweb/series": "annotator",
    "GET /dicomweb/instances": "annotator",
    "GET /dicomweb/studies/{study}": "annotator",
    "GET /dicomweb/studies/{study}/metadata": "annotator",
    "GET /dicomweb/studies/{study}/rendered": "annotator",
    "GET /dicomweb/studies/{study}/thumbnail": "annotator",
    "GET /dicomweb/studies/{study}/instances": "annotator",
    "GET /dicomweb/studies/{study}/series": "annotator",
    "GET /dicomweb/studies/{study}/series/{series}": "annotator",
    "GET /dicomweb/studies/{study}/series/{series}/metadata": "annotator",
    "GET /dicomweb/studies/{study}/series/{series}/rendered": "annotator",
    "GET /dicomweb/studies/{study}/series/{series}/thumbnail": "annotator",
    "GET /dicomweb/studies/{study}/series/{series}/instances": "annotator",
    "GET /dicomweb/studies/{study}/series/{series}/instances/{instance}": "annotator",
    "GET /dicomweb/studies/{study}/series/{series}/instances/{instance}/metadata": "annotator",
    "GET /dicomweb/studies/{study}/series/{series}/instances/{instance}/rendered": "annotator",
    "GET /dicomweb/studies/{study}/series/{series}/instances/{instance}/thumbnail": "annotator",
    "GET /dicomweb/studies/{study}/series/{series}/instances/{instance}/frames/{frames}": "annotator",
    "GET /dicomweb/studies/{study}/series/{series}/instances/{instance}/frames/{frames}/rendered": "annotator",
    "GET /dicomweb/studies/{study}/series/{series}/instances/{instance}/frames/{frames}/thumbnail": "annotator",
    "GET /dicomweb/studies/{study}/series/{series}/{picture}": "annotator",
    "GET /dicomweb/studies/{study}/series/{series}/instances/{instance}/{picture}": "annotator",
    "GET /dicomweb/studies/{study}/series/{series}/instances/{instance}/frames/{frames}/{picture}": "annotator",
    "GET /dicomweb/studies/{study}/series/{series}/instances/{instance}/bulk/{bulk:path}": "annotator",
    "GET /segqc/dicomweb/{scan}": "annotator",
    "GET /segqc/pacs": "annotator",
    "POST /segqc/pacs/sync": "operator",
    "GET /ohif/extension/{path:path}": PUBLIC,  # our code: a hospital's own OHIF imports it without a cookie
    "GET /ohif/{path:path}": "annotator",
    "POST /segqc/viewer/next": "annotator",
    "GET /segqc/viewer/scans/{study}": "annotator",
    "GET /segqc/viewer/scans/{study}/labels/{version}": "annotator",
    "GET /segqc/viewer/scans/{study}/errors/{version}": "annotator",
    "GET /segqc/viewer/scans/{study}/proposals/{version}": "annotator",
    "POST /segqc/viewer/scans/{study}/check": "annotator",
    "POST /segqc/viewer/scans/{study}/label": "annotator",
    # refused to everybody, with a sentence
    "GET /proxy/{path:path}": "annotator",
    "POST /proxy/{path:path}": "annotator",
    "PUT /proxy/{path:path}": "annotator",
    "DELETE /proxy/{path:path}": "annotator",
}

_ROWS: Final = tuple(
    (method, compile_path(path)[0], needed)
    for row, needed in ROLES_OF_ROUTES.items()
    for method, _, path in (row.partition(" "),)
)


def needed_for(method: str, path: str) -> Needed | None:
    """What a request needs; None where no route of the table answers it.

    Args:
        method: its method.
        path: its address, decoded; a slash too many or too few at its end does not matter.
    """
    method = "GET" if method == "HEAD" else method
    return _row(method, path) or _row(method, path.removesuffix("/") if path.endswith("/") else f"{path}/")


def _row(method: str, path: str) -> Needed | None:
    return next((needed for of, address, needed in _ROWS if of == method and address.match(path)), None)
