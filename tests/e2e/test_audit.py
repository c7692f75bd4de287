"""The audit page in a browser: accessible, worked through by keyboard, and live while labels are judged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from segqc.loop import error_maps
from segqc.loop.dataset import Dataset
from segqc.loop.requests import AuditRequest, enqueue
from segqc.store import jobs, label_verdicts, labels
from segqc.store.label_verdicts import LabelVerdict
from segqc.store.labels import FINAL
from tests.audit_kit import add_fold_models
from tests.browser_kit import keep_picture
from tests.e2e.test_pages import accessible
from tests.server_kit import listening, make_assessment, make_dataset
from tests.store_kit import ANNA

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven final labels of eight scans, of which five are judged and one is marked."""
    path = make_dataset(tmp_path_factory.mktemp("audit") / "data", scans=8, finals=7)
    number = add_fold_models(path, (("scan_1",), ("scan_0",)))
    dataset = Dataset(path)
    for i, dice in enumerate((0.71, 0.42, 0.93, 0.88, 0.55)):
        with dataset.store.write() as transaction:
            label = labels.current(transaction, f"scan_{i}", FINAL)
            assert label is not None
            made = make_assessment(f"scan_{i}", dice, worst=4, half_width=0.06)
            label_verdicts.write(transaction, label.id, number, LabelVerdict(assessment=made, networks=2))
        errors = np.zeros((1, *dataset_shape(dataset, f"scan_{i}")), np.uint8)
        errors[0, 4:10, 3:12, 3:6] = 200
        error_maps.write(dataset, label.id, number, errors, "audit-maps")
    with dataset.store.write() as transaction:
        label_verdicts.mark_right(transaction, "scan_3", ANNA)
    dataset.store.close()
    return path


def dataset_shape(dataset: Dataset, scan: str) -> tuple[int, ...]:
    return dataset.read_scan(dataset.scan(scan)).shape


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with listening(folder) as address:
        yield address


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1366, 768), (820, 1180)])
def test_the_page_is_accessible_and_fits_the_screen(
    browser: Browser, server: str, theme: str, size: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    # axe is put into the page, which its own policy forbids
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=theme, bypass_csp=True, reduced_motion="reduce"
    )
    page = context.new_page()
    for view in ("open", "right", "not judged", "all"):
        page.goto(f"{server}/audit?view={view}")
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out at the side"
        assert not page.locator("img.missing").count(), "all pictures are there"
        accessible(page)
        keep_picture(page, tmp_path_factory.getbasetemp(), f"audit-{theme}-{size[0]}-{view.replace(' ', '-')}")
    context.close()


def test_labels_are_worked_through_by_keyboard(page: Page, server: str) -> None:
    page.goto(f"{server}/audit")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.textContent") == "scan_1"
    page.keyboard.press("r")
    page.get_by_text("The label of scan_1 is marked right").wait_for()
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.textContent") == "scan_0"
    page.keyboard.press("k")
    page.keyboard.press("o")
    page.wait_for_url("**/ohif/segqc?StudyInstanceUIDs=**")
    page.goto(f"{server}/audit?view=right")
    page.get_by_role("button", name="Take back that scan_1 is right").click()
    page.get_by_text("The label of scan_1 is to be looked at again").wait_for()
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV of this list").click()
    assert download.value.suggested_filename == "audit.csv"


def test_the_audit_is_begun_and_seen_while_it_goes_on(page: Page, server: str, folder: Path) -> None:
    page.goto(server)
    page.get_by_role("link", name="Audit").click()
    page.get_by_role("button", name="Judge all labels").click()
    page.get_by_text("The audit is put").wait_for()
    assert page.get_by_text("The labels are being judged").is_visible()
    assert page.get_by_role("button", name="Judge all labels").is_disabled()
    dataset = Dataset(folder, watched=True)
    with dataset.store.write() as transaction:
        for job in jobs.open_jobs(transaction, "audit"):
            jobs.stop(transaction, job.id, ANNA)
    dataset.store.close()
    page.get_by_text("The labels are being judged").wait_for(state="detached")
    assert page.get_by_role("button", name="Judge all labels").is_enabled(), "the page has loaded itself anew"


def test_an_audit_that_was_put_elsewhere_is_shown(page: Page, server: str, folder: Path) -> None:
    dataset = Dataset(folder, watched=True)
    with dataset.store.write() as transaction:
        job = enqueue(transaction, AuditRequest(), ANNA)
    page.goto(f"{server}/loop")
    assert page.get_by_text("The audit of the labels").first.is_visible()
    with dataset.store.write() as transaction:
        jobs.stop(transaction, job.id, ANNA)
    dataset.store.close()
