"""OHIF in a browser on the scans of a folder: MONAI Label's own, the newer one, and one of another host."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

import requests

from segqc.server import app as server_app
from segqc.server.monailabel.stock import STATIC
from segqc.server.ohif.viewer import bundled_viewer, installed_viewer
from tests.browser_kit import keep_picture, lack, open_scan, wait_for_slice, watched
from tests.server_kit import CONFIG, listening, make_dataset

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.server

FONTS = "fonts.googleapis.com", "fonts.gstatic.com"
DOCS = Path(__file__).parents[2] / "docs" / "ohif.md"
OWN_CONFIG = "routerBasename: '/ohif/', showStudyList: true, defaultDataSourceName: 'segqc',"


def hospitals_config(server: str) -> str:
    """The configuration of the docs, for a server, in that of an OHIF that has nothing else."""
    block = re.search(r"```js\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert block is not None
    return block[1].replace("// ... what is there", OWN_CONFIG).replace("https://segqc.example.org", server)


def study_of(server: str, scan: str) -> str:
    answer = requests.get(f"{server}/segqc/dicomweb/{scan}", timeout=30)
    study: str = answer.json()["study"]
    return study


@pytest.fixture(params=["bundled", "installed"])
def server(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    find = {"bundled": bundled_viewer, "installed": installed_viewer}[request.param]
    if find() is None:
        lack("no newer OHIF is installed (make ohif)")
    monkeypatch.setattr(server_app, "find_viewer", find)
    with listening(make_dataset(tmp_path / "studies", scans=2, finals=0)) as address:
        yield address


def test_a_scan_opens_with_our_panel_and_nothing_is_asked_of_other_hosts(
    server: str, page: Page, tmp_path: Path
) -> None:
    open_scan(page, f"{server}/ohif/", study_of(server, "scan_1"))
    page.locator("segqc-panel").get_by_text("liver").wait_for()
    assert page.get_by_text("scan_1").first.is_visible()
    keep_picture(page, tmp_path, "scan")


def test_the_list_of_scans_opens_them_with_our_panel_only(server: str, page: Page, tmp_path: Path) -> None:
    page.goto(f"{server}/ohif/")
    page.get_by_text("scan_1").first.click()
    page.get_by_text("SegQC", exact=True).first.wait_for()
    for other in ("Basic Viewer", "Segmentation", "MONAI Label", "Microscopy"):
        assert page.get_by_text(other, exact=True).count() == 0
    keep_picture(page, tmp_path, "list")
    page.get_by_text("SegQC", exact=True).first.click()
    wait_for_slice(page)
    page.locator("segqc-panel").get_by_text("liver").wait_for()
    assert f"/ohif/segqc?StudyInstanceUIDs={study_of(server, 'scan_1')}" in page.url.replace("/dicomweb?", "?")


def test_the_tools_that_ask_other_hosts_are_not_there(server: str, page: Page) -> None:
    open_scan(page, f"{server}/ohif/", study_of(server, "scan_0"))
    page.locator('[data-cy^="panelSegmentationWithTools"]').first.click()
    page.locator('[data-cy="Brush"]').first.wait_for()
    for tool in ("LabelmapSlicePropagation", "MarkerLabelmap", "InterpolateLabelmap"):
        assert page.locator(f'[data-cy="{tool}"]').count() == 0


# ----------------------------------------------------------------------------------------------------- a hospital's own


class Hospital(SimpleHTTPRequestHandler):
    """A plain web server of OHIF's files, with a configuration of its own."""

    config = ""

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/ohif/")
        if name == "app-config.js":
            content = self.config.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/javascript")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        self.path = f"/{name}" if (Path(self.directory) / name).is_file() else "/index.html"
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hospital() -> Iterator[tuple[str, type[Hospital]]]:
    """The origin of an OHIF that nobody has changed but for its configuration."""
    kind = type("OneHospital", (Hospital,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(kind, directory=str(STATIC / "ohif"))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://localhost:{server.server_address[1]}", kind
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("named", [True, False])
def test_another_hosts_ohif_works_where_its_origin_is_named_and_only_there(
    named: bool, hospital: tuple[str, type[Hospital]], browser: Browser, tmp_path: Path
) -> None:
    origin, kind = hospital
    allowed = f'\n[server]\nallowed_origins = ["{origin if named else "https://ohif.example.org"}"]\n'
    folder = make_dataset(tmp_path / "studies", scans=1, finals=0, config=CONFIG + allowed)
    with listening(folder) as server, watched(browser, cut_off=FONTS) as (context, log):
        kind.config = hospitals_config(server)
        page = context.new_page()
        if named:
            open_scan(page, f"{origin}/ohif/segqc/", study_of(server, "scan_0"))  # mode and data source, as in the docs
            page.locator("segqc-panel").get_by_text("liver").wait_for()  # from the server's own routes
            keep_picture(page, tmp_path, "hospital")
            return
        with page.expect_event("requestfailed", lambda request: request.url.startswith(server)):
            page.goto(f"{origin}/ohif/segqc?StudyInstanceUIDs={study_of(server, 'scan_0')}")
        page.wait_for_timeout(500)
        assert any("has been blocked by CORS policy" in error for error in log.errors)
        assert page.locator("segqc-panel").count() == 0
        log.problems.clear()  # OHIF does not catch that its extension could not be loaded
