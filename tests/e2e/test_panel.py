"""An annotator's work in OHIF with our panel, by mouse and keyboard, on MONAI Label's OHIF and the newer one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")
pytest.importorskip("playwright", reason="playwright is not installed (the extra 'dev')")

import requests
from playwright.sync_api import Page, Route, expect

from segqc.loop.dataset import Dataset
from segqc.loop.scoring import assess_scan
from segqc.server import app as server_app
from segqc.server import checks as server_checks
from segqc.server.monailabel.facade import current_app
from segqc.server.ohif.viewer import bundled_viewer, installed_viewer
from segqc.store import corrections, labels, leases
from segqc.store.labels import NewLabel
from segqc.store.records import Actor
from segqc.types import LabelArray
from segqc.volumes import Volume, read_labels, read_scan, slice_layout, temporary_labels, write_scan
from tests.browser_kit import keep_picture, lack, open_scan
from tests.panel_kit import SESSION, Annotator
from tests.server_kit import (
    CHECKED,
    SHAPE,
    add_models,
    assess,
    draw_case,
    knowing_the_truth,
    listening,
    make_dataset,
    without_liver,
)
from tests.test_attention_checks import hit

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

pytestmark = pytest.mark.server

SPACING: Final = (1.5, 1.5, 4.0)
WORST: Final = 4  # slice, from 0
SPLEEN: Final = 4


def affine_of(directions: np.ndarray) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = directions * SPACING
    affine[:3, 3] = -31.7, 12.25, 104.5
    return affine


def tilted() -> np.ndarray:
    """Directions of a scan that lies between the planes of the body."""
    (c, s), (d, e) = ((np.cos(a), np.sin(a)) for a in np.deg2rad((20.0, -35.0)))
    around_x, around_y = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]), np.array([[d, 0, e], [0, 1, 0], [-e, 0, d]])
    return around_x @ around_y


# the scans in the order in which they are handed out
AFFINES: Final = {
    "oblique": affine_of(tilted()),
    "flipped": affine_of(np.diag([-1.0, 1.0, -1.0])),
    "plain": affine_of(np.eye(3)),
}


def make_folder(folder: Path) -> Path:
    """Scans with masks of an untrained network, and estimates."""
    make_dataset(folder, scans=0, finals=0, config=CHECKED)
    for case, (name, affine) in enumerate(AFFINES.items()):
        write_scan(Volume(draw_case(case)[0].array, affine), folder / f"{name}.nii.gz")
    dataset = Dataset(folder)
    estimate(dataset, add_models(folder))
    dataset.store.close()
    return folder


def estimate(dataset: Dataset, number: int) -> None:
    """Estimates of the masks by a bundle."""
    for case, (name, affine) in enumerate(AFFINES.items()):
        mask = Volume(draw_case(case)[1].array, affine)
        assess(dataset, name, 0.5 + 0.1 * case, WORST, mask=mask, half_width=0.08, number=number)


@pytest.fixture(params=["bundled", "installed"])
def server(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    find = {"bundled": bundled_viewer, "installed": installed_viewer}[request.param]
    if find() is None:
        lack("no newer OHIF is installed (make ohif)")
    monkeypatch.setattr(server_app, "find_viewer", find)
    with listening(make_folder(tmp_path / "scans")) as address:
        yield address


@pytest.fixture
def anna(server: str, page: Page) -> Annotator:
    return Annotator(page, server)


def stored(version: int) -> LabelArray:
    dataset = current_app().context.dataset
    with dataset.store.read() as transaction:
        label = labels.get(transaction, version)
    array: LabelArray = read_labels(dataset.store.label_file(label)).array
    return array


def to_images(scan: str, array: np.ndarray) -> np.ndarray:
    return slice_layout(read_scan(current_app().context.dataset.folder / f"{scan}.nii.gz")).to_images(array)


def test_a_day_at_the_viewer(anna: Annotator, tmp_path: Path) -> None:
    """The next scan, its worst slice, paint, undo, paint, submit; and the stored voxels are the painted ones."""
    anna.open("plain")
    anna.press("Next scan")
    for scan, case in (("oblique", 0), ("flipped", 1)):
        anna.wait_for(scan)
        start = draw_case(case)[1].array
        np.testing.assert_array_equal(anna.voxels(), to_images(scan, start))
        assert anna.slice_shown() == WORST
        anna.page.keyboard.press("n")
        anna.page.wait_for_function(f"() => {SESSION}.instance !== {SESSION}.ranked[0]")
        anna.page.keyboard.press("p")
        anna.page.wait_for_function(f"() => {SESSION}.instance === {SESSION}.ranked[0]")
        assert anna.page.locator("segqc-panel .strip rect.now").count() == 1
        keep_picture(anna.page, tmp_path, f"{scan}-1")

        anna.press("spleen")
        anna.press("Brush")
        anna.stroke((4, 5), (9, 5))
        painted = anna.voxels()
        changed = np.argwhere(painted != to_images(scan, start))
        assert len(changed)
        assert set(changed[:, 0]) == {WORST}
        anna.sees("Not submitted:")
        anna.page.keyboard.press("Control+z")
        np.testing.assert_array_equal(anna.voxels(), to_images(scan, start))
        anna.sees("No changes")
        anna.page.keyboard.press("Control+Shift+z")
        np.testing.assert_array_equal(anna.voxels(), painted)
        points = anna.stroke((20, 20), (24, 16))
        anna.press("Eraser")
        erased = anna.stroke((6, 5), (6, 5))
        painted = anna.voxels()
        keep_picture(anna.page, tmp_path, f"{scan}-2")

        anna.press("Submit …")
        anna.sees("changed.")
        keep_picture(anna.page, tmp_path, f"{scan}-3")
        anna.press("Submit")
        version = anna.version_kept()
        kept = stored(version)
        np.testing.assert_array_equal(to_images(scan, kept), painted)
        # by geometry alone: the voxels that the mouse was on
        for where, value in [(point, SPLEEN) for point in points] + [(point, 0) for point in erased]:
            voxel = np.rint(np.linalg.solve(AFFINES[scan], [*where, 1.0])[:3]).astype(int)
            assert voxel[2] == WORST
            assert kept[tuple(voxel)] == value
        anna.sees("No changes")
        keep_picture(anna.page, tmp_path, f"{scan}-4")
        anna.press("Next scan")
    anna.wait_for("plain")


def test_buttons_do_what_their_keys_do_and_changes_are_submitted_first(anna: Annotator) -> None:
    anna.open("plain")
    for button, rank in (("Next worst", 1), ("Previous", 0)):
        anna.page.locator("segqc-panel").get_by_role("button", name=button).click()  # the name ends in the key
        anna.page.wait_for_function(f"() => {SESSION}.instance === {SESSION}.ranked[{rank}]")
    start = anna.voxels()
    anna.press("Brush")
    anna.stroke((4, 5), (9, 5))
    painted = anna.voxels()
    for button, voxels in (("Undo (Ctrl Z)", start), ("Redo (Ctrl Shift Z)", painted)):
        anna.press(button)
        np.testing.assert_array_equal(anna.voxels(), voxels)
    anna.press("Next scan")
    anna.press("Submit first …")
    anna.sees("changed.")
    anna.press("Submit")
    np.testing.assert_array_equal(to_images("plain", stored(anna.version_kept())), painted)


def test_the_wheel_goes_on_from_where_a_jump_went_and_nothing_is_said_to_be_loading(anna: Annotator) -> None:
    anna.open("plain")
    loading = anna.page.get_by_text("Loading...", exact=True)
    anna.page.wait_for_timeout(500)
    assert loading.count() == 0
    anna.page.locator("segqc-panel").get_by_role("button", name="Next worst").click()
    anna.page.wait_for_function(f"() => {SESSION}.instance === {SESSION}.ranked[1]")
    at = anna.slice_shown()
    anna.page.mouse.move(*anna.place(10, 10)[:2])
    for turn in (100, -100):  # at one end of the stack, one of them does nothing
        if anna.slice_shown() == at:
            anna.page.mouse.wheel(0, turn)
            anna.page.wait_for_timeout(500)
    assert abs(anna.slice_shown() - at) == 1
    anna.page.wait_for_timeout(500)
    assert loading.count() == 0


def test_a_stroke_is_taken_back_by_the_viewer(anna: Annotator) -> None:
    """OHIF's own button for it, where there is one, and ours agree."""
    anna.open("oblique")
    if not anna.page.evaluate("() => Boolean(cornerstone.utilities.HistoryMemo)"):
        pytest.skip("this OHIF takes no strokes back")
    start = anna.voxels()
    anna.press("Brush")
    anna.stroke((4, 5), (9, 5))
    painted = anna.voxels()
    for command, voxels, changes in (("undo", start, 0), ("redo", painted, 1)):
        anna.page.evaluate(f"() => cornerstone.utilities.HistoryMemo.DefaultHistoryMemo.{command}()")
        anna.page.wait_for_function(f"() => {SESSION}.mask.done.length === {changes}")
        np.testing.assert_array_equal(anna.voxels(), voxels)


