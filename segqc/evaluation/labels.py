"""The evaluation of a dataset folder's own networks on masks of known truth: what is judged, and by whom.

Nothing is trained. A folder keeps each scan's judged masks, so that a run that was interrupted continues::

    labels/run.json      folders, networks, settings: another evaluation is refused in the same folder
    labels/masks/        the judged masks of each scan, by the content of scan and labels
    labels/result.json   all of them
    labels/report/       report.html, and the same as CSV, Markdown and LaTeX
"""

from __future__ import annotations

import datetime
import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from segqc.errors import sentence
from segqc.evaluation.data.cohort import TEST, CohortError, read_labelled
from segqc.evaluation.data.run import in_processes
from segqc.evaluation.data.storage import as_json
from segqc.evaluation.experiments.labels import BundleNetworks, JudgedMask, judge_scan
from segqc.loop.agreement import find_labels
from segqc.loop.audit import missing_network
from segqc.loop.dataset import Dataset
from segqc.loop.readers import whole_readings
from segqc.networks.bundle import NetworkBundle
from segqc.networks.device import name_of_device
from segqc.networks.model_file import ModelError
from segqc.progress import Progress
from segqc.quality.boxes import BoxSettings
from segqc.quality.error_maps import ExtractionSettings
from segqc.settings import Settings
from segqc.store import scans
from segqc.training.cases import Case, read_case
from segqc.types import LabelArray
from segqc.volumes import VolumeError, atomic_write, read_labels
from segqc.volumes.intake import content_sha256

QUICK_SCANS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSettings:
    """What the numbers of an evaluation depend on, beside networks and scans.

    Attributes:
        seed: decides what is implanted and drawn.
        min_error_mm2: the smallest box of a true error that is to be found.
        max_scans: at most so many scans are judged, drawn at random; None for all.
    """

    seed: int = 0
    min_error_mm2: float = 100.0
    max_scans: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelDescription:
    """What a run is of: folders, networks by their versions, and settings."""

    dataset: str
    on: str | None
    observers: str | None
    bundle: int
    segmenter: str
    assessor: str
    folds: str
    settings: LabelSettings
    extraction: ExtractionSettings
    boxes: BoxSettings


@dataclass(frozen=True, slots=True)
class LabelRun:
    """A run folder, what it is of, and the settings of the folder whose networks judge; processes share it."""

    folder: Path
    description: LabelDescription
    settings: Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelsResult:
    """All judged masks of a run.

    Attributes:
        date, machine: when and where they were judged.
        dataset: the name of the folder whose networks judge.
        on: the name of the folder whose labels are judged, where it is another one.
        bundle: the number of the bundle that judges.
        settings: see `LabelSettings`.
        remarks: what a reader should know of them, a sentence each.
        masks: the masks.
    """

    date: str
    machine: str
    dataset: str
    on: str | None
    bundle: int
    settings: LabelSettings
    remarks: tuple[str, ...]
    masks: tuple[JudgedMask, ...]


@dataclass(frozen=True, slots=True)
class LabelledScan:
    """A labelled scan with other observers' label files of it, and whose it is by the networks' names of patients."""

    case: Case
    patient: str

    def __str__(self) -> str:
        return self.case.id


@dataclass(frozen=True, slots=True)
class _JudgedScan:
    """The judged masks of a scan, or why there are none; and why other observers' labels of it are left out."""

    masks: tuple[JudgedMask, ...]
    problem: str | None = None
    unread: tuple[str, ...] = ()


RESULTS: TypeAdapter[LabelsResult] = TypeAdapter(LabelsResult)
_RESULT = as_json(RESULTS)
_DESCRIPTIONS: TypeAdapter[LabelDescription] = TypeAdapter(LabelDescription)
_SCAN = as_json(TypeAdapter(_JudgedScan))


