"""A day at the server: two annotators, a reviewer, twelve scans, and a round that nobody begins.

Bert works in 3D Slicer (its client), Anna in OHIF, Rita reviews on the page. It takes some minutes and prints what
happens: ``pytest -m slow -s tests/e2e/test_day.py``. Pictures for the docs go into the folder ``SEGQC_DAY_PICTURES``.
With ``SEGQC_DAY_NETWORKS``, a served copy of the sample scans, its networks serve at first, and trainings are too short
to be of use: that is for work on this file.
"""

from __future__ import annotations

import faulthandler
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")
pytest.importorskip("playwright", reason="playwright is not installed (the extra 'dev')")

import requests
from PIL import Image
from playwright.sync_api import Page, expect
from scipy import ndimage

from segqc.loop.agreement import dice_by_structure
from segqc.loop.dataset import Dataset
from segqc.server.monailabel.client import MONAILabelClient
from segqc.store import corrections, labels, leases, queue, scans
from segqc.store.queue import QueuedScan, Wanted
from segqc.store.records import LabelRecord, Role
from segqc.types import BoolArray, LabelArray, label_names
from segqc.volumes import read_labels, read_scan, slice_layout
from tests.auth_kit import PASSWORD, add_users
from tests.browser_kit import watched
from tests.loop_kit import SAMPLES, Loop, running_loop, write_settings
from tests.panel_kit import SESSION, Annotator

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [pytest.mark.server, pytest.mark.slow]

# read at once: tests run without the settings in the environment
PICTURES: Final = os.environ.get("SEGQC_DAY_PICTURES")
NETWORKS: Final = os.environ.get("SEGQC_DAY_NETWORKS")
LABELLED: Final = ("fetus_001", "fetus_005", "fetus_007", "fetus_009", "fetus_013", "fetus_021")
WAITING: Final = ("fetus_002", "fetus_004", "fetus_008", "fetus_011", "fetus_018", "fetus_022")
TEAM: Final[Mapping[str, Role]] = {"otto": "operator", "rita": "reviewer", "anna": "annotator", "bert": "annotator"}
NONE: Final = "\N{EN DASH}"
REASON: Final = "The mask is still incomplete in the slices beside the worst one. Please complete it there, too."
SETTINGS: Final[Mapping[str, Mapping[str, object]]] = {
    "training": {"start": "warm"},
    "round": {"after_corrections": 3},
    "annotation": {"audit_share": 0.0, "validation_share": 0.0},
    "models": {"tolerated_fall": 1.0},  # after so short a training the masks may be worse, and serve all the same
}
SHORT: Final[Mapping[str, Mapping[str, object]]] = {
    "training": {"steps_per_epoch": 5},
    "training.segmentation": {"epochs": 2},
    "training.segqc": {"epochs": 2, "fold_epochs": 2, "people_epochs": 2},
    # the networks know none of the labels: these are new ones, too
    "round": {"after_corrections": len(LABELLED) + 3},
}


def make_folder(folder: Path) -> Path:
    """A copy of twelve sample scans, half of them labelled, and rounds that begin by themselves."""
    (folder / "labels" / "final").mkdir(parents=True)
    shutil.copy(Path(NETWORKS or SAMPLES) / "segqc.toml", folder)
    for scan in LABELLED + WAITING:
        shutil.copy(SAMPLES / f"{scan}.nii.gz", folder)
    for scan in LABELLED:
        shutil.copy(truth_file(scan), folder / "labels" / "final")
    write_settings(folder, SETTINGS)
    if NETWORKS is not None:
        write_settings(folder, SHORT)
        for name in ("models", "training"):
            shutil.copytree(Path(NETWORKS) / "segqc" / name, folder / "segqc" / name)
    add_users(Dataset(folder).store, TEAM)
    return folder


def truth_file(scan: str) -> Path:
    places = (SAMPLES / "labels" / "final", SAMPLES / "truth")
    return next(place / f"{scan}.nii.gz" for place in places if (place / f"{scan}.nii.gz").is_file())


def tell(text: str) -> None:
    print(text, flush=True)


