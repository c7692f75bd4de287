"""The description of the API for people, with its scripts from this server."""

from __future__ import annotations

from fastapi import APIRouter, Response

from segqc.server.pages.page import AskedPage

router = APIRouter(include_in_schema=False)

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""Swagger UI writes styles of its own into the page."""


@router.get("/docs")
def api_page(page: AskedPage) -> Response:
    """Show the routes that programs call."""
    answer = page.render("api.html.jinja", schema=page.request.app.openapi_url)
    answer.headers["Content-Security-Policy"] = _POLICY
    return answer
