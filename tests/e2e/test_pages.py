"""The pages in a browser: each one opened, each button pressed, used by keyboard, and no other host asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from segqc.loop import error_maps
from segqc.loop.dataset import Dataset
from segqc.store import jobs, labels
from segqc.store.records import Actor
from segqc.volumes import Volume, write_labels
from tests.browser_kit import accessible, keep_picture
from tests.server_kit import SHAPE, add_models, assess, draw_case, listening, make_dataset

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.server

SCANS = 8
LONG = "a_scan_with_a_name_that_goes_on_and_on_without_a_blank_anywhere_and_ends_with_the_number_6"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_dataset(tmp_path_factory.mktemp("pages") / "data", scans=SCANS)
    (path / "scan_6.nii.gz").rename(path / f"{LONG}.nii.gz")
    dataset = Dataset(path)
    number = add_models(path)
    for i, dice in enumerate((0.41, 0.66, 0.78, 0.93), 1):
        assess(dataset, f"scan_{i}", dice, mask=draw_case(i)[1], half_width=0.1, number=number, volume_ml=3)
        with dataset.store.read() as transaction:
            start = labels.start_of(transaction, f"scan_{i}")
        assert start is not None
        error_maps.write(dataset, start.id, number, np.full((2, *SHAPE), 90, np.uint8))
    dataset.store.close()
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with listening(folder) as address:
        yield address


@pytest.fixture
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1366, 768), (820, 1180)])
@pytest.mark.parametrize(
    "path",
    ["/", "/?view=all", "/?search=nobody", "/scans/scan_1", "/scans/scan_0", f"/scans/{LONG}", "/loop", "/docs", "/no"],
)
def test_pages_are_accessible_and_fit_the_screen(
    browser: Browser, server: str, path: str, theme: str, size: tuple[int, int], pictures: Path
) -> None:
    # axe is put into the page, which its own policy forbids
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=theme, bypass_csp=True, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(f"{server}{path}")
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out at the side"
    accessible(page)
    keep_picture(page, pictures, f"pages-{theme}-{size[0]}-{re.sub(r'[^a-z0-9]+', '-', path)}")
    context.close()


def test_the_queue_is_worked_through_by_keyboard(page: Page, server: str) -> None:
    page.goto(server)
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.textContent") == "scan_2"
    page.keyboard.press("x")
    assert page.locator("[data-bulk-count]").text_content() == "1 scan chosen"
    page.keyboard.press("/")
    page.keyboard.type("scan_3xj")
    assert page.locator("[data-search]").input_value() == "scan_3xj", "letters in a field are text"
    page.locator("[data-search]").fill("scan_3")
    page.keyboard.press("Enter")
    page.wait_for_url("**search=scan_3**")
    page.locator("[data-row]").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/scans/scan_3")
    page.keyboard.press("?")
    assert page.locator("dialog[open]").is_visible()
    page.keyboard.press("Escape")
    before = page.locator("[data-slice]").get_attribute("src")
    page.keyboard.press("ArrowRight")
    assert "Slice 3 of" in (page.locator("[data-slice-name]").text_content() or "")
    assert page.locator("[data-slice]").get_attribute("src") != before and "slice=3" in page.url
    page.keyboard.press("p")
    assert "Slice 4 of" in (page.locator("[data-slice-name]").text_content() or ""), "the one that is a little worse"
    page.keyboard.press("h")
    page.wait_for_url("**drawn=1**")
    assert "heat=1" not in page.url and "mask=1" in page.url


def test_letters_are_no_shortcuts_for_those_who_switch_them_off(page: Page, server: str) -> None:
    page.goto(server)
    page.get_by_role("button", name="Keyboard shortcuts").click()
    page.get_by_label("Letters are shortcuts").uncheck()
    page.get_by_role("button", name="Close").click()
    page.reload()
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement === document.body")


def test_the_theme_is_switched_and_remembered(page: Page, server: str) -> None:
    page.emulate_media(color_scheme="light")
    page.goto(server)
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Use dark colours").click()
    dark = page.evaluate(ground)
    page.goto(f"{server}/loop")
    assert page.evaluate(ground) == dark != light
    page.get_by_role("button", name="Use light colours").click()
    assert page.evaluate(ground) == light


def test_scans_are_chosen_excluded_and_reopened(page: Page, server: str) -> None:
    page.goto(f"{server}/?search=scan_7")
    bar = page.locator("[data-bulk-bar]")
    assert not bar.is_visible()
    page.get_by_label("Choose all scans on this page").check()
    assert bar.is_visible()
    page.get_by_role("button", name="Exclude", exact=True).click()
    assert page.locator(".notice").count() == 0, "a reason is asked for first"
    page.get_by_label("Reason").fill("blurred")
    page.get_by_role("button", name="Exclude", exact=True).click()
    assert "1 scan excluded." in (page.locator(".notice").text_content() or "")
    page.get_by_role("link", name="Search all scans").click()
    page.get_by_role("link", name="scan_7").click()
    page.get_by_role("button", name="Reopen").click()
    assert "Reopened" in (page.locator(".notice").text_content() or "")


def test_scans_are_found_chosen_and_approved_at_once(page: Page, server: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.nii.gz"
    for case in (3, 5):
        write_labels(draw_case(case)[1], path)
        page.goto(f"{server}/scans/scan_{case}")
        page.get_by_label("Label map").set_input_files(path)
        page.get_by_role("button", name="Upload as the final label").click()
    page.goto(f"{server}/?view=all")
    page.get_by_role("searchbox").fill("scan_")
    page.get_by_role("button", name="Search").click()
    for case in (3, 5):
        page.get_by_label(f"Choose scan_{case}").check()
    page.get_by_role("button", name="Approve").click()
    assert "2 scans approved." in (page.locator(".notice").text_content() or "")
    page.goto(f"{server}/scans/scan_5")
    assert page.get_by_text("approved").first.is_visible()


def test_a_label_is_uploaded_approved_rejected_compared_and_restored(page: Page, server: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.nii.gz"
    write_labels(draw_case(3)[1], path)
    page.goto(f"{server}/scans/scan_4")
    page.get_by_label("Label map").set_input_files(path)
    page.get_by_role("button", name="Upload as the final label").click()
    notice = page.locator(".notice")
    assert "kept as the final label" in (notice.text_content() or "")
    page.get_by_role("button", name="Approve").click()
    assert "Approved." in (notice.text_content() or "")
    page.get_by_text("Reject…").click()
    page.get_by_role("textbox", name="Reason").fill("the spleen is missing")
    page.get_by_role("button", name="Reject", exact=True).click()
    assert "Rejected" in (notice.text_content() or "")
    assert page.get_by_text("the spleen is missing").first.is_visible()
    page.locator("input[name=other]").last.check()
    page.locator("input[name=version]").first.check()
    page.get_by_role("button", name="Draw the difference").click()
    page.wait_for_url("**other=**")
    assert page.get_by_text("another structure").is_visible()
    accessible_links = page.get_by_role("link", name="NIfTI")
    with page.expect_download() as download:
        accessible_links.first.click()
    assert download.value.suggested_filename.endswith(".nii.gz")
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV of the difference").click()
    assert download.value.suggested_filename.endswith(".csv")
    page.get_by_role("link", name="End the comparison").click()
    page.get_by_role("button", name="Restore").last.click()
    assert "again, as version" in (notice.text_content() or "")
    with page.expect_download() as download:
        page.get_by_role("link", name="SEG of version").last.click()
    assert download.value.suggested_filename.endswith(".dcm")
    segmentation = tmp_path / "without a suffix"
    download.value.save_as(segmentation)
    page.get_by_label("Label map").set_input_files(segmentation)
    page.get_by_role("button", name="Upload as the final label").click()
    assert "kept as the final label" in (notice.text_content() or "")
    empty = draw_case(3)[1]
    write_labels(Volume(np.zeros_like(empty.array), empty.affine), path)
    page.get_by_label("Label map").set_input_files(path)
    page.get_by_role("button", name="Upload as the final label").click()
    page.get_by_role("heading", name="Keep an empty label?").wait_for()
    page.get_by_role("main").get_by_role("link", name="Back").click()
    page.get_by_label("Label map").set_input_files(path)
    page.get_by_role("button", name="Upload as the final label").click()
    page.get_by_role("button", name="Keep the empty label").click()
    assert "kept as the final label" in (notice.text_content() or "")
    page.get_by_text("3D Slicer…").click()
    assert page.get_by_role("link", name="open the images in 3D Slicer").is_visible()
    page.keyboard.press("Escape")
    page.get_by_text("Exclude…").click()
    page.get_by_role("textbox", name="Reason").fill("a phantom")
    page.get_by_role("button", name="Exclude", exact=True).click()
    assert "Excluded" in (notice.text_content() or "")


def test_a_job_appears_by_itself_and_is_stopped(page: Page, server: str, folder: Path) -> None:
    page.goto(f"{server}/loop")
    dataset = Dataset(folder, watched=True)
    with dataset.store.write() as transaction:
        actor = Actor(kind="person", name="anna", identified_by="client-id")
        job = jobs.enqueue(transaction, "batch_infer", {"model": "segmentation", "images": "all"}, actor)
    stop = page.locator(f"#stop-{job.public_id}")
    stop.wait_for()
    stop.click()
    assert "was stopped" in (page.locator(".notice").text_content() or "")
    dataset.store.close()


def test_a_round_is_started_and_stopped(page: Page, tmp_path: Path) -> None:
    with listening(make_dataset(tmp_path / "scans", scans=8, finals=8)) as address:
        page.goto(f"{address}/loop")
        page.get_by_role("button", name="Start a round").click()
        assert "round" in (page.locator(".notice").text_content() or "")
        page.get_by_role("button", name="Stop", exact=True).click()
        assert "stopped" in (page.locator(".notice").text_content() or "")


def test_a_lost_server_is_told_of(page: Page, server: str) -> None:
    page.goto(f"{server}/loop")
    page.route("**/loop/now", lambda route: route.abort())
    page.locator("[data-lost]").wait_for()
    page.unroute("**/loop/now")
    page.locator("[data-lost]").wait_for(state="hidden")


def test_the_next_scan_is_taken_in_the_viewer(page: Page, server: str) -> None:
    page.goto(server)
    page.get_by_role("button", name="Take the next scan").click()
    page.wait_for_url("**/ohif/segqc?StudyInstanceUIDs=**")


def test_the_api_page_describes_the_routes(page: Page, server: str) -> None:
    page.goto(f"{server}/docs")
    page.locator(".opblock-tag").first.wait_for()
    page.get_by_text("ActiveLearning").first.click()
    page.get_by_text("/activelearning/{strategy}").first.wait_for()