def test_a_click_paints_after_a_stroke_and_the_smallest_brush_marks_a_pixel(anna: Annotator) -> None:
    anna.open("plain")
    anna.press("spleen")
    anna.press("Brush")
    anna.stroke((4, 5), (9, 5))
    before = anna.voxels()
    anna.click(*anna.place(4, 20)[:2])
    assert np.count_nonzero(anna.voxels() != before) > 9, "a circle of 4 mm, whose pixels are of 1.5"
    anna.page.get_by_label("Size of the brush").fill("0.5")
    before = anna.voxels()
    (x, y, _), (right, down, _) = anna.place(27, 20), anna.place(28, 21)
    anna.click(x + 0.4 * (right - x), y + 0.4 * (down - y))  # where no pixel's centre is near
    assert np.argwhere(anna.voxels() != before).tolist() == [[anna.slice_shown(), 20, 27]]


def test_a_hidden_structure_is_shown_when_it_is_to_be_painted(anna: Annotator) -> None:
    anna.open("plain")
    anna.press("Hide spleen")
    anna.press("Hide liver")
    assert anna.ask("[...session.hiddenValues]") == [SPLEEN, 1]
    anna.page.locator('segqc-panel button[title="Paint spleen"]').click()
    assert anna.ask("[...session.hiddenValues]") == [1]


