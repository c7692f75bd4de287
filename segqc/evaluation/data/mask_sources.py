"""Networks that make masks, and the masks that are assessed: fixed in a manifest before any estimator is trained.

Networks that make test masks make no training masks (method, "Leaks").
"""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from pydantic import TypeAdapter

from segqc.evaluation.data.cohort import CohortError
from segqc.evaluation.data.manifest import MANIFESTS, Manifest, MaskSource, Selection, TestMask
from segqc.evaluation.data.predictions import KnownMask
from segqc.evaluation.data.run import NETWORKS, Run, parallel_map
from segqc.evaluation.data.storage import ARRAYS, Arrays, Format, as_json
from segqc.evaluation.methods.estimates import AssessedMask
from segqc.loop.agreement import find_labels
from segqc.loop.dataset import Dataset
from segqc.networks.assessor import mask_sha256
from segqc.networks.plan import NetworkPlan, Triple
from segqc.networks.segmenter import Segmenter
from segqc.quality.error_maps import ExtractionSettings, difference, extract_errors
from segqc.quality.metrics import true_metrics
from segqc.split import PatientSplit
from segqc.store import corrections, labels
from segqc.store.database import Transaction
from segqc.store.records import CorrectionRecord
from segqc.training import LineProgress, Progress
from segqc.training.cases import Case, label_values, load_example, read_case
from segqc.training.crossfit import MaskSet, assert_unseen, at_weights, early_epochs, stored_masks, train_mask_sources
from segqc.training.engine import fit
from segqc.training.segmentation import plan_for, segmentation_job, segmenter_of, train_segmentation
from segqc.types import BoolArray, LabelArray, segment_names
from segqc.volumes import Volume, read_labels, through_plane_axis, write_labels

SERVED = "served"
CORRECTIONS = "corrections"
CALIBRATION = "calibration"
TEST_MASKS = "test-masks"
CANDIDATES = f"{TEST_MASKS}/candidates"
UNKNOWN_SOURCE = ""
VALIDATING = 6  # cases that choose the best epoch of a test source network
EARLY_SHARE = 0.5  # a test source network's early epoch is drawn from the first part of its training


SourceKind: TypeAlias = Literal["test", "served", "fold", "calibration"]

_MANIFEST = as_json(MANIFESTS)
_CANDIDATES: Format[tuple[TestMask, ...]] = as_json(TypeAdapter(tuple[TestMask, ...]))
_SEGMENTER: Format[Segmenter] = Format(Segmenter.load, Segmenter.save)


@dataclass(frozen=True, slots=True)
class SourceTraining:
    """A training whose networks make masks.

    Attributes:
        kind: test masks; the served network; the training masks, or the calibrating masks, of a fold.
        number: of the training among those of test masks, or of the fold.
    """

    kind: SourceKind
    number: int = 0

    def __str__(self) -> str:
        match self.kind:
            case "test":
                return f"test-{self.number:02d}"
            case "served":
                return SERVED
            case _:
                return f"{self.kind}-{self.number}"


@dataclass(frozen=True, slots=True)
class TestSource:
    """A network that makes stratified test masks: a training at its best epoch, or at a random early one."""

    __test__ = False  # not a test, whatever pytest thinks of the name

    training: SourceTraining
    early: bool

    def __str__(self) -> str:
        return f"{self.training}-{'early' if self.early else 'best'}"


def source_path(run: Run, source: str) -> Path:
    """The model file of a network that makes masks."""
    return run.folder / "mask-sources" / f"{source}.pt"


def test_mask_path(run: Run, mask: TestMask) -> Path:
    """The file of a mask that is assessed."""
    return run.folder / TEST_MASKS / f"{mask.id}.nii.gz"


def test_trainings(run: Run) -> list[SourceTraining]:
    """The trainings whose networks make the stratified test masks."""
    return [SourceTraining("test", k) for k in range(run.settings.test_sources)]


def stratified_masks(run: Run, progress: Progress) -> Manifest:
    """The stratified masks of the test scans (method, "Stratified data"): made once, then read from the manifest."""
    trainings = test_trainings(run)
    parallel_map(run, train_source, trainings, progress)
    sources = tuple(TestSource(training, early) for training in trainings for early in (False, True))

    def make() -> Manifest:
        parallel_map(run, make_candidates, sources, progress)
        return _choose(run, sources)

    manifest = run.cached("test-masks/manifest.json", _MANIFEST, make)
    shutil.rmtree(run.folder / CANDIDATES, ignore_errors=True)
    return manifest


