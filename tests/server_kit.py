"""Small dataset folders, assessments and untrained networks for the tests of server and strategies."""

from __future__ import annotations

import contextlib
import functools
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import nrrd
import numpy as np

from segqc.loop.dataset import Dataset
from segqc.networks.assessor import Assessor
from segqc.networks.bundle import model_name
from segqc.networks.card import ModelCard, NetworkName
from segqc.networks.plan import NetworkPlan, plan_network
from segqc.networks.segmenter import Segmenter
from segqc.networks.unet import build_network
from segqc.quality.report_card import ReportCard
from segqc.store.events import SERVER
from segqc.store.labels import NewLabel
from segqc.store.records import Actor
from segqc.types import (
    NO_WITNESSES,
    Assessment,
    BoolArray,
    ErrorBox,
    ErrorView,
    FloatArray,
    MetricIntervals,
    Metrics,
    PredictionInterval,
    SliceQuality,
    Structure,
    StructureQuality,
    Unlikeness,
    Witnesses,
)
from segqc.volumes import Volume, temporary_labels, write_labels, write_scan
from tests.store_kit import bundle

if TYPE_CHECKING:
    import pytest
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

SHAPE = (32, 28, 10)
AFFINE = np.diag([1.5, 1.5, 4.0, 1.0])
STRUCTURES = (Structure("liver", (1,)), Structure("spleen", (4,)))
CONFIG = """
[structures]
liver = [1]
spleen = [4]

[inference]
backend = "pytorch"

[training]
epochs = 2
fold_epochs = 1
people_epochs = 1
steps_per_epoch = 2
folds = 2
gammas = []
mixed_precision = false
"""
"""Small trainings, in training and after it by the backend that is ready at once."""


CHECKED = (
    CONFIG
    + """
[boxes]
min_area_mm2 = 20

[annotation]
audit_share = 0.0
validation_share = 0.0
"""
)
"""Settings under which small errors in `draw_case`'s scans have boxes."""


def draw_case(index: int) -> tuple[Volume, Volume]:
    """A scan with two bright ellipsoids, and its label map."""
    rng = np.random.default_rng(index)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    labels = np.zeros(SHAPE, np.uint8)
    for value, centre in ((1, (-0.4, 0.0, 0.0)), (4, (0.5, 0.2, 0.1))):
        shift = np.asarray(centre) + rng.uniform(-0.1, 0.1, 3)
        labels[((grid - shift[:, None, None, None]) ** 2).sum(axis=0) < rng.uniform(0.1, 0.2)] = value
    image: FloatArray = (40.0 * (labels > 0) + 20.0 * (labels > 1) + rng.normal(0, 8, SHAPE)).astype(np.float32)
    return Volume(image, AFFINE), Volume(labels, AFFINE)


def write_segmentation(
    path: Path, segments: Sequence[str] = ("spleen", "liver"), renamed: Mapping[str, str] = MappingProxyType({})
) -> None:
    """The first case's label map as a ``.seg.nrrd`` with the values 1, 2, ...; what is no structure has no voxel."""
    truth = draw_case(0)[1].array
    array = np.zeros(SHAPE, np.uint8)
    header = {"space": "right-anterior-superior", "space directions": AFFINE[:3, :3], "space origin": [0, 0, 0]}
    value_of = {s.name: s.values[0] for s in STRUCTURES}
    for number, name in enumerate(segments, 1):
        array[truth == value_of.get(name, 255)] = number
        header |= {f"Segment{number - 1}_ID": name, f"Segment{number - 1}_Name": renamed.get(name, name)}
        header |= {f"Segment{number - 1}_LabelValue": str(number), f"Segment{number - 1}_Layer": "0"}
    nrrd.write(str(path), array, header)


def make_dataset(folder: Path, scans: int = 4, finals: int = 1, config: str = CONFIG) -> Path:
    """A dataset folder of ``scans`` scans named scan_0, scan_1, ..., the first ones with final labels."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "segqc.toml").write_text(config)
    for i in range(scans):
        scan, labels = _case_files(i)
        (folder / f"scan_{i}.nii.gz").write_bytes(scan)
        if i < finals:
            final = folder / "labels" / "final" / f"scan_{i}.nii.gz"
            final.parent.mkdir(parents=True, exist_ok=True)
            final.write_bytes(labels)
    return folder


@functools.cache
def _case_files(index: int) -> tuple[bytes, bytes]:
    """The files of `draw_case`'s scan and label map, which hundreds of tests want."""
    scan, labels = draw_case(index)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.nii.gz"
        write_scan(scan, path)
        content = path.read_bytes()
        write_labels(labels, path)
        return content, path.read_bytes()


