"""MONAI Label's own routes, for what this server has no better one."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

import monailabel
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from monailabel.endpoints import datastore, info, model

STATIC: Final = Path(monailabel.__file__).parent / "endpoints" / "static"


def stock_routers() -> list[APIRouter]:
    """MONAI Label's routers that this server keeps; who may use them is decided before (`segqc.server.auth`)."""
    return [info.router, datastore.router, model.router]


def include_stock(app: FastAPI, stock: APIRouter, ours: Collection[tuple[str, str]]) -> None:
    """Add those of MONAI Label's routes that have no better one here, run in the thread pool.

    Args:
        app: the application.
        stock: MONAI Label's router.
        ours: paths and methods of this server's own routes.
    """
    for route in stock.routes:
        if not isinstance(route, APIRoute):
            continue
        methods = sorted(method for method in route.methods or () if (route.path, method) not in ours)
        if methods:
            app.add_api_route(
                route.path,
                in_thread(route.endpoint),
                methods=methods,
                tags=route.tags,
                summary=route.summary,
                include_in_schema=route.include_in_schema,
                operation_id=f"{route.name}_{'_'.join(methods).lower()}",
            )


def in_thread(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function for the thread pool of one of MONAI Label's coroutine endpoints, which block all the same."""
    if not inspect.iscoroutinefunction(endpoint):
        return endpoint

    @functools.wraps(endpoint)
    def run(*args: Any, **kwargs: Any) -> Any:
        return asyncio.run(endpoint(*args, **kwargs))

    run.__signature__ = inspect.signature(endpoint)  # type: ignore[attr-defined]
    del run.__wrapped__  # FastAPI would look through it and see the coroutine
    return run
