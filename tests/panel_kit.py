"""An annotator in OHIF with our panel, by mouse and keyboard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import requests
from playwright.sync_api import Page, expect

from tests.browser_kit import SECONDS, open_scan

SESSION: Final = "document.querySelector('segqc-panel').session"


@dataclass(frozen=True)
class Annotator:
    """A person at a page."""

    page: Page
    server: str

    def open(self, scan: str) -> None:
        found = requests.get(f"{self.server}/segqc/dicomweb/{scan}", timeout=30).json()
        open_scan(self.page, f"{self.server}/ohif/", found["study"], found["series"])
        self.wait_for(scan)

    def wait_until_ready(self, scan: str) -> None:
        """Until a scan can be worked on."""
        # the scan's id; what is written is the title that people call it
        expect(self.page.locator("segqc-panel .title")).to_have_attribute("title", scan, timeout=SECONDS * 1000)
        self.page.wait_for_function(f"() => {SESSION}.phase === 'ready' && !{SESSION}.busy")

    def wait_for(self, scan: str) -> None:
        """Until a scan can be worked on, and its mask is drawn in the slice that is shown."""
        self.wait_until_ready(scan)
        # its colours are the only ones in a picture of greys
        self.page.wait_for_function(
            """() => {
                const canvas = document.querySelector('canvas.cornerstone-canvas');
                const copy = document.createElement('canvas');
                [copy.width, copy.height] = [canvas.width, canvas.height];
                const context = copy.getContext('2d');
                context.drawImage(canvas, 0, 0);
                const { data } = context.getImageData(0, 0, copy.width, copy.height);
                for (let i = 0, coloured = 0; i < data.length; i += 4) {
                    coloured += Math.max(data[i], data[i + 1], data[i + 2])
                        - Math.min(data[i], data[i + 1], data[i + 2]) > 40 ? 1 : 0;
                    if (coloured > 500) return true;
                }
                return false;
            }"""
        )

    def press(self, name: str) -> None:
        self.page.locator("segqc-panel").get_by_role("button", name=name, exact=True).first.click()

    def ask(self, expression: str) -> Any:
        return self.page.evaluate(f"() => {{ const session = {SESSION}; return {expression}; }}")

    def sees(self, text: str) -> None:
        expect(self.page.locator("segqc-panel").get_by_text(text).first).to_be_visible()

    def go_to(self, number: int) -> None:
        """Go to a slice by a click on its bar."""
        self.page.locator(f'segqc-panel .strip g[data-slice="{number}"]').click()
        self.page.wait_for_function(f"n => {SESSION}.scan.instances.indexOf({SESSION}.instance) === n", arg=number)

    def slice_shown(self) -> int:
        """The number of the slice in the file, from 0."""
        index: int = self.ask("session.scan.instances.indexOf(session.instance)")
        return index

    def voxels(self) -> np.ndarray:
        """The mask as the page has it: slices, rows, columns."""
        shape = self.ask("[session.scan.instances.length, session.scan.rows, session.scan.columns]")
        text = self.ask("[...session.mask.voxels()].map(value => String.fromCharCode(value)).join('')")
        return np.frombuffer(text.encode("latin-1"), np.uint8).reshape(shape)

    def place(self, column: int, row: int) -> tuple[float, float, list[float]]:
        """Where the centre of a pixel is on the screen, and in the world (LPS) by the viewer's own word."""
        return tuple(  # type: ignore[return-value]
            self.page.evaluate(
                """([column, row]) => {
                    const { services } = document.querySelector('segqc-panel').session;
                    const id = services.viewportGridService.getActiveViewportId();
                    const viewport = services.cornerstoneViewportService.getCornerstoneViewport(id);
                    const plane = cornerstone.metaData.get('imagePlaneModule', viewport.getCurrentImageId());
                    const point = [0, 1, 2].map(i => plane.imagePositionPatient[i]
                        + column * plane.columnPixelSpacing * plane.rowCosines[i]
                        + row * plane.rowPixelSpacing * plane.columnCosines[i]);
                    const [x, y] = viewport.worldToCanvas(point);
                    const box = viewport.element.getBoundingClientRect();
                    return [box.x + x, box.y + y, [...viewport.canvasToWorld([x, y])]];
                }""",
                [column, row],
            )
        )

    def stroke(self, start: tuple[int, int], end: tuple[int, int]) -> list[np.ndarray]:
        """Draw with the mouse from one pixel to another; where it went, in RAS millimetres.

        As a person does it: no faster than the screen is drawn. Chromium makes one event of all moves between two
        frames, and where it is busy the brush would hear of the button's end before it has heard of the last move.
        """
        (x, y, first), (right, down, last) = self.place(*start), self.place(*end)
        before = self.ask("session.mask.done.length")
        self._move_to(x, y)
        self.page.mouse.down()
        self._wait_for_frame()
        for share in (0.25, 0.5, 0.75, 1.0):
            self._move_to(x + share * (right - x), y + share * (down - y))
        self.page.mouse.up()
        self.page.wait_for_function(f"before => {SESSION}.mask.done.length > before", arg=before)
        return [np.array(point) * [-1, -1, 1] for point in (first, last)]

    def click(self, x: float, y: float) -> None:
        """Paint with one click at a place on the screen."""
        before = self.ask("session.mask.done.length")
        self._move_to(x, y)
        self.page.mouse.click(x, y)
        self.page.wait_for_function(f"before => {SESSION}.mask.done.length > before", arg=before)

    def _move_to(self, x: float, y: float) -> None:
        self.page.mouse.move(x, y)
        self._wait_for_frame()

    def _wait_for_frame(self) -> None:
        """Until what has happened so far is on the screen."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def version_kept(self) -> int:
        """The number of the label version that the server says it has kept."""
        text = self.page.locator("segqc-panel .notice.kept").inner_text(timeout=SECONDS * 1000)
        return int(text.split()[1])