def make_candidates(run: Run, source: TestSource) -> tuple[TestMask, ...]:
    """A network's masks of all test scans, which the manifest chooses from: made once, then read."""

    def make() -> tuple[TestMask, ...]:
        segmenter = Segmenter.load(source_path(run, str(source)))
        for case in run.cohort.test:
            assert_unseen(segmenter, case)
        folder = run.folder / CANDIDATES
        return tuple(_write_mask(folder, case, str(source), segmenter, early=source.early) for case in run.cohort.test)

    return run.cached(f"{CANDIDATES}/{source}.json", _CANDIDATES, make)


def check_masks(run: Run, manifest: Manifest) -> None:
    """Compare the mask files, and the networks where they are still there, with the manifest.

    Raises:
        CohortError: if a mask's or a network's content is not what the manifest says.
    """
    for network in manifest.networks:
        path = source_path(run, network.name)
        if path.is_file() and Segmenter.load(path).version != network.version:
            raise CohortError(f"{path}: is not the network of the manifest; start a new run folder")
    for mask in manifest.masks:
        if mask_sha256(read_labels(test_mask_path(run, mask))) != mask.sha256:
            raise CohortError(f"{test_mask_path(run, mask)}: is not the mask of the manifest; start a new run folder")


def own_masks(run: Run, progress: Progress) -> Manifest:
    """The served network's own masks of the test scans: what a user would see."""
    segmenter = served_source(run, progress)

    def make() -> Manifest:
        masks = []
        for i, case in enumerate(run.cohort.test):
            progress.step(i, len(run.cohort.test), "masks of the served network")
            masks.append(_write_mask(run.folder / TEST_MASKS, case, SERVED, segmenter))
        return Manifest(
            run.settings.seed,
            (0.0, 1.01),
            len(masks),
            (SERVED,),
            tuple(masks),
            networks=mask_sources_of(run, [SERVED]),
            after_training=_methods_are_trained(run),
        )

    return run.cached("test-masks/served.json", _MANIFEST, make)


def correction_masks(run: Run, progress: Progress) -> Manifest:
    """Masks whose truths are corrections of them (the paper's D_corr).

    The masks of the folder that the run names; else, in a dataset folder, those that people corrected; else the served
    network's own, corrected by a simulated annotator.
    """

    def make() -> Manifest:
        real = list(_corrected_by_people(run))
        if real:
            selection = _selection(run)
            return Manifest(
                run.settings.seed,
                (0.0, 1.01),
                len(real),
                (UNKNOWN_SOURCE,),
                tuple(real),
                "real",
                selection,
                after_training=_methods_are_trained(run),
            )
        own = own_masks(run, progress)
        masks = tuple(_simulate(run, mask) for mask in own.masks)
        return replace(own, masks=masks, corrections="simulated", after_training=_methods_are_trained(run))

    return run.cached("test-masks/corrections.json", _MANIFEST, make)


def truth_of(run: Run, mask: TestMask, case: Case) -> Path:
    """The file of a mask's truth: its simulated correction where there is one, else the case's label."""
    simulated = run.folder / TEST_MASKS / "simulated" / f"{mask.id}.nii.gz"
    return simulated if simulated.is_file() else case.labels


def simulated_correction(mask: LabelArray, truth: LabelArray, scan: Volume, settings: ExtractionSettings) -> LabelArray:
    """What an annotator makes of a mask who corrects errors and leaves observer variability alone (paper, 3.3).

    Args:
        mask: the label map (n0, n1, n2).
        truth: what is true.
        scan: for spacing and axis.
        settings: what is an error.
    """
    axis, corrected = through_plane_axis(scan), mask.copy()
    for value in np.union1d(np.unique(mask), np.unique(truth)):
        if value:
            wrong = extract_errors(
                difference(mask == value, truth == value), mask == value, axis, scan.spacing_mm, settings
            )
            corrected[wrong] = truth[wrong]
    return corrected


