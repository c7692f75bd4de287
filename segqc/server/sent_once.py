"""A field that is sent twice with different values: whichever counted would be a guess."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import get_origin

from fastapi import Request, params
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from segqc.server.errors import RequestError


async def check_sent_once(request: Request) -> None:
    """Refuse a query or a form that gives a field several values where the route takes one.

    Raises:
        RequestError: 400 if it does; the same value again is no contradiction.
    """
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    parts = list(_parts(route.dependant))
    queries = [field for part in parts for field in part.query_params]
    bodies = [field for part in parts for field in part.body_params]
    single = {field.alias for field in queries if not _is_list(field.field_info.annotation)}
    _check("query", ((name, value) for name, value in request.query_params.multi_items() if name in single))
    if any(isinstance(field.field_info, params.Form) for field in bodies):
        lists = {field.alias for field in bodies if _is_list(field.field_info.annotation)}
        form = await request.form()  # it was received before
        _check("form", ((name, value) for name, value in form.multi_items() if name not in lists))


def _parts(dependant: Dependant) -> Iterator[Dependant]:
    """What a route takes itself, and by what it depends on."""
    yield dependant
    for part in dependant.dependencies:
        yield from _parts(part)


def _is_list(annotation: object) -> bool:
    return get_origin(annotation) is list


def _check(what: str, sent: Iterable[tuple[str, object]]) -> None:
    values: dict[str, object] = {}
    for name, value in sent:
        if values.setdefault(name, value) != value:
            raise RequestError(400, f"the {what} has the field {name[:50]!r} twice, with different values; send one.")
