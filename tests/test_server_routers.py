from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from fastapi import FastAPI
from fastapi.routing import APIRoute

from segqc.server.monailabel.stock import include_stock, stock_routers
from segqc.server.routers import ROUTERS, dicomweb_routers

OURS = Counter(
    (route.path, method)
    for router in (*ROUTERS, *dicomweb_routers(from_pacs=False))
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in route.methods
)


def test_no_address_is_answered_by_two_routes() -> None:
    assert OURS
    assert [address for address, count in OURS.items() if count > 1] == []


def test_what_routes_take_and_refuse_is_documented() -> None:
    from segqc.server.app import create_app

    app = create_app()
    paths = app.openapi()["paths"]
    assert {path for path, _ in OURS} >= paths.keys() - {"/info/", "/datastore/", "/model/info/{model}"}
    for path, operations in paths.items():
        for method, told in operations.items():
            assert told["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("/Refusal")
            switches = [p for p in told.get("parameters", ()) if p["schema"].get("type") in ("boolean", "integer")]
            assert all(p.get("description") for p in switches), (path, method)
    bodies = {
        path: told["post"]["requestBody"]["content"]
        for path, told in paths.items()
        if "requestBody" in told.get("post", ())
    }
    assert bodies["/segqc/review/{scan}"]["application/json"]["schema"]["$ref"].endswith("/ReviewParams")


def test_a_stock_route_is_kept_only_where_there_is_no_better_one() -> None:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for router in stock_routers():
        include_stock(app, router, OURS)
    kept = {(r.path, method) for r in app.routes if isinstance(r, APIRoute) for method in r.methods}
    assert ("/info/", "GET") in kept
    assert not kept & OURS.keys()