def _corrected_by_people(run: Run) -> Iterator[TestMask]:
    cases = {c.id: c for c in run.cohort.test}
    if run.description.masks is not None:
        folder = Path(run.description.masks)
        starts = {name: path for name in cases if (path := find_labels(folder, name)) is not None}
        if not starts:
            raise CohortError(f"{folder}: no label file is named as one of the {len(cases)} test scans")
    elif (Path(run.description.dataset) / "images").is_dir():
        return
    else:
        starts = _starts_in_store(Dataset(Path(run.description.dataset)), cases)
    named = segment_names(run.cohort.structures)
    for name, path in sorted(starts.items()):
        case = cases[name]
        scan, truth = read_case(case, label_values(run.cohort.structures))
        mask = read_labels(path, scan=scan, values=label_values(run.cohort.structures), names=named)
        yield _record(run.folder / TEST_MASKS, case, CORRECTIONS, UNKNOWN_SOURCE, mask, truth)


def _starts_in_store(dataset: Dataset, cases: Mapping[str, Case]) -> dict[str, Path]:
    """The mask that each scan's latest correction of the whole scan by a person started from."""
    with dataset.store.read() as transaction:
        found = _finished_corrections(transaction, cases)
        return {c.scan: dataset.store.label_file(labels.get(transaction, c.from_version)) for c in found}


def _finished_corrections(transaction: Transaction, cases: Collection[str]) -> list[CorrectionRecord]:
    """People's corrections of whole scans whose result is the scan's final label today: neither rejected nor redone."""
    final = {name: current.id for name, current in labels.current_of_all(transaction, labels.FINAL).items()}
    return [
        c for c in corrections.listing(transaction)
        if c.scan in cases and not c.simulated and c.change.opened_slices is None and c.to_version == final.get(c.scan)
    ]  # fmt: skip


def _selection(run: Run) -> Selection:
    """How the scans with people's corrections were chosen: at random, if all were audit draws."""
    if run.description.masks is not None:
        return "all"
    with Dataset(Path(run.description.dataset)).store.read() as transaction:
        found = _finished_corrections(transaction, {c.id for c in run.cohort.test})
    audited = all(c.lease is not None and c.lease.draw == "audit" for c in found)
    return "random" if audited else "worst-first"


def _simulate(run: Run, own: TestMask) -> TestMask:
    case = next(c for c in run.cohort.test if c.id == own.case)
    scan, truth = read_case(case, label_values(run.cohort.structures))
    mask = read_labels(test_mask_path(run, own), scan=scan)
    corrected = simulated_correction(
        np.asarray(mask.array, np.uint8), np.asarray(truth.array, np.uint8), scan, run.settings.annotator
    )
    after = Volume(corrected, scan.affine, scan.acquisition_axis)
    path = run.folder / TEST_MASKS / "simulated" / f"{own.case}-{CORRECTIONS}.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_labels(after, path)
    return _record(run.folder / TEST_MASKS, case, CORRECTIONS, SERVED, mask, after)


def train_source(run: Run, training: SourceTraining) -> None:
    """Train networks that make masks, or what is left of it."""
    match training.kind:
        case "test":
            test_sources(run, training)
        case "served":
            served_source(run, LineProgress())
        case "fold":
            fold_sources(run, training.number)
        case "calibration":
            calibration_sources(run, training.number)


def test_sources(run: Run, training: SourceTraining) -> list[Segmenter]:
    """A network trained on a random part of the training side: at its best and at a random early epoch.

    Every other one pools through the plane where the plan would not, or the other way round (the paper: with and
    without anisotropic pooling).
    """
    number, s = training.number, run.settings

    def make() -> list[Segmenter]:
        rng = np.random.default_rng((s.seed, 2, number))
        part = _random_part(run.cohort.train, rng)
        early = round(max(2, EARLY_SHARE * s.source_epochs) ** rng.uniform())  # masks change most at the start
        return _train_on_part(run, training, number, part, (early,))

    paths = [source_path(run, str(TestSource(training, early))) for early in (False, True)]
    return run.cached_all(paths, _SEGMENTER, make)


def calibration_sources(run: Run, fold: int) -> list[Segmenter]:
    """The networks that make the calibrating masks of a fold's cases: the best epoch first, then early ones.

    They are made as the test masks' networks are, but of patients of the other folds only, and make nothing else: every
    method is calibrated on masks of networks that are strange to it, as those are that it is tested on.
    """
    early = early_epochs(run.settings.source_epochs)
    training = SourceTraining("calibration", fold)

    def make() -> list[Segmenter]:
        part = _random_part(run.cohort.trained(fold), np.random.default_rng((run.settings.seed, 5, fold)))
        # their numbers follow those of the test masks' networks, which their seeds and pooling go by
        return _train_on_part(run, training, run.settings.test_sources + fold, part, early)

    paths = [source_path(run, f"{training}-{epoch}") for epoch in ("best", *early)]
    return run.cached_all(paths, _SEGMENTER, make)