def evaluate_labels(
    dataset: Dataset,
    out: Path,
    progress: Progress,
    *,
    on: Path | Sequence[Case] | None = None,
    observers: Path | None = None,
    settings: LabelSettings | None = None,
    workers: int = 1,
) -> LabelsResult:
    """Judge masks of labelled scans by the networks that serve, or by those of them that have not seen the patient.

    Args:
        dataset: the folder whose networks judge.
        out: the run folder; what it holds is not done again.
        progress: reports after each scan.
        on: the labelled scans: a data set, of which only the test side counts where it has a split, or a dataset
            folder, or cases; by default the folder's own final labels.
        observers: a folder of other observers' label files, named as the scans.
        settings: what else the numbers depend on.
        workers: parallel processes.

    Raises:
        ModelError: if the folder's bundle lacks a network.
        CohortError: if nothing can be judged, or the run folder holds another evaluation.
        DatasetError: if ``on`` is no data set.
    """
    settings = settings or LabelSettings()
    bundle = _bundle(dataset)
    named_on = on if isinstance(on, Path) else None
    networks = BundleNetworks(bundle, dataset.training_folder("segqc"))
    found = _labelled_scans(dataset, on, observers)
    judged = [scan for scan in found if networks.unseen_by(scan.patient) is not None]
    if not judged:
        raise CohortError(_nothing_to_judge(dataset, named_on, found))
    description = _description(dataset, bundle, named_on, observers, settings)
    run = LabelRun(_open(out, description), description, dataset.settings)
    remarks = _remarks(networks, judged, is_own=on is None)
    if seen := len(found) - len(judged):
        left_out = "1 scan is" if seen == 1 else f"{seen} scans are"
        remarks.append(f"{left_out} left out, as every network has trained from the patient's labels.")
    if settings.max_scans is not None and len(judged) > settings.max_scans:
        drawn = np.random.default_rng((settings.seed, 2)).permutation(len(judged))[: settings.max_scans]
        remarks.append(f"{settings.max_scans} of {len(judged)} scans were drawn: the numbers mean little.")
        judged = [judged[int(i)] for i in sorted(drawn)]
    left = [scan for scan in judged if _kept(run, scan) is None]
    if left:
        _loaded[run.folder] = networks
        try:
            in_processes(run, judge_labelled_scan, left, progress, workers=workers, unit="scans")
        finally:
            del _loaded[run.folder]
    masks: list[JudgedMask] = []
    for scan in judged:
        kept = _SCAN.load(_path(run, scan))
        masks += kept.masks
        if kept.problem is not None:
            remarks.append(f"{scan} is left out: {sentence(kept.problem)}")
        remarks += [f"A second observer's label of {scan} is left out: {sentence(reason)}" for reason in kept.unread]
    if not masks:
        raise CohortError(f"{named_on or dataset.folder}: no scan could be judged; {remarks[-1]}")
    result = LabelsResult(
        date=datetime.date.today().isoformat(),
        machine=f"{platform.machine()}, {platform.system()}, {name_of_device()}",
        dataset=dataset.folder.name,
        on=None if named_on is None else named_on.resolve().name,
        bundle=bundle.number,
        settings=settings,
        remarks=tuple(remarks),
        masks=tuple(masks),
    )
    path = run.folder / "result.json"
    if path.is_file():
        before = _RESULT.load(path)
        if replace(result, date=before.date, machine=before.machine) == before:
            return before
    _RESULT.save(result, path)
    return result


def judge_labelled_scan(run: LabelRun, scan: LabelledScan) -> None:
    """Judge the masks of a scan and keep them; one bad file must not keep all other scans from being judged."""
    try:
        judged = _judged(run, scan)
    except (VolumeError, OSError) as error:
        judged = _JudgedScan((), str(error))
    _SCAN.save(judged, _path(run, scan))


def _judged(run: LabelRun, scan: LabelledScan) -> _JudgedScan:
    networks = _networks(run)
    unseen = networks.unseen_by(scan.patient)
    assert unseen is not None  # others are left out before
    image, truth = read_case(scan.case, networks.values)
    expert = np.asarray(truth.array, np.uint8)
    observers: list[LabelArray] = []
    unread: list[str] = []
    for path in scan.case.observers:
        try:
            observer = np.asarray(read_labels(path, scan=image, values=networks.values).array, np.uint8)
        except (VolumeError, OSError) as error:
            unread.append(str(error))
            continue
        if not np.array_equal(observer, expert):  # the reader whose label became the final one
            observers.append(observer)
    settings = run.description.settings
    masks = judge_scan(
        unseen, scan.case.id, scan.patient, image, expert, observers,
        seed=settings.seed, min_error_mm2=settings.min_error_mm2,
    )  # fmt: skip
    return _JudgedScan(masks, unread=tuple(unread))


def _networks(run: LabelRun) -> BundleNetworks:
    """The networks of a run's bundle, loaded once in a process."""
    if run.folder not in _loaded:
        dataset = Dataset(Path(run.description.dataset), run.settings, watched=True)
        bundle = dataset.bundles.open(run.description.bundle)
        _loaded[run.folder] = BundleNetworks(bundle, dataset.training_folder("segqc"))
    return _loaded[run.folder]


_loaded: dict[Path, BundleNetworks] = {}  # by run folder


# ------------------------------------------------------------------------------------------------------ the run folder


def _open(out: Path, description: LabelDescription) -> Path:
    """Begin a run, or continue the one that the folder holds; returns where it keeps its files.

    Raises:
        CohortError: if it holds another one, or is no folder.
    """
    folder, path = out.resolve() / "labels", out / "labels" / "run.json"
    if any(part.exists() and not part.is_dir() for part in (out, folder)):
        raise CohortError(f"{out}: is no folder; name another run folder with --out")
    if path.is_file():
        try:
            found = _DESCRIPTIONS.validate_json(path.read_bytes())
        except ValidationError as error:
            raise CohortError(f"{path}: is no description of an evaluation; name another run folder") from error
        if found != description:
            raise CohortError(
                f"{out}: holds an evaluation of other labels, networks or settings (see labels/run.json); name another "
                "run folder with --out"
            )
        return folder
    with atomic_write(path) as temporary:
        temporary.write_bytes(_DESCRIPTIONS.dump_json(description, indent=1) + b"\n")
    return folder