def save_models(
    folder: Path,
    structures: tuple[Structure, ...] = STRUCTURES,
    report: ReportCard | None = None,
    *,
    people: bool = False,
    people_report: ReportCard | None = None,
) -> dict[NetworkName, Path]:
    """Files of untrained networks; SegQC-Net with report cards and a network for people's masks, where wanted."""
    folder.mkdir(parents=True, exist_ok=True)
    if report is not None or people_report is not None:
        return _save_models(folder, structures, report, people_report, people=people)
    files: dict[NetworkName, Path] = {}
    for kind, content in _model_files(structures, people=people).items():
        files[kind] = folder / model_name(kind)
        files[kind].write_bytes(content)
    return files


@functools.cache
def _model_files(structures: tuple[Structure, ...], *, people: bool) -> dict[NetworkName, bytes]:
    """The files of `save_models`, without report cards."""
    with tempfile.TemporaryDirectory() as folder:
        files = _save_models(Path(folder), structures, None, None, people=people)
        return {kind: path.read_bytes() for kind, path in files.items()}


def tiny_plan(in_channels: int, out_channels: int) -> NetworkPlan:
    """The plan of networks for `draw_case`'s scans, with few weights: tests load them a thousand times."""
    plan = plan_network((1.5, 1.5, 4.0), SHAPE, in_channels=in_channels, out_channels=out_channels)
    return replace(plan, filters=(4, 8, 16))


def _save_models(
    folder: Path,
    structures: tuple[Structure, ...],
    report: ReportCard | None,
    people_report: ReportCard | None,
    *,
    people: bool,
) -> dict[NetworkName, Path]:
    values = tuple(value for structure in structures for value in structure.values)
    kinds: tuple[tuple[NetworkName, int, int], ...] = (
        ("segmentation", 1, 1 + len(values)),
        ("segqc", 1 + len(structures), len(structures)),
    )
    files: dict[NetworkName, Path] = {}
    for kind, channels, outputs in kinds:
        plan = tiny_plan(channels, outputs)
        own = report if kind == "segqc" else None
        card = ModelCard(kind, plan, structures, values, seen=("scan_0",), scores={"dice": 0.5}, report=own)
        network = build_network(plan, seed=1)
        files[kind] = folder / model_name(kind)
        model: Segmenter | Assessor = Segmenter(card, network) if kind == "segmentation" else Assessor(card, network)
        if people and isinstance(model, Assessor):
            own_card = replace(card, plan=replace(plan, mask_skip=True), report=people_report)
            model = model.with_people(Assessor(own_card, build_network(own_card.plan, seed=2)))
        model.save(files[kind])
    return files


def add_models(
    folder: Path,
    structures: tuple[Structure, ...] = STRUCTURES,
    report: ReportCard | None = None,
    *,
    people: bool = False,
    people_report: ReportCard | None = None,
) -> int:
    """Publish untrained networks; the bundle's number."""
    dataset = Dataset(folder)
    with dataset.bundles.workspace() as work:
        files = save_models(work, structures, report, people=people, people_report=people_report)
        return dataset.bundles.publish(files, SERVER, "a test")


def without_liver(case: int = 0, slices: tuple[int, ...] = (4, 5)) -> Volume:
    """A case's label map, in which the liver is missing in some slices."""
    truth = draw_case(case)[1]
    array = truth.array.copy()
    for index in slices:
        array[..., index][truth.array[..., index] == 1] = 0
    return Volume(array, truth.affine)


def knowing_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the error maps of untrained networks be those of `draw_case`'s scans: 0.9 where a mask is wrong."""
    cases = [draw_case(index) for index in range(4)]

    def error_maps(assessor: Assessor, scan: Volume, masks: BoolArray, plausible: BoolArray | None) -> object:
        truth = next(labels for image, labels in cases if np.allclose(image.array, scan.array, atol=1e-3))
        truths = np.stack([structure.mask(truth.array) for structure in assessor.structures])
        whole = tuple(slice(0, size) for size in scan.shape)
        return np.where(masks != truths, 0.9, 0.001).astype(np.float32), whole

    monkeypatch.setattr(Assessor, "_error_maps", error_maps)


