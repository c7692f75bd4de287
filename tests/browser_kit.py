"""A browser for tests: what it asks of other hosts, and what goes wrong in a page, fails the test."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, Response, WebError

CHROMIUM: Final = "chromium"
# read at once: tests run without the settings in the environment
IS_REQUIRED: Final = os.environ.get("SEGQC_TEST_BROWSER") == "required"
SIZE: Final = {"width": 1440, "height": 900}
SECONDS: Final = 90.0  # software draws, and other tests may run beside
SERIOUS: Final = ("serious", "critical")
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_ARGUMENTS: Final = (
    "--no-sandbox",
    "--disable-gpu",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--no-first-run",
)
_BRIGHTEST: Final = """canvas => {
    const copy = document.createElement('canvas');
    [copy.width, copy.height] = [canvas.width, canvas.height];
    const context = copy.getContext('2d');
    context.drawImage(canvas, 0, 0);
    const { data } = context.getImageData(0, 0, copy.width, copy.height);
    return data.reduce((most, value, index) => (index % 4 === 3 ? most : Math.max(most, value)), 0);
}"""


@contextlib.contextmanager
def running_browser() -> Iterator[Browser]:
    """Debian's Chromium; a test skips where there is none, unless SEGQC_TEST_BROWSER says that it is required."""
    try:
        from playwright.sync_api import expect, sync_playwright
    except ImportError:
        lack("playwright is not installed")
    path = shutil.which(CHROMIUM)
    if path is None:
        lack(f"no {CHROMIUM} to test with")
    expect.set_options(timeout=SECONDS * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=_ARGUMENTS)
        yield browser
        browser.close()


def lack(what: str) -> NoReturn:
    """Skip for the lack of something, or fail where it is required."""
    if IS_REQUIRED:
        pytest.fail(what)
    pytest.skip(what)


@dataclass  # without slots: Playwright notes at an object that its methods listen
class Log:
    """What happened in a browser's pages.

    Attributes:
        requests: addresses asked for, but those of the pages' own making.
        outside: those of them that are no loopback ones.
        problems: violations of a page's policy, errors that nothing caught, answers with status 5xx.
        errors: what pages wrote to the console as an error.
    """

    requests: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def watch(self, context: BrowserContext) -> None:
        """Note what happens in a context's pages from now on."""
        context.on("request", self._request)
        context.on("response", self._response)
        context.on("console", self._console)
        context.on("weberror", self._error)

    def check(self) -> None:
        """Fail where something was asked of another host, or went wrong."""
        assert not self.outside, f"asked of other hosts: {self.outside}"
        assert not self.problems, self.problems

    def _request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("blob", "data"):
            return
        self.requests.append(request.url)
        if parts.hostname not in _LOOPBACK:
            self.outside.append(request.url)

    def _response(self, response: Response) -> None:
        if response.status >= 500:
            self.problems.append(f"{response.status} for {response.request.method} {response.url}")

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)
            if "Content Security Policy" in message.text:
                self.problems.append(message.text)

    def _error(self, error: WebError) -> None:
        self.problems.append(str(error.error))


@contextlib.contextmanager
def watched(browser: Browser, *, cut_off: Collection[str] = ()) -> Iterator[tuple[BrowserContext, Log]]:
    """A browser of a new user, whose pages fail the test by what they ask of other hosts, and by errors.

    Args:
        browser: the browser.
        cut_off: hosts that do not answer, and may be asked all the same.
    """
    context = browser.new_context(viewport=SIZE, reduced_motion="reduce")
    context.set_default_timeout(SECONDS * 1000)
    for host in cut_off:
        context.route(f"**://{host}/**", lambda route: route.abort())
    log = Log()
    log.watch(context)
    try:
        yield context, log
        log.outside = [address for address in log.outside if urlsplit(address).hostname not in cut_off]
        log.check()
    finally:
        context.close()


def open_scan(page: Page, viewer: str, study: str, series: str | None = None) -> None:
    """Open a scan in OHIF's SegQC mode, and wait for its first slice.

    Args:
        page: the page.
        viewer: the address of OHIF, with a slash at its end.
        study: the scan's StudyInstanceUID.
        series: its SeriesInstanceUID, which may be left out where its study has no other.
    """
    page.goto(f"{viewer}segqc?StudyInstanceUIDs={study}" + (f"&SeriesInstanceUIDs={series}" if series else ""))
    wait_for_slice(page)


def wait_for_slice(page: Page) -> None:
    """Wait until OHIF has drawn a slice."""
    canvas = page.locator("canvas.cornerstone-canvas").first
    canvas.wait_for()
    page.wait_for_function(
        f"brightest => (({_BRIGHTEST})(document.querySelector('canvas.cornerstone-canvas'))) > brightest", arg=30
    )


def accessible(page: Page) -> None:
    """Fail where axe-core finds something serious."""
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError:
        lack("axe-playwright-python is not installed")
    found = Axe().run(page).response["violations"]
    serious = [(v["id"], [n["target"] for n in v["nodes"]][:3]) for v in found if v["impact"] in SERIOUS]
    assert not serious, f"{page.url}: {serious}"


def keep_picture(page: Page, folder: Path, name: str) -> None:
    """Keep what a page looks like, for people."""
    page.screenshot(path=folder / f"{name}.png")
