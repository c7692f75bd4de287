"""A browser, for tests of pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.browser_kit import running_browser, watched

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page


# for a module: while it runs, no test of the same process can have an event loop of its own
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as started:
        yield started


@pytest.fixture
def user(browser: Browser) -> Iterator[BrowserContext]:
    """A user's browser: other hosts, violated policies and errors in pages fail the test."""
    with watched(browser) as (context, _):
        yield context


@pytest.fixture
def page(user: BrowserContext) -> Page:
    return user.new_page()
