"""Our panel in OHIF on real scans, in a folder and in a PACS: what is painted is what is kept, voxel by voxel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")
pytest.importorskip("playwright", reason="playwright is not installed (the extra 'dev')")

from playwright.sync_api import Page

from segqc.loop.dataset import Dataset
from segqc.loop.scoring import assess_scan
from segqc.server import app as server_app
from segqc.server.ohif.viewer import bundled_viewer, installed_viewer
from segqc.store import leases
from segqc.store.labels import NewLabel
from segqc.store.records import Actor
from segqc.volumes import Volume, slice_layout, temporary_labels, write_scan
from tests.browser_kit import keep_picture, lack
from tests.e2e.test_pacs import cases
from tests.e2e.test_pacs_panel import hospital as hospital
from tests.e2e.test_panel import SPLEEN, stored
from tests.pacs_kit import series, to_bytes
from tests.panel_kit import Annotator
from tests.server_kit import CHECKED, add_models, listening, make_dataset
from tests.test_pacs import Hospital

pytestmark = pytest.mark.server
NETWORK = Actor(kind="network", name="seg", identified_by="program")


def add_masks(dataset: Dataset, number: int, drawn: dict[str, Volume]) -> None:
    """The experts' masks as a network's, and what untrained networks say of them."""
    bundle = dataset.bundle()
    assert bundle is not None
    for scan, mask in drawn.items():
        grid = dataset.read_scan(dataset.scan(scan))
        array = mask.array if np.allclose(grid.affine, mask.affine, atol=1e-2) else mask.array[:, :, ::-1]
        with temporary_labels(Volume(np.ascontiguousarray(array), grid.affine)) as path:
            dataset.store.save_label(NewLabel(scan, "original", "network", NETWORK, bundle=number), path)
        assess_scan(dataset, dataset.scan(scan), bundle)


def off_the_line(grid: Volume, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """How far the centre of each voxel is from a line between two points, in millimetres."""
    voxels = np.moveaxis(np.indices(grid.array.shape), 0, -1)
    places = voxels @ grid.affine[:3, :3].T + grid.affine[:3, 3] - start
    share = np.clip(places @ (end - start) / ((end - start) @ (end - start)), 0, 1)
    distances: np.ndarray = np.linalg.norm(places - share[..., None] * (end - start), axis=-1)
    return distances


@pytest.mark.parametrize("viewer", ["bundled", "installed"])
@pytest.mark.parametrize("place", ["folder", "PACS"])
def test_what_is_painted_on_real_scans_is_kept(
    place: str,
    viewer: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    page: Page,
    tmp_path: Path,
) -> None:
    find = {"bundled": bundled_viewer, "installed": installed_viewer}[viewer]
    if find() is None:
        lack("no newer OHIF is installed (make ohif)")
    monkeypatch.setattr(server_app, "find_viewer", find)
    drawn: dict[str, Volume] = {}
    if place == "folder":
        folder = make_dataset(tmp_path / "scans", scans=0, finals=0, config=CHECKED)
        for i, (name, image, mask) in enumerate(cases()):
            write_scan(image, folder / f"{name}-{i}.nii.gz")
            drawn[f"{name}-{i}"] = mask
        dataset, number = Dataset(folder), add_models(folder)
    else:
        hospital: Hospital = request.getfixturevalue("hospital")
        for i, (name, image, mask) in enumerate(cases()):
            items = series(image, f"{hospital.patient}{name}-{i}")
            hospital.orthanc.store(*map(to_bytes, items))
            drawn[str(items[0].SeriesInstanceUID)] = mask
        folder, number = hospital.folder, add_models(hospital.folder)
        dataset = hospital.open()
    add_masks(dataset, number, drawn)
    with listening(folder) as url:
        anna, done = Annotator(page, url), set[str]()
        anna.open(next(iter(drawn)))
        for _ in drawn:
            anna.press("Next scan")
            page.wait_for_function(
                "done => { const s = document.querySelector('segqc-panel')?.session; "
                "return s?.isHandedOut && s.phase === 'ready' && !done.includes(s.scan.scan); }",
                arg=sorted(done),
            )
            with dataset.store.read() as transaction:
                (lease,) = leases.listing(transaction, state="open")
            anna.wait_for(lease.scan)
            done.add(lease.scan)
            page.keyboard.press("n")
            start, shown = anna.voxels(), anna.slice_shown()
            page.locator('segqc-panel button[title="Paint spleen"]').click()
            anna.press("Brush")
            rows, columns = start.shape[1:]
            points = anna.stroke((columns // 2 - 8, rows // 2), (columns // 2 + 8, rows // 2))
            painted = anna.voxels()
            assert set(np.argwhere(painted != start)[:, 0]) == {shown}
            anna.press("Submit …")
            anna.sees("changed.")
            anna.press("Submit")
            kept = stored(anna.version_kept())
            keep_picture(page, tmp_path, f"{place}-{len(done)}")
            grid = dataset.read_scan(dataset.scan(lease.scan))
            to_images = np.transpose if place == "PACS" else slice_layout(grid).to_images
            np.testing.assert_array_equal(to_images(kept), painted)
            # by geometry alone: the whole stroke is painted, without gaps, and nothing beside it
            away, radius = to_images(off_the_line(grid, *points))[shown], anna.ask("session.preferences.brush")
            pixel = np.linalg.norm(grid.affine[:3, :3], axis=0).min()
            assert np.all(painted[shown][away < radius - pixel] == SPLEEN)
            assert np.all(away[painted[shown] != start[shown]] < radius + pixel)
    assert done == drawn.keys()
