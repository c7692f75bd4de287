"""The routers of all pages."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter

from segqc.server.pages import api, assets, audit, loop, queue, scan

PAGES: Final[tuple[APIRouter, ...]] = (queue.router, scan.router, audit.router, loop.router, api.router, assets.router)