@dataclass(frozen=True)
class Day:
    """The server of that day, and what its store says."""

    loop: Loop

    @cached_property
    def dataset(self) -> Dataset:
        return Dataset(self.loop.folder)

    def waiting(self) -> list[QueuedScan]:
        """The scans without a final label, the one with the worst mask first."""
        with self.dataset.store.read() as transaction:
            return list(queue.page(transaction, Wanted(), volume_score="segqc").scans)

    def held_by(self, name: str) -> str:
        """The scan that somebody has."""
        with self.dataset.store.read() as transaction:
            (scan,) = [lease.scan for lease in leases.listing(transaction, state="open") if lease.actor.name == name]
        return scan

    def state(self, scan: str) -> tuple[str, str | None]:
        with self.dataset.store.read() as transaction:
            record = scans.get(transaction, scan)
        return record.state, record.reason

    def history(self, scan: str) -> list[LabelRecord]:
        """The versions of a scan's labels but proposals, oldest first."""
        with self.dataset.store.read() as transaction:
            return [label for label in labels.history(transaction, scan) if label.tag != labels.PROPOSAL]

    def corrections_of(self, scan: str) -> list[tuple[str, int, int]]:
        """Who corrected a scan, from which version and to which, oldest first."""
        with self.dataset.store.read() as transaction:
            found = corrections.listing(transaction, scan)
        return [(done.actor.name, done.from_version, done.to_version) for done in found]

    def voxels(self, scan: str, version: int) -> LabelArray:
        (label,) = [label for label in self.history(scan) if label.id == version]
        return self.images(scan, read_labels(self.dataset.store.label_file(label)).array)

    def truth(self, scan: str) -> LabelArray:
        return self.images(scan, read_labels(truth_file(scan)).array)

    def images(self, scan: str, array: LabelArray) -> LabelArray:
        """A label map slice by slice, as it is shown."""
        return slice_layout(read_scan(self.loop.folder / f"{scan}.nii.gz")).to_images(array)

    def worst_dice(self, scan: str, array: LabelArray) -> float:
        """The true Dice of the worst structure."""
        found = dice_by_structure(array, self.truth(scan), self.dataset.structures)
        return min(value for value in found.values() if value is not None)


@dataclass(frozen=True)
class SlicerUser:
    """A person in 3D Slicer, whose module talks to the server by MONAI Label's own client."""

    day: Day
    name: str
    folder: Path

    @property
    def client(self) -> MONAILabelClient:
        made = MONAILabelClient(self.day.loop.url, tmpdir=str(self.folder), client_id=f"{self.name}'s Slicer")
        made.update_auth(made.auth_token(self.name, PASSWORD))
        return made

    def take(self) -> dict[str, Any]:
        sample: dict[str, Any] = self.client.next_sample("segqc", {})
        return sample

    def start(self, scan: str) -> LabelArray:
        """The mask that is corrected."""
        return self.day.images(scan, read_labels(Path(self.client.download_label(scan, "original"))).array)

    def submit(self, scan: str) -> None:
        """Everything that was wrong is corrected."""
        params = {"label_names": label_names(self.day.dataset.structures)}
        self.client.save_label(scan, str(truth_file(scan)), tag="final", params=params)


@dataclass(frozen=True)
class OhifUser(Annotator):
    """A person in OHIF who sees what is wrong, and corrects the worst of it in a slice."""

    day: Day

    def take_over(self) -> str:
        """Begin with the scan that was handed out."""
        scan = self.day.held_by("anna")
        self.wait_for(scan)
        return scan

    def correct(self, scan: str, number: int) -> None:
        """Paint what a slice lacks most, and erase what is most in excess."""
        shown, true = self.voxels()[number], self.day.truth(scan)[number]
        names = {value: name for name, value in label_names(self.day.dataset.structures).items()}
        lacking = {value: (true == value) & (shown != value) for value in names}
        value = max(lacking, key=lambda value: np.count_nonzero(lacking[value]))
        self.page.locator(f'segqc-panel button[title="Paint {names[value]}"]').click()
        self.press("Brush")
        self._stroke_along(lacking[value])
        excess = (self.voxels()[number] > 0) & (true == 0)
        if np.count_nonzero(excess) > 20:
            self.press("Eraser")
            self._stroke_along(excess)

    def _stroke_along(self, wanted: BoolArray) -> None:
        """One stroke inside of the largest part, with a brush as wide as fits."""
        parts, count = ndimage.label(wanted)
        sizes = ndimage.sum_labels(wanted, parts, range(1, count + 1))
        inside = ndimage.distance_transform_edt(parts == 1 + int(np.argmax(sizes)))
        widest = inside.max()
        self.page.get_by_label("Size of the brush").fill(f"{max(1.5, round(widest * 1.2) - 0.5)}")
        places = np.argwhere(inside >= 0.7 * widest)
        start = places[0]
        end = places[np.argmax(np.linalg.norm(places - start, axis=1))]
        self.stroke((int(start[1]), int(start[0])), (int(end[1]), int(end[0])))

    def submit(self, scan: str) -> int:
        """Submit, and see that the server has kept what is shown."""
        shown = self.voxels()
        self.press("Submit …")
        self.sees("changed.")
        self.press("Submit")
        version = self.version_kept()
        self.sees(f"Version {version} kept")
        np.testing.assert_array_equal(self.day.voxels(scan, version), shown)
        return version


