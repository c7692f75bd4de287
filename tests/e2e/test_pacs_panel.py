"""Our panel in OHIF on scans of a PACS: what is painted lies there as a SEG, voxel by voxel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pydicom.uid import generate_uid

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")
pytest.importorskip("playwright", reason="playwright is not installed (the extra 'dev')")

from playwright.sync_api import Page

from segqc.volumes import Volume
from tests.browser_kit import keep_picture
from tests.e2e.test_panel import AFFINES, stored
from tests.pacs_kit import PASSWORD, USER, Orthanc, series, to_bytes
from tests.panel_kit import Annotator
from tests.server_kit import CHECKED, STRUCTURES, add_models, assess, draw_case, listening
from tests.test_pacs import Hospital, publish, read_independently

if TYPE_CHECKING:
    from segqc.loop.dataset import Dataset

pytestmark = pytest.mark.server
SCANS = ("oblique", "flipped")


@pytest.fixture
def hospital(orthanc: Orthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hospital:
    monkeypatch.setenv("SEGQC_PACS__PASSWORD", PASSWORD)
    found = Hospital(orthanc, tmp_path / "work", f"P{generate_uid()[-12:]}-")
    found.folder.mkdir()
    settings = f'[pacs]\nurl = "{orthanc.url}"\nuser = "{USER}"\npatient = "{found.patient}*"\n'
    (found.folder / "segqc.toml").write_text(settings + CHECKED)
    return found


@pytest.fixture(params=["a study each", "one study"])
def studies(request: pytest.FixtureRequest, hospital: Hospital) -> dict[str, str]:
    """The studies of the scans, each a series with a mask and an estimate, in the order of their hand-out."""
    found: dict[str, str] = {}
    study = generate_uid() if request.param == "one study" else None
    for case, name in enumerate(SCANS):
        patient = f"{hospital.patient}{name if study is None else ''}"
        items = series(Volume(draw_case(case)[0].array, AFFINES[name]), patient, study=study)
        hospital.orthanc.store(*map(to_bytes, items))
        found[str(items[0].SeriesInstanceUID)] = str(items[0].StudyInstanceUID)
    number = add_models(hospital.folder)
    dataset = hospital.open()
    for case, uid in enumerate(found):
        mask = mask_of(dataset, uid, case)
        assess(dataset, uid, 0.5 + 0.1 * case, 4, mask=mask, half_width=0.08, number=number)
    dataset.store.close()
    return found


def mask_of(dataset: Dataset, uid: str, case: int) -> Volume:
    """A case's label map on the grid of its series, whose slices may run the other way."""
    scan, array = dataset.read_scan(dataset.scan(uid)), draw_case(case)[1].array
    is_turned = not np.allclose(scan.affine, AFFINES[SCANS[case]], atol=1e-3)
    return Volume(np.ascontiguousarray(array[:, :, ::-1]) if is_turned else array, scan.affine)


@pytest.fixture
def server(hospital: Hospital, studies: dict[str, str]) -> Iterator[str]:
    with listening(hospital.folder) as address:
        yield address


def test_what_is_painted_is_in_the_pacs(
    hospital: Hospital, studies: dict[str, str], server: str, page: Page, tmp_path: Path
) -> None:
    anna = Annotator(page, server)
    first, second = studies
    anna.open(second)
    hospital.wipe()
    anna.press("Next scan")
    dataset = hospital.open()
    for case, uid in enumerate((first, second)):
        anna.wait_for(uid)
        start = mask_of(dataset, uid, case).array
        np.testing.assert_array_equal(anna.voxels(), start.transpose(2, 1, 0))
        assert anna.slice_shown() == 4
        keep_picture(anna.page, tmp_path, f"{SCANS[case]}-1")
        hospital.wipe()
        anna.press("spleen")
        anna.press("Brush")
        points = anna.stroke((4, 5), (9, 5))
        painted = anna.voxels()
        assert set(np.argwhere(painted != start.transpose(2, 1, 0))[:, 0]) == {4}
        anna.press("Submit …")
        anna.sees("changed.")
        anna.press("Submit")
        kept = stored(anna.version_kept())
        keep_picture(anna.page, tmp_path, f"{SCANS[case]}-2")
        np.testing.assert_array_equal(kept.transpose(2, 1, 0), painted)
        scan = dataset.read_scan(dataset.scan(uid))
        for point in points:  # by geometry alone: the voxels that the mouse was on
            voxel = np.rint(np.linalg.solve(scan.affine, [*point, 1.0])[:3]).astype(int)
            assert (voxel[2], kept[tuple(voxel)]) == (4, 4)
        assert publish(dataset) == 1
        found = hospital.orthanc.segmentations(studies[uid])
        (seg,) = [item for item in found if item.ReferencedSeriesSequence[0].SeriesInstanceUID == uid]
        values = {structure.name: structure.values[0] for structure in STRUCTURES}
        np.testing.assert_array_equal(read_independently(seg, scan, values), kept)
        anna.press("Next scan")