@dataclass(frozen=True, slots=True)
class _Part:
    trained: list[Case]
    validating: list[Case]


def _random_part(cases: Sequence[Case], rng: np.random.Generator) -> _Part:
    """A fifth to three fifths of the cases to learn from, and a few others that choose the best epoch."""
    order = [cases[int(i)] for i in rng.permutation(len(cases))]
    few = min(VALIDATING, max(1, len(order) // 5))
    return _Part(order[few : few + max(2, round(rng.uniform(0.2, 0.6) * len(order)))], order[:few])


def _train_on_part(
    run: Run, training: SourceTraining, number: int, part: _Part, early: Sequence[int]
) -> list[Segmenter]:
    """Train a network of this number: at its best epoch, then at the early ones."""
    s, structures = run.settings, run.cohort.structures
    values = label_values(structures)
    settings = replace(s.segmenter, seed=1000 * (s.seed + 1) + number, patience=s.source_epochs)
    plan = plan_for(part.trained, settings, in_channels=1, out_channels=1 + len(values))
    if number % 2:
        plan = with_other_pooling(plan)
    job = segmentation_job(
        str(training),
        plan,
        values,
        [load_example(c, plan, values) for c in part.trained],
        [load_example(c, plan, values) for c in part.validating],
        settings,
        epochs=s.source_epochs,
        snapshots=tuple(early),
    )
    fitted = fit(job, run.folder / "mask-sources" / str(training), LineProgress())
    seen = [c.patient for c in (*part.validating, *part.trained)]
    best = segmenter_of(fitted, plan, structures, seen, settings)
    return [best, *(at_weights(best, fitted.snapshots[epoch]) for epoch in early)]


def with_other_pooling(plan: NetworkPlan) -> NetworkPlan:
    """The plan with pooling through the plane where it has none, and without it where it has some."""
    pooled = any(stride[2] > 1 for stride in plan.strides)
    through_plane = 1 if pooled else 2
    strides: list[Triple] = [(1, 1, 1), *((s[0], s[1], through_plane) for s in plan.strides[1:])]
    kernels: list[Triple] = [(k[0], k[1], 1 if pooled else 3) for k in plan.kernels]
    total = int(np.prod([plan.stem[2], *(s[2] for s in strides)]))
    depth = -(-plan.patch[2] // total) * total
    patch: Triple = (plan.patch[0], plan.patch[1], depth)
    return replace(plan, strides=tuple(strides), kernels=tuple(kernels), patch=patch)


def fold_sources(run: Run, fold: int) -> list[Segmenter]:
    """The networks that have not seen a fold's cases: the trained one first, then itself at early epochs."""
    cohort, settings = run.cohort, replace(run.settings.segmenter, seed=10 * (run.settings.seed + 1) + fold)
    early = early_epochs(settings.fold_epochs)
    training = SourceTraining("fold", fold)

    def make() -> list[Segmenter]:
        trained = cohort.trained(fold)
        plan = plan_for(trained, settings, in_channels=1, out_channels=1 + len(label_values(cohort.structures)))
        folder = run.folder / "mask-sources" / str(training)
        return train_mask_sources(
            f"fold {fold}", trained, cohort.structures, plan, settings, folder, LineProgress(), early=early
        )

    paths = [source_path(run, f"{training}-{epoch}") for epoch in (settings.fold_epochs, *early)]
    return run.cached_all(paths, _SEGMENTER, make)


def training_masks(run: Run, fold: int) -> list[MaskSet]:
    """The masks of a fold's cases that SegQC-Net may learn from: by networks that have not seen these cases."""
    sources, folder = fold_sources(run, fold), run.folder / "training-masks"
    return [stored_masks(sources, case, run.settings.segmenter, folder) for case in run.cohort.held(fold)]


def calibration_masks(run: Run, fold: int) -> Iterator[KnownMask]:
    """Masks of a fold's cases, by the networks that make calibrating masks only and have not seen them."""
    sources = calibration_sources(run, fold)
    for number, case in enumerate(run.cohort.held(fold)):
        assert_unseen(sources[0], case)
        chosen = calibrating_sources(len(sources), number)
        scan, truth = read_case(case, sources[0].values)
        made = functools.partial(_predicted_masks, [sources[m] for m in chosen], scan)
        masks = run.cached(f"training-masks/{CALIBRATION}/{case.id}.npz", ARRAYS, made)["masks"]
        for m, array in zip(chosen, masks, strict=True):
            labels = Volume(array, scan.affine, scan.acquisition_axis)
            assessed = AssessedMask(scan, labels, sources[m])
            yield KnownMask(f"{case.id}-{m}", case.patient, assessed, truth, early=m > 0)


def _predicted_masks(segmenters: Sequence[Segmenter], scan: Volume) -> Arrays:
    return {"masks": np.stack([segmenter.predict(scan).labels.array for segmenter in segmenters])}


def calibrating_sources(sources: int, number: int) -> list[int]:
    """Which networks make the calibrating masks of a fold's case of this number.

    The best one, and itself at two early epochs: other ones for the next case, so that all qualities come up.
    """
    early = sources - 1
    return [0, *sorted({1 + number % early, 1 + (number + (early + 1) // 2) % early})]


# ------------------------------------------------------------------------------------------------- the served network


def served_source(run: Run, progress: Progress) -> Segmenter:
    """The network whose own masks are assessed: trained on the whole training side, stopped early on a part of it."""
    cohort, settings = run.cohort, replace(run.settings.segmenter, seed=100 * (run.settings.seed + 1))
    patients = list(cohort.fold)
    validating = set(patients[: max(1, round(settings.validation_share * len(patients)))])
    placed = {p: PatientSplit(0, "validation" if p in validating else "train") for p in patients}
    folder = run.folder / "mask-sources" / SERVED

    def make() -> Segmenter:
        return train_segmentation(cohort.train, cohort.structures, placed, settings, folder, progress)

    return run.cached(source_path(run, SERVED), _SEGMENTER, make)


def _choose(run: Run, sources: Sequence[TestSource]) -> Manifest:
    """Of the masks of all networks up to `per_bin` in each Dice bin, scans that the bin does not have yet first."""
    s, candidates = run.settings, [mask for source in sources for mask in make_candidates(run, source)]
    names = tuple(str(source) for source in sources)
    rng, chosen = np.random.default_rng((s.seed, 3)), list[TestMask]()
    for low, high in itertools.pairwise(s.bins):
        inside = [m for m in candidates if low <= m.dice < high]
        inside = [inside[int(i)] for i in rng.permutation(len(inside))]
        seen: set[str] = set()
        first = [m for m in inside if not (m.case in seen or seen.add(m.case))]  # type: ignore[func-returns-value]
        chosen += (first + [m for m in inside if m not in first])[: s.per_bin]
    for mask in chosen:
        path = test_mask_path(run, mask)
        shutil.copyfile(run.folder / CANDIDATES / path.name, path)
    # masks of one scan follow each other: what is computed of the scan alone is then computed once
    chosen.sort(key=lambda m: (m.case, m.source))
    return Manifest(
        s.seed,
        s.bins,
        s.per_bin,
        names,
        tuple(chosen),
        selection="stratified",
        networks=mask_sources_of(run, names),
        after_training=_methods_are_trained(run),
    )


def _methods_are_trained(run: Run) -> bool:
    return any((run.folder / NETWORKS).glob("*/*"))


def mask_sources_of(run: Run, networks: Sequence[str]) -> tuple[MaskSource, ...]:
    """What to note of networks that make masks."""
    loaded = {name: Segmenter.load(source_path(run, name)) for name in networks}
    return tuple(MaskSource(name, segmenter.version, len(segmenter.card.seen)) for name, segmenter in loaded.items())


def _write_mask(folder: Path, case: Case, source: str, segmenter: Segmenter, *, early: bool = False) -> TestMask:
    """Write a network's mask of a case, and note what it is."""
    scan, truth = read_case(case, segmenter.values)
    return _record(folder, case, source, source, segmenter.predict(scan).labels, truth, early=early)


def _record(
    folder: Path, case: Case, kind: str, source: str, mask: Volume, truth: Volume, *, early: bool = False
) -> TestMask:
    """Write a mask as ``<case>-<kind>.nii.gz``, and note what it is."""
    name = f"{case.id}-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    write_labels(mask, folder / f"{name}.nii.gz")
    dice = true_metrics(_together(mask.array), _together(truth.array)).dice
    return TestMask(name, case.id, case.patient, source, 1.0 if dice is None else dice, mask_sha256(mask), early)


def _together(labels: LabelArray) -> BoolArray:
    return np.asarray(labels > 0)