def sign_in(page: Page, url: str, name: str) -> None:
    page.goto(url)
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator(".me")).to_have_text(name)


def picture(page: Page, name: str) -> None:
    """Keep what somebody sees, where pictures are wanted."""
    if PICTURES is not None:
        page.wait_for_load_state("networkidle")
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(page.screenshot())).save(Path(PICTURES) / f"day-{name}.webp", quality=85)


def rows(page: Page) -> list[str]:
    """The scans that the queue lists."""
    return page.locator("[data-row]").all_inner_texts()


@pytest.fixture
def day(tmp_path: Path) -> Iterator[Day]:
    folder = make_folder(tmp_path / "scans")
    with running_loop(folder, tmp_path / "terminal.log", "--sign-in") as loop:
        loop.wait("The server answers", loop.answers)
        form = {"username": "otto", "password": PASSWORD}
        token = requests.post(f"{loop.url}/auth/token", data=form, timeout=60).json()["access_token"]
        loop.session.headers["Authorization"] = f"Bearer {token}"
        yield Day(loop)


def test_a_day(day: Day, browser: Browser, tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()  # where others want the processor, too, trainings outlast a test's time
    loop, url = day.loop, day.loop.url
    with watched(browser) as (of_anna, _), watched(browser) as (of_rita, _):
        tell("\nScene 1. The server starts with six labelled scans and six that wait.")
        loop.wait("The first networks are trained", lambda: loop.serving() is not None)
        loop.wait("All waiting scans are scored", lambda: loop.jobs() == [])
        first = loop.serving()
        before = {scan.name: scan.dice for scan in day.waiting()}
        assert before.keys() == set(WAITING)
        assert list(before.values()) == sorted(before.values(), key=float), "worst first"
        rita = of_rita.new_page()
        sign_in(rita, url, "rita")
        assert rows(rita) == list(before)
        picture(rita, "queue")
        tell(f"  Rita signs in and sees the queue: {told(before)}")

        tell("\nScene 2. Bert takes a scan in 3D Slicer, Anna one in OHIF.")
        bert = SlicerUser(day, "bert", tmp_path)
        one = bert.take()["id"]
        assert one == day.held_by("bert")
        anna = OhifUser(of_anna.new_page(), url, day)
        sign_in(anna.page, url, "anna")
        anna.page.get_by_role("button", name="Take the next scan").click()
        two = anna.take_over()
        assert two != one
        tell(f"  Bert has {one}, Anna has {two}.")
        dice = day.worst_dice(one, bert.start(one))
        bert.submit(one)
        assert day.state(one) == ("submitted", None)
        tell(f"  Bert submits {one}; the true Dice of its mask was {dice:.2f}, the estimate {before[one]:.2f}.")
        worst = anna.slice_shown()
        anna.sees("Handed out to you")
        assert anna.ask("session.ranked[0] === session.instance"), "the scan opens at its worst slice"
        anna.page.wait_for_function(f"() => {SESSION}.errorMap === 'there'")
        picture(anna.page, "ohif")
        anna.correct(two, worst)
        anna.sees("Not submitted:")
        version = anna.submit(two)
        assert day.state(two) == ("submitted", None)
        picture(anna.page, "kept")
        tell(f"  Anna corrects slice {worst} of {two} with brush and eraser: version {version} is kept.")

        tell("\nScene 3. Rita looks at what Anna has changed, and rejects it.")
        rita.goto(f"{url}/scans/{two}")
        first_mask, final = day.history(two)
        rita.get_by_label(f"from version {final.parent}", exact=True).check()
        rita.get_by_label(f"to version {final.id}", exact=True).check()
        rita.get_by_role("button", name="Draw the difference").click()
        rita.wait_for_url("**other=**")
        expect(rita.get_by_text("another structure")).to_be_visible()
        picture(rita, "difference")
        rita.get_by_text("Reject…").click()
        rita.get_by_role("textbox", name="Reason").fill(REASON)
        rita.get_by_role("button", name="Reject", exact=True).click()
        expect(rita.locator(".notice")).to_contain_text("Rejected")
        assert day.state(two) == ("rejected", REASON)
        anna.page.goto(f"{url}/?view=rejected")
        expect(anna.page.get_by_text(REASON)).to_be_visible()
        anna.page.get_by_role("button", name="Take the next scan").click()
        anna.wait_until_ready(two)
        assert day.held_by("anna") == two, "what was sent back comes first"
        anna.go_to(worst)
        anna.wait_for(two)
        anna.sees("Handed out to you")
        anna.sees(f"Rejected: {REASON}")
        returned = anna.ask("session.startedFrom")
        np.testing.assert_array_equal(anna.voxels(), day.voxels(two, final.id))
        picture(anna.page, "rejected")
        for number in (worst - 1, worst + 1):
            anna.go_to(number)
            anna.correct(two, number)
        version = anna.submit(two)
        assert day.state(two) == ("submitted", None)
        assert day.corrections_of(two) == [("anna", first_mask.id, final.id), ("anna", returned, version)]
        tell(f"  {two} comes back to Anna with the reason; she corrects two more slices: version {version} is kept.")
        rita.goto(f"{url}/scans/{two}")
        rita.get_by_role("button", name="Approve").click()
        expect(rita.locator(".notice")).to_contain_text("Approved")
        assert day.state(two) == ("approved", None)
        tell("  Rita approves it.")

        tell("\nScene 4. The third correction is in, and a round begins by itself, while both go on.")
        anna.press("Next scan")
        anna.sees("Handed out to you")
        three = anna.take_over()
        handed_out = anna.voxels()
        four = bert.take()["id"]
        bert.submit(four)
        five = bert.take()["id"]
        rita.goto(f"{url}/loop")
        expect(rita.locator("#now .jobs")).to_contain_text("corrections", timeout=600_000)
        loop.wait("A round has begun by itself", loop.is_in_a_round)
        expect(rita.locator("#now .message")).to_contain_text("segmentation", timeout=600_000)
        picture(rita, "loop")
        tell(f"  Anna has {three}, Bert has {five}; Rita sees the round on the page.")
        loop.wait("The round has ended, and all waiting scans are scored", lambda: loop.jobs() == [])
        second = loop.serving()
        assert second != first
        after = {scan.name: scan.dice for scan in day.waiting()}
        assert after.keys() == {*WAITING} - {one, two, four}
        assert all(after[scan] != before[scan] for scan in after), "other networks, other masks and estimates"
        assert list(after.values()) == sorted(after.values(), key=float), "worst first"
        expect(rita.locator("#now .idle")).to_contain_text("Nothing runs", timeout=60_000)
        rita.goto(url)
        assert rows(rita) == list(after)
        tell(f"  Bundle {second} serves in the place of {first}. The queue is {told(after)}")

        np.testing.assert_array_equal(anna.voxels(), handed_out)
        anna.correct(three, anna.slice_shown())
        version = anna.submit(three)
        bert.submit(five)
        assert day.state(three) == day.state(five) == ("submitted", None)
        tell(f"  Anna and Bert have noticed nothing: version {version} of {three} is kept, and so is {five}.")

        tell("\nScene 5. The history of the scan that was rejected.")
        rita.goto(f"{url}/scans/{two}")
        lines = rita.locator("#history tbody tr").all_inner_texts()
        history = day.history(two)
        assert len(lines) == len(history)
        for line, label in zip(lines, reversed(history), strict=True):
            who, origin = label.actor.name, str(label.parent) if label.parent is not None else NONE
            assert line.split()[0] == str(label.id)
            assert who in line
            assert origin in line.split()
            assert "ago" in line
            tell(f"  version {label.id}, {label.tag}, by {who}, {label.made_at:%H:%M:%S}, from {origin}")
        final_ones = [label for label in history if label.tag == "final" and label.sha256 is not None]
        assert [label.actor.name for label in final_ones] == ["anna", "anna"]
        happened = rita.locator(".events").first
        for text in (f"by rita: {REASON}", "by anna"):
            expect(happened).to_contain_text(text)
        rita.locator("#history").scroll_into_view_if_needed()
        picture(rita, "history")


def told(estimates: Mapping[str, float | None]) -> str:
    """A queue in a line."""
    return ", ".join(f"{scan} {NONE if dice is None else f'{dice:.2f}'}" for scan, dice in estimates.items())