def test_a_structure_that_is_hidden_while_it_is_painted_is_shown_with_the_next_stroke(anna: Annotator) -> None:
    anna.open("plain")
    anna.press("spleen")
    anna.press("Brush")
    anna.press("Hide liver")
    anna.press("Hide spleen")
    start = anna.voxels()
    (x, y, _), (right, down, _) = anna.place(4, 5), anna.place(9, 5)
    anna.page.mouse.move(x, y)
    anna.page.mouse.down()
    anna.page.mouse.move(right, down, steps=4)
    anna.page.wait_for_function(f"() => [...{SESSION}.hiddenValues].join() === '1'")  # and before the stroke has ended
    expect(anna.page.locator("segqc-panel").get_by_role("button", name="Hide spleen")).to_be_visible()
    anna.page.mouse.up()
    anna.page.wait_for_function(f"() => {SESSION}.mask.done.length === 1")
    assert set(np.unique(anna.voxels()[anna.voxels() != start])) == {SPLEEN}
    anna.press("Hide spleen")
    anna.press("Undo (Ctrl Z)")
    anna.press("Eraser")
    anna.stroke((4, 5), (24, 16))
    assert anna.ask("[...session.hiddenValues]") == [1, SPLEEN], "nothing is painted into them"


def test_unsubmitted_changes_are_asked_for_and_can_be_had_back(anna: Annotator, tmp_path: Path) -> None:
    anna.open("plain")
    anna.press("Brush")
    anna.stroke((4, 5), (9, 5))
    painted = anna.voxels()
    anna.press("Next scan")
    anna.sees("would be lost")
    keep_picture(anna.page, tmp_path, "asked")
    anna.press("Stay")
    np.testing.assert_array_equal(anna.voxels(), painted)
    # the browser asks, too, where the page is closed or loaded anew
    asked = []
    anna.page.once("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    anna.page.close(run_before_unload=True)
    anna.page.wait_for_timeout(1000)
    assert asked == ["beforeunload"]
    # whoever leaves by OHIF's own ways finds them again
    study = requests.get(f"{anna.server}/segqc/dicomweb/oblique", timeout=30).json()["study"]
    go = "study => commandsManager.runCommand('navigateHistory', { to: '/segqc?StudyInstanceUIDs=' + study })"
    anna.page.evaluate(go, study)
    anna.wait_for("oblique")
    anna.page.evaluate(go, requests.get(f"{anna.server}/segqc/dicomweb/plain", timeout=30).json()["study"])
    anna.wait_for("plain")
    anna.sees("You left this scan with changes that were not submitted.")
    anna.press("Bring them back")
    np.testing.assert_array_equal(anna.voxels(), painted)
    anna.press("Next scan")
    anna.press("Drop them")
    anna.wait_for("oblique")


def test_a_skip_asks_for_the_reason_and_letters_stay_where_they_are_typed(anna: Annotator, tmp_path: Path) -> None:
    anna.open("plain")
    anna.press("Next scan")
    anna.wait_for("oblique")
    before = anna.slice_shown()
    anna.press("Skip …")
    reason = anna.page.get_by_label("Why the scan is skipped")
    expect(reason).to_be_focused()
    anna.page.keyboard.type("no plan: zoom, pan, invert")  # n and p are ours, z and i are OHIF's
    assert reason.input_value() == "no plan: zoom, pan, invert"
    assert anna.slice_shown() == before
    keep_picture(anna.page, tmp_path, "skip")
    anna.page.keyboard.press("Enter")
    anna.wait_for("flipped")
    with current_app().context.dataset.store.read() as transaction:
        assert list(leases.skip_reasons(transaction).values()) == ["no plan: zoom, pan, invert"]


def test_a_submission_is_checked_and_what_was_found_is_shown(
    anna: Annotator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst slices of the mask are others than those that are to be looked at again."""
    knowing_the_truth(monkeypatch)
    dataset = current_app().context.dataset
    estimate(dataset, add_models(dataset.folder, people=True))
    going = threading.Event()
    check = server_checks.check_label
    monkeypatch.setattr(server_checks, "check_label", lambda *args: going.wait() and check(*args))
    anna.open("plain")
    anna.press("Next scan")
    anna.wait_for("oblique")
    anna.go_to(7)
    anna.press("spleen")
    anna.press("Brush")
    anna.stroke((22, 4), (27, 4))
    anna.press("Submit …")
    anna.page.locator("segqc-panel .confirm").click()
    version = anna.version_kept()
    anna.sees("The label is being checked.")
    anna.wait_until_ready("oblique")
    keep_picture(anna.page, tmp_path, "check-1")

    going.set()
    anna.sees("Look again at slice 7: something else seems to be marked as spleen.")
    anna.page.wait_for_function(f"() => {SESSION}.errorMap === 'there'")
    assert anna.ask("session.scan.estimate.version") == version
    boxes = "session.scan.estimate.boxes.map(box => session.scan.instances.indexOf(box.instance))"
    assert set(anna.ask(boxes)) == {7}
    anna.go_to(2)
    anna.page.keyboard.press("n")
    anna.page.wait_for_function(f"() => {SESSION}.scan.instances.indexOf({SESSION}.instance) === 7")
    expect(anna.page.locator(".segqc-overlay polygon").last).to_be_attached()
    keep_picture(anna.page, tmp_path, "check-2")
    anna.go_to(2)
    anna.press("Look again")
    anna.page.wait_for_function(f"() => {SESSION}.scan.instances.indexOf({SESSION}.instance) === 7")

    # put right, and submitted again
    anna.page.keyboard.press("Control+z")
    anna.sees("Not submitted:")
    anna.press("Submit …")
    anna.page.locator("segqc-panel .confirm").click()
    anna.sees("Nothing found.")
    keep_picture(anna.page, tmp_path, "check-3")


def test_what_is_found_while_the_next_scan_is_looked_for_is_told(
    anna: Annotator, monkeypatch: pytest.MonkeyPatch
) -> None:
    knowing_the_truth(monkeypatch)
    dataset = current_app().context.dataset
    estimate(dataset, add_models(dataset.folder, people=True))
    going, held = threading.Event(), list[Route]()
    check = server_checks.check_label
    monkeypatch.setattr(server_checks, "check_label", lambda *args: going.wait() and check(*args))
    anna.open("plain")
    anna.press("Next scan")
    anna.wait_for("oblique")
    anna.go_to(7)
    anna.press("spleen")
    anna.press("Brush")
    anna.stroke((22, 4), (27, 4))
    anna.press("Submit …")
    anna.page.locator("segqc-panel .confirm").click()
    version = anna.version_kept()
    anna.wait_until_ready("oblique")
    anna.page.route("**/segqc/viewer/next", lambda route: held.append(route))  # Playwright takes no built-in
    anna.press("Next scan")
    going.set()
    anna.page.wait_for_function(f"() => {SESSION}.submitted.state === 'done'")
    for route in held:
        route.continue_()
    anna.wait_for("flipped")
    anna.sees(f"oblique, version {version}: Look again at slice 7: something else seems to be marked as spleen.")


def test_a_planted_error_is_shown_and_not_kept(page: Page, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "scans")
    with (folder / "segqc.toml").open("a") as config:
        config.write(f"attention_checks = 0.2\nseed = {hit(1)}\n")
    with listening(folder) as server:
        anna = Annotator(page, server)
        anna.open("plain")
        anna.press("Next scan")
        anna.wait_for("oblique")
        served = to_images("oblique", draw_case(0)[1].array)
        shown = anna.voxels()
        keep_picture(page, tmp_path, "planted")
        changed = np.count_nonzero(shown != served)
        assert changed >= 0.02 * np.count_nonzero(served)
        anna.press("spleen")
        anna.press("Brush")
        anna.stroke((22, 4), (27, 4))
        painted = anna.voxels()
        anna.press("Submit …")
        page.locator("segqc-panel .confirm").click()
        kept = to_images("oblique", stored(anna.version_kept()))
        stroke = painted != shown
        assert stroke.any()
        np.testing.assert_array_equal(kept, np.where(stroke, painted, served))


def test_a_proposal_is_taken_box_by_box_or_left(
    anna: Annotator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing changes before a press; each box is one step that can be undone; what was taken is told."""
    knowing_the_truth(monkeypatch)
    dataset = current_app().context.dataset
    number = add_models(dataset.folder, people=True)
    estimate(dataset, number)
    network = Actor(kind="network", name="some", identified_by="program")
    with temporary_labels(Volume(without_liver().array, AFFINES["oblique"])) as path:
        dataset.store.save_label(NewLabel("oblique", "original", "network", network, bundle=number), path)
    bundle = dataset.bundle()
    assert bundle is not None
    assess_scan(dataset, dataset.scan("oblique"), bundle)
    anna.open("plain")
    anna.press("Next scan")
    anna.wait_for("oblique")
    anna.sees("Nothing is changed before you take it")
    start, truth = (to_images("oblique", array) for array in (without_liver().array, draw_case(0)[1].array))
    np.testing.assert_array_equal(anna.voxels(), start)
    anna.sees("No changes")
    anna.sees("0 of 2 taken")
    slices = anna.ask("session.proposal.boxes.map(box => session.scan.instances.indexOf(box.instance))")
    assert sorted(slices) == [4, 5]

    panel = anna.page.locator("segqc-panel .boxes li")
    panel.first.get_by_role("button", name="Look at").click()
    anna.page.wait_for_function(f"n => {SESSION}.scan.instances.indexOf({SESSION}.instance) === n", arg=slices[0])
    expect(anna.page.locator(".segqc-overlay path.proposed").last).to_be_attached()
    for key, index in (("n", 1), ("p", 0)):
        anna.page.keyboard.press(key)
        anna.page.wait_for_function(
            f"n => {SESSION}.scan.instances.indexOf({SESSION}.instance) === n", arg=slices[index]
        )
    np.testing.assert_array_equal(anna.voxels(), start)
    keep_picture(anna.page, tmp_path, "proposal-1")

    panel.first.get_by_role("button", name="Take:").click()
    anna.sees("1 of 2 taken")
    taken = np.where((np.arange(SHAPE[2]) == slices[0])[:, None, None], truth, start)
    np.testing.assert_array_equal(anna.voxels(), taken)
    expect(anna.page.locator(".segqc-overlay path.proposed")).to_have_count(0)
    keep_picture(anna.page, tmp_path, "proposal-2")
    anna.page.keyboard.press("Control+z")
    anna.sees("0 of 2 taken")
    np.testing.assert_array_equal(anna.voxels(), start)
    anna.press("Take all")
    anna.sees("2 of 2 taken")
    np.testing.assert_array_equal(anna.voxels(), truth)
    anna.page.keyboard.press("Control+z")
    np.testing.assert_array_equal(anna.voxels(), start)
    panel.nth(1).get_by_role("button", name="Take:").click()
    anna.sees("1 of 2 taken")
    anna.press("Take the rest")
    anna.sees("2 of 2 taken")
    anna.page.keyboard.press("Control+z")
    anna.sees("1 of 2 taken")

    anna.press("Submit …")
    anna.sees("Taken from the proposal: 1 of 2 boxes.")
    keep_picture(anna.page, tmp_path, "proposal-3")
    anna.page.locator("segqc-panel .confirm").click()
    version = anna.version_kept()
    with dataset.store.read() as transaction:
        told = labels.taken_proposal(transaction, version)
        (correction,) = corrections.listing(transaction, "oblique")
    assert told is not None
    assert (told.boxes_offered, told.boxes_taken) == (2, 1)
    assert correction.proposal == told
    # what was left is proposed for the new label, when that is checked
    anna.sees("0 of 1 taken")
    anna.press("Take all")
    np.testing.assert_array_equal(anna.voxels(), truth)
    keep_picture(anna.page, tmp_path, "proposal-4")


def test_two_tabs_on_one_scan_conflict_and_both_labels_are_kept(
    server: str, user: BrowserContext, tmp_path: Path
) -> None:
    one = Annotator(user.new_page(), server)
    one.open("plain")
    one.press("Next scan")
    one.wait_for("oblique")
    other = Annotator(user.new_page(), server)  # in front from now on: a browser draws nothing in a tab behind it
    other.open("oblique")
    for tab, row in ((one, 5), (other, 20)):
        tab.page.bring_to_front()
        tab.press("Brush")
        tab.stroke((4, row), (9, row))
    one.page.bring_to_front()
    one.press("Submit …")
    one.press("Submit")
    first = one.version_kept()
    other.page.bring_to_front()
    painted = other.voxels()
    other.press("Submit …")
    other.sees(f"version {first} counts by now")
    expect(other.page.get_by_role("button", name="Load the newer one")).to_be_visible()
    keep_picture(other.page, tmp_path, "conflict")
    other.press("Keep mine beside it")
    other.sees("kept beside the final label, as version_1")
    np.testing.assert_array_equal(to_images("oblique", stored(other.version_kept())), painted)
    assert other.ask("session.scan.label.version") == first
    keep_picture(other.page, tmp_path, "beside")
    # what is shown is theirs, and does not take the place of the label that counts unasked
    other.stroke((4, 24), (9, 24))
    other.press("Submit …")
    other.sees(f"version {first} counts by now")


def test_history_loads_and_restores_versions(anna: Annotator, tmp_path: Path) -> None:
    anna.open("plain")
    anna.press("Next scan")
    anna.wait_for("oblique")
    original = anna.voxels()
    versions = []
    for row in (5, 20):
        anna.press("Brush")
        anna.stroke((4, row), (9, row))
        anna.press("Submit …")
        anna.press("Submit")
        versions.append(anna.version_kept())
        anna.page.wait_for_function(f"() => !{SESSION}.busy")
    first = to_images("oblique", stored(versions[0]))
    anna.page.locator("segqc-panel summary").click()
    keep_picture(anna.page, tmp_path, "history")
    entries = anna.page.locator("segqc-panel .history li")
    assert entries.count() == 3
    entries.nth(2).get_by_role("button", name="Load").click()
    anna.sees("is shown. Submit it to keep it, or undo.")
    np.testing.assert_array_equal(anna.voxels(), original)
    anna.page.keyboard.press("Control+z")
    np.testing.assert_array_equal(anna.voxels(), to_images("oblique", stored(versions[1])))
    entries.nth(1).get_by_role("button", name="Restore").click()
    anna.sees(f"Version {versions[0]} counts again")
    anna.wait_for("oblique")
    np.testing.assert_array_equal(anna.voxels(), first)


def test_a_server_that_is_away_takes_no_work_along(anna: Annotator, tmp_path: Path) -> None:
    anna.open("plain")
    anna.press("Brush")
    anna.stroke((4, 5), (9, 5))
    painted = anna.voxels()
    anna.press("Submit …")
    anna.sees("changed.")
    anna.page.route("**/segqc/viewer/**", lambda route: route.abort())
    anna.press("Submit")
    anna.sees("The server does not answer. Your changes are kept in this tab")
    keep_picture(anna.page, tmp_path, "away")
    np.testing.assert_array_equal(anna.voxels(), painted)
    anna.page.unroute("**/segqc/viewer/**")
    anna.press("Submit")
    np.testing.assert_array_equal(to_images("plain", stored(anna.version_kept())), painted)


def test_likely_errors_are_drawn_over_the_slice(anna: Annotator, tmp_path: Path) -> None:
    anna.open("plain")
    overlay = anna.page.locator(".segqc-overlay")
    box = overlay.locator("polygon").last
    box.wait_for(state="attached")
    anna.page.wait_for_function(f"() => {SESSION}.errorMap === 'there'")
    (left, top, _), (right, bottom, _) = anna.place(SHAPE[0] - 9, SHAPE[1] - 12), anna.place(SHAPE[0] - 3, SHAPE[1] - 4)
    half = (right - left) / (9 - 3) / 2  # boxes are drawn around pixels, places are their centres
    frame = anna.page.locator(".segqc-overlay").bounding_box()
    assert frame is not None
    corners = np.array([pair.split(",") for pair in str(box.get_attribute("points")).split()], float)
    points = corners + np.array([frame["x"], frame["y"]])
    np.testing.assert_allclose(points.min(axis=0), [left - half, top - half], atol=1.5)
    np.testing.assert_allclose(points.max(axis=0), [right - half, bottom - half], atol=1.5)
    assert overlay.locator("canvas").is_visible()
    anna.page.get_by_label("Opacity of the error map").fill("0.8")
    assert overlay.locator("canvas").evaluate("canvas => canvas.style.opacity") == "0.8"
    keep_picture(anna.page, tmp_path, "errors")
    anna.page.get_by_label("Error map", exact=True).uncheck()
    anna.page.get_by_label("Error boxes").uncheck()
    assert not overlay.locator("canvas").is_visible()
    assert overlay.locator("polygon").count() == 0
    anna.go_to(7)
    assert anna.slice_shown() == 7


def test_the_brush_paints_the_mask_and_no_other_label_map(anna: Annotator) -> None:
    anna.open("plain")
    before = anna.voxels()
    anna.page.evaluate(
        f"""async () => {{
            const {{ segmentationService, displaySetService, viewportGridService }} = {SESSION}.services;
            const [displaySet] = displaySetService.getActiveDisplaySets();
            const options = {{ segmentationId: 'another', label: 'Another', segments: {{ 1: {{ label: 'x' }} }} }};
            await segmentationService.createLabelmapForDisplaySet(displaySet, options);
            const viewport = viewportGridService.getActiveViewportId();
            await segmentationService.addSegmentationRepresentation(viewport, {{ segmentationId: 'another' }});
            segmentationService.setActiveSegmentation(viewport, 'another');
        }}"""
    )
    anna.press("spleen")
    anna.press("Brush")
    anna.stroke((4, 5), (9, 5))
    changed = anna.voxels() != before
    assert changed.any()
    assert set(anna.voxels()[changed]) == {SPLEEN}


def test_a_structure_that_is_chosen_stays_chosen(anna: Annotator) -> None:
    """Whatever OHIF does by itself in the seconds after it has a mask."""
    anna.open("plain")
    changed = anna.page.evaluate(
        f"""async () => {{
            const changed = [];
            for (let turn = 0, end = performance.now() + 3000; performance.now() < end; turn += 1) {{
                const value = turn % 2 ? {SPLEEN} : 1;
                {SESSION}.activate(value);
                await new Promise(done => setTimeout(done, 20));
                if ({SESSION}.activeValue !== value) changed.push(turn);
            }}
            return changed;
        }}"""
    )
    assert changed == []


def test_nothing_is_left_and_no_networks(page: Page, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "scans", scans=1, finals=0, config=CHECKED)
    with listening(folder) as server:
        anna = Annotator(page, server)
        study = requests.get(f"{server}/segqc/dicomweb/scan_0", timeout=30).json()["study"]
        open_scan(page, f"{server}/ohif/", study)
        anna.sees("No estimate yet: the networks are not trained.")
        anna.press("Next scan")
        page.wait_for_function(f"() => {SESSION}.isHandedOut && {SESSION}.phase === 'ready'")
        keep_picture(page, tmp_path, "no-networks")
        anna.press("Submit …")
        anna.sees("The label map is empty: no structure has a voxel.")
        anna.press("Submit")
        anna.version_kept()
        anna.press("Next scan")
        anna.sees("Nothing left for you")
        keep_picture(page, tmp_path, "none-left")


def test_reconstructed_planes_are_warned_of_and_change_nothing(anna: Annotator, tmp_path: Path) -> None:
    anna.open("oblique")
    before = anna.voxels()
    anna.page.evaluate("() => commandsManager.runCommand('toggleHangingProtocol', { protocolId: 'mpr' })")
    anna.sees("Painting in reconstructed planes may change neighbouring slices")
    anna.page.wait_for_function(
        f"""() => {{
            const {{ services, mask }} = {SESSION};
            const shown = id => services.segmentationService.getSegmentationRepresentations(id, {{
                segmentationId: mask.id,
            }}).length;
            return [...services.viewportGridService.getState().viewports.keys()].filter(shown).length === 3;
        }}"""
    )
    keep_picture(anna.page, tmp_path, "planes")
    np.testing.assert_array_equal(anna.voxels(), before)
    anna.sees("No changes")