def make_assessment(
    scan: str,
    dice: float,
    worst: int = 2,
    volume_ml: float = 5.0,
    half_width: float | None = None,
    witnesses: Witnesses = NO_WITNESSES,
    unlikeness: Unlikeness | None = None,
) -> Assessment:
    """An assessment of one structure with a given estimated Dice, and its worst slice and one box in it.

    With a half width, Dice, IoU and ARVD have intervals.
    """
    known = Metrics(dice, dice / (2 - dice), 0.1, 0.0)
    slices = tuple(SliceQuality(i, known, 50.0 if i == worst else float(i) / 10) for i in range(SHAPE[2]))
    boxes = (ErrorBox(worst, (3, 4), (9, 12), 108.0, 0.7, 0.9), ErrorBox(0, (1, 1), (2, 2), 2.25, 0.6, 0.6))
    view = ErrorView(known, slices, boxes)
    intervals = MetricIntervals()
    if half_width is not None:
        ends = (
            PredictionInterval(max(0.0, v - half_width), v + half_width, 0.9) for v in (dice, dice / (2 - dice), 0.1)
        )
        intervals = MetricIntervals(*ends).of_scan(unlikeness)
    quality = StructureQuality("liver", True, volume_ml, known, view, view, intervals, witnesses)
    return Assessment(scan, "0" * 64, "seg", "qc", 2, SHAPE, (1.5, 1.5, 4.0), (quality,), unlikeness=unlikeness)


def assess(
    dataset: Dataset,
    scan: str,
    dice: float,
    worst: int = 2,
    volume_ml: float = 5.0,
    mask: Volume | None = None,
    half_width: float | None = None,
    number: int | None = None,
    witnesses: Witnesses = NO_WITNESSES,
    unlikeness: Unlikeness | None = None,
) -> None:
    """A network's mask of a scan, and an assessment of it with a given estimated Dice, by a bundle without files.

    With a number, they are by the bundle of this number.
    """
    number = bundle(dataset.store, "seg", "qc").id if number is None else number
    network = Actor(kind="network", name="seg", identified_by="program")
    label = NewLabel(scan, "original", "network", network, bundle=number)
    with temporary_labels(mask or draw_case(0)[1]) as path:
        kept = dataset.store.save_label(label, path)
    made = make_assessment(scan, dice, worst, volume_ml, half_width, witnesses, unlikeness)
    dataset.write_assessment(made, kept, number)


@contextlib.contextmanager
def application(folder: Path, *, sign_in: bool = False) -> Iterator[FastAPI]:
    """The application of a folder; MONAI Label's settings are as they were afterwards."""
    from monailabel.config import settings
    from monailabel.interfaces.utils.app import clear_cache

    from segqc.server.serve import default_app_dir

    saved = settings.model_dump()
    clear_cache()
    settings.MONAI_LABEL_APP_DIR = str(default_app_dir())
    settings.MONAI_LABEL_STUDIES = str(folder)
    settings.MONAI_LABEL_SESSION_PATH = str(folder / "segqc" / "sessions")
    settings.MONAI_LABEL_APP_CONF = {"bootstrap": "false", "sign_in": str(sign_in).lower()}
    try:
        from segqc.server.app import create_app

        yield create_app()
    finally:
        clear_cache()
        for name, value in saved.items():
            setattr(settings, name, value)


@contextlib.contextmanager
def serving(folder: Path, *, sign_in: bool = False) -> Iterator[TestClient]:
    """A client of the application of a folder, in this process."""
    from fastapi.testclient import TestClient

    with application(folder, sign_in=sign_in) as app, TestClient(app, raise_server_exceptions=False) as client:
        yield client


@contextlib.contextmanager
def listening(folder: Path, *, sign_in: bool = False) -> Iterator[str]:
    """The address of a server in a thread of this process, for clients that open connections of their own."""
    import uvicorn

    from segqc.server.connection import Connection

    with application(folder, sign_in=sign_in) as app, socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, http=Connection, ws="none", log_config=None, proxy_headers=False))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            # the kernel keeps connections until the application is ready to answer them
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