def _description(
    dataset: Dataset, bundle: NetworkBundle, on: Path | None, observers: Path | None, settings: LabelSettings
) -> LabelDescription:
    networks = bundle.manifest.networks
    return LabelDescription(
        dataset=str(dataset.folder),
        on=None if on is None else str(on.resolve()),
        observers=None if observers is None else str(observers.resolve()),
        bundle=bundle.number,
        segmenter=networks["segmentation"].version,
        assessor=networks["segqc"].version,
        folds=bundle.folds_version() or "",
        settings=settings,
        extraction=dataset.settings.extraction,
        boxes=dataset.settings.boxes,
    )


def _path(run: LabelRun, scan: LabelledScan) -> Path:
    """Where a scan's masks are kept: another file for another scan, label or observer."""
    contents = [scan.case.content or content_sha256(scan.case.scan), scan.patient]
    contents += map(_content, (scan.case.labels, *scan.case.observers))
    key = hashlib.sha256(" ".join(contents).encode()).hexdigest()[:16]
    return run.folder / "masks" / f"{scan.case.id}-{key}.json"


def _content(path: Path) -> str:
    """What a label file holds; a file that can't be read, which is told where the scan is judged, has no content."""
    try:
        return content_sha256(path)
    except OSError:
        return ""


def _kept(run: LabelRun, scan: LabelledScan) -> _JudgedScan | None:
    """What was judged in an earlier run; None where nothing was, or it could not be."""
    path = _path(run, scan)
    kept = _SCAN.load(path) if path.is_file() else None
    return kept if kept is not None and kept.problem is None else None


# ------------------------------------------------------------------------------------------------------- what is judged


def _bundle(dataset: Dataset) -> NetworkBundle:
    """The bundle that serves.

    Raises:
        ModelError: if there is none, or it has not both networks, that for people's masks and those of the folds.
    """
    bundle = dataset.bundle()
    problem = missing_network(bundle)
    if bundle is None or problem is not None:
        raise ModelError(problem or f"{dataset.folder}: no networks serve")
    for network in ("segmentation", "segqc"):
        bundle.verify(network)
    return bundle


def _labelled_scans(dataset: Dataset, on: Path | Sequence[Case] | None, observers: Path | None) -> list[LabelledScan]:
    with dataset.store.read() as transaction:
        patients = {s.sha256: s.patient for s in scans.listing(transaction) if s.sha256 is not None}
    readers: Mapping[str, tuple[Path, ...]] = {}
    if on is None or isinstance(on, Path):
        if on is not None and not any((on / name).is_dir() for name in ("images", "labels/final")):
            raise CohortError(f"{on}: is no data set (images/, labels/), and no dataset folder with final labels")
        labelled = read_labelled(dataset.folder if on is None else on, {})
        if on is None or not (on / "images").is_dir():
            readers = whole_readings(dataset if on is None else Dataset(on))
        cases = labelled.sides.get(TEST, labelled.cases)
    else:
        cases = list(on)
    found = []
    for case in sorted(cases, key=lambda c: c.id):
        others = readers.get(case.id, ())
        if observers is not None and (other := find_labels(observers, case.id)) is not None:
            others = (*others, other)
        # a scan that the networks know under another name is their patient's
        patient = patients.get(case.content or content_sha256(case.scan), case.patient)
        found.append(LabelledScan(replace(case, observers=others), patient))
    if observers is not None and all(find_labels(observers, scan.case.id) is None for scan in found):
        raise CohortError(f"{observers}: no label file is named as a labelled scan")
    return found


def _nothing_to_judge(dataset: Dataset, on: Path | None, found: Sequence[LabelledScan]) -> str:
    if not found:
        return f"{on or dataset.folder}: has no label that was checked as a whole; label scans first"
    return (
        f"{on or dataset.folder}: every network has trained from all labels there; with ensemble = true in [training] "
        "one of each fold has not, or name other labelled scans with --on"
    )


def _remarks(networks: BundleNetworks, judged: Sequence[LabelledScan], *, is_own: bool) -> list[str]:
    remarks = []
    if is_own:
        remarks.append(
            "Each scan was judged by those networks of the folds that have not trained from its patient's labels, and "
            "its served mask is that of such a fold's network. What little calibrates estimates and intervals was "
            "fitted on these patients, too: only scans that are new to the networks (--on) are free of that."
        )
    unseen = [networks.unseen_by(scan.patient) for scan in judged]
    if not any(of is not None and of.strange for of in unseen):
        remarks.append(
            "There are no masks of strange networks: no other network of the bundle is new to these patients, and the "
            "checkpoints of SegQC-Net's training, with the folds' networks at early epochs, are gone."
        )
    if not any(scan.case.observers for scan in judged):
        remarks.append("There are no masks of a second observer: nobody else has read these scans (--observers).")
    return remarks
