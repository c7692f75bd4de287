"""One unit of a study: an arm with a seed. The product itself trains, scores, hands out and keeps; see `run_unit`.

::

    <unit>/dataset/         a dataset folder like any other
    <unit>/unit.json        what was measured so far, a point for each round
"""

from __future__ import annotations

import datetime as dt
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from pydantic import TypeAdapter, ValidationError
from scipy import stats

from segqc.evaluation.simulation.annotator import correct, generator_of
from segqc.evaluation.simulation.study import Arm, Study, StudyError, plain_name
from segqc.loop.agreement import dice_by_structure, worst_dice
from segqc.loop.dataset import Dataset
from segqc.loop.locks import LockHeld, hold
from segqc.loop.prepare import labelled_pairs, prepare, scans_by_patient
from segqc.loop.requests import PUBLISH_STEP, RoundRequest, enqueue, request_of
from segqc.loop.round import run_round
from segqc.loop.scoring import current_mask, score
from segqc.loop.submission import submit_label
from segqc.loop.training import train
from segqc.networks.device import name_of_device
from segqc.selection import strategies
from segqc.store import corrections, jobs, labels, leases, pseudo_labels, rounds, scans
from segqc.store.labels import FINAL
from segqc.store.records import Actor, CorrectionRecord, JsonObject, LabelRecord, LeaseRecord
from segqc.training import Progress
from segqc.training.cases import TooFewCases
from segqc.types import LabelArray, Structure
from segqc.volumes import Volume, atomic_write, read_labels, read_scan, through_plane_axis

_ANNOTATOR: Final = Actor(kind="person", name="simulated annotator", identified_by="program")
_WORKER: Final = "simulation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What annotation has cost so far.

    Attributes:
        scans: that got a label.
        slices: that were opened.
        changed_slices: in which something was changed.
        voxels: that were changed.
        minutes: by the study's model.
    """

    scans: int
    slices: int
    changed_slices: int
    voxels: int
    minutes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A pseudo-label: the estimated Dice of its worst structure, its interval's lower end, and what is true."""

    scan: str
    estimated: float
    low: float | None
    true: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """The estimates of the masks that waited, of each scan's worst structure, against the truth."""

    scans: int
    mae: float
    constant_mae: float  # of the best constant, in hindsight
    spearman: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What a round has brought.

    Dice numbers are means over the structures.

    Attributes:
        cost: of all labels so far.
        share: of the pool's slices that were opened.
        test_dice: the served masks of the test scans, one number each, in the order of the unit's ``test_scans``.
        labels_dice: mean over the pool: final labels, else pseudo-labels, else the served masks.
        accepted: the pseudo-labels that trained in this round.
        estimates: None without SegQC-Net, or where nothing waits any more.
        is_held: whether the round's bundle was held, so that masks are of an earlier one.
        seconds: that the round took.
    """

    cost: Cost
    share: float
    test_dice: tuple[float, ...]
    labels_dice: float
    accepted: tuple[Accepted, ...] = ()
    estimates: Estimates | None = None
    is_held: bool = False
    seconds: float

    @property
    def mean_test_dice(self) -> float:
        """The mean over the test scans."""
        return float(np.mean(self.test_dice))


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What a unit has measured: the study it is of, and a point for each round.

    Attributes:
        study: the study, with this arm alone.
        arm: the arm's name.
        seed: the seed.
        all_slices: of the pool.
        test_scans: the names of the scans that masks are measured on.
        date, machine: when it was begun, and where.
        points: in order.
        is_done: whether all budgets are spent, or nothing is left to annotate.
    """

    study: Study
    arm: str
    seed: int
    all_slices: int
    test_scans: tuple[str, ...]
    date: str
    machine: str
    points: tuple[Point, ...] = ()
    is_done: bool = False


UNITS: Final[TypeAdapter[Unit]] = TypeAdapter(Unit)


def run_unit(study: Study, name: str, seed: int, data: Path, folder: Path, progress: Progress) -> Unit:
    """Run one unit, or what is left of it.

    Some scans of the pool are labelled; the product trains on them. Then, until a budget is spent, the strategy hands
    out a scan, the simulated annotator corrects its mask towards the truth, and submits it; at each budget there is a
    round, and the masks of the test scans are measured.

    Args:
        study: the study.
        name: the arm's name.
        seed: the seed.
        data: the data set: ``images/``, ``labels/`` and ``splits.json``.
        folder: the unit's own folder; a unit that was interrupted goes on there.
        progress: called after each step.

    Raises:
        StudyError: if there is no such arm, the folder holds another unit, another process runs it, or the data
            set has no test scans or too few others.
        DatasetError: if the data set can't be used.
        SettingsError: if the study's settings can't be used.
    """
    arm = study.arm(name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with hold(folder / "unit.lock", "segqc simulate"):
            return _Run(study, name, arm, seed, data, folder, progress).to_end()
    except LockHeld as held:
        raise StudyError(f"{folder}: is being run by {held.holder or 'another process'}") from held


def unit_folder(folder: Path, arm: str, seed: int) -> Path:
    """Where a study's folder keeps a unit."""
    return folder / "units" / f"{plain_name(arm)}-{seed}"


def left_units(study: Study, folder: Path) -> tuple[Unit, ...]:
    """The units that a study's folder holds, finished or not, also those of arms that are no longer in its file.

    Raises:
        StudyError: if one is of another study: their numbers can't be compared.
    """
    found = []
    for path in sorted((folder / "units").glob("*/unit.json")):
        unit = _read(path)
        known = study.model_copy(update={"arms": {**unit.study.arms, **study.arms}})
        if known.only(unit.arm, unit.seed) != unit.study:
            raise StudyError(_of_another(path.parent))
        found.append(unit)
    return tuple(found)


class _Run:
    """A unit that runs."""

    def __init__(
        self, study: Study, name: str, arm: Arm, seed: int, data: Path, folder: Path, progress: Progress
    ) -> None:
        self.study, self.arm, self.seed, self.progress = study, arm, seed, progress
        self.path = folder / "unit.json"
        pool, self.test = _truths(study, data)
        own = folder / "dataset"
        if not self.path.exists():  # nothing has been annotated
            shutil.rmtree(own, ignore_errors=True)
            prepare(
                data, own,
                labelled=study.start, unlabelled=min(len(pool), study.max_scans or len(pool)) - study.start,
                structures=study.structures, split=study.pool, seed=seed,
            )  # fmt: skip
        self.dataset = Dataset(own, study.settings_of(own, arm, seed))
        self.structures: tuple[Structure, ...] = self.dataset.structures
        self.truths = {entry.id: pool[entry.id].labels for entry in self.dataset.scans()}
        self.unit = Unit(
            study=study.only(name, seed),
            arm=name,
            seed=seed,
            all_slices=sum(map(_depth, self.truths.values())),
            test_scans=tuple(self.test),
            date=dt.datetime.now(dt.UTC).date().isoformat(),
            machine=f"{name_of_device()}, {platform.machine()}",
        )
        if self.path.exists():
            self.unit = _continued(self.unit, self.path)
        else:
            self._write()

    def to_end(self) -> Unit:
        """Annotate and train until all budgets are spent."""
        while not self.unit.is_done:
            budget = self.study.budgets[len(self.unit.points)]
            is_last = budget == self.study.budgets[-1]
            is_empty = self._annotate(budget)
            point = self._point()
            self.unit = replace(self.unit, points=(*self.unit.points, point), is_done=is_last or is_empty)
            self._write()
        return self.unit

    def _write(self) -> None:
        with atomic_write(self.path) as temporary:
            temporary.write_bytes(UNITS.dump_json(self.unit, indent=1) + b"\n")

    def _point(self) -> Point:
        """What a round brings; where a budget was spent already there is none, and all is as it was."""
        if self.unit.points and self._cost() == self.unit.points[-1].cost:
            return replace(self.unit.points[-1], accepted=(), seconds=0.0)
        begun = time.perf_counter()
        try:
            is_held = self._round()
        except TooFewCases as error:
            raise StudyError(f"{self.dataset.folder}: {error.clause}; a larger 'start' or first budget does") from error
        return self._measured(time.perf_counter() - begun, is_held=is_held)

    def _annotate(self, budget: float) -> bool:
        """Correct what is handed out until a budget is spent; whether nothing is left."""
        strategy = strategies()[self.arm.strategy]
        rules = self.dataset.settings.annotation
        while (cost := self._cost()).slices < budget * self.unit.all_slices:
            with self.dataset.store.write() as transaction:
                lease = leases.acquire(transaction, _ANNOTATOR, strategy.name, strategy.order, rules)
            if lease is None:
                return True
            self.progress.step(cost.slices, self.unit.all_slices, "annotating", lease.scan, unit="slices")
            self._correct(lease)
        return not self.dataset.waiting()

    def _correct(self, lease: LeaseRecord) -> None:
        truth, mask = self.truths[lease.scan], np.zeros(self.truths[lease.scan].shape, np.uint8)
        if lease.label_version is not None:
            with self.dataset.store.read() as transaction:
                start = labels.get(transaction, lease.label_version)
            mask = np.asarray(self.dataset.store.read_label(start).array, np.uint8)
        rng = generator_of(self.seed, lease.scan)
        corrected = correct(mask, truth, self.study.annotator, rng, lease.slices)
        submit_label(
            self.dataset,
            lease.scan,
            Volume(corrected, truth.affine, truth.acquisition_axis),
            FINAL,
            _ANNOTATOR,
            simulated=True,
        )

    def _cost(self) -> Cost:
        """What all labels so far took; of one without a mask before it, all slices were opened, and drawn in."""
        with self.dataset.store.read() as transaction:
            labelled = labels.current_of_all(transaction, FINAL)
            made = {c.to_version: c for c in corrections.listing(transaction)}
        work = [_work(self.truths[scan], label, made.get(label.id)) for scan, label in labelled.items()]
        slices, changed, voxels = (sum(part) for part in zip(*work, strict=True)) if work else (0, 0, 0)
        minutes = self.study.minutes.minutes(len(work), slices, changed)
        return Cost(scans=len(work), slices=slices, changed_slices=changed, voxels=voxels, minutes=round(minutes, 1))

    def _round(self) -> bool:
        """Train, and score what waits, as the product does; whether what was trained is held."""
        is_held = self._whole_round() if self.arm.assessed else self._training()
        own = strategies()[self.arm.strategy].score
        if own is not None and not own.is_estimate:
            score(self.dataset, self.arm.strategy, self.progress)
        return is_held

    def _training(self) -> bool:
        trained = train(self.dataset, "segmentation", self.progress, purpose="segqc simulate", wait=True)
        bundle = self.dataset.bundle()
        if bundle is not None:
            for entry in self.dataset.waiting():  # masks, which annotators start from, and some strategies look at
                current_mask(self.dataset, entry, self.dataset.read_scan(entry), bundle)
        return trained.held_because is not None

    def _whole_round(self) -> bool:
        with self.dataset.store.write() as transaction:
            # one that was interrupted too often is given up: the next one goes on with its trainings
            job = jobs.claim(transaction, _WORKER, ("round",), lambda _: True)
            if job is None:
                begun = rounds.listing(transaction)
                is_over = begun and begun[-1].ended_at is not None
                if is_over and not rounds.labelled_since(transaction, rounds.newest_label(transaction)).scans:
                    return _is_held(begun[-1].steps)  # the study was interrupted while it measured
                enqueue(transaction, RoundRequest(), _ANNOTATOR)
                job = jobs.claim(transaction, _WORKER, ("round",))
        if job is None:
            raise StudyError(f"{self.dataset.folder}: another process takes its rounds")
        request = request_of(job)
        if not isinstance(request, RoundRequest):
            raise StudyError(f"{self.dataset.folder}: its open job is no round")
        result = run_round(self.dataset, job, request, self.progress)
        with self.dataset.store.write() as transaction:
            jobs.finish(transaction, job.id, _WORKER, "done")
        return _is_held(result.steps)

    def _measured(self, seconds: float, *, is_held: bool) -> Point:
        segmenter = self.dataset.segmenter()
        if segmenter is None:
            raise StudyError(f"{self.dataset.folder}: no segmentation network serves after a round")
        test = []
        for i, (scan, truth) in enumerate(self.test.items()):
            self.progress.step(i, len(self.test), "measuring the test scans", scan)
            predicted = np.asarray(segmenter.predict(read_scan(truth.image)).labels.array, np.uint8)
            test.append(round(self._mean_dice(predicted, truth.labels), 4))
        cost = self._cost()
        finals, pseudo, masks = self._labels()
        pool = [self._mean_dice(finals.get(s, pseudo.get(s, masks.get(s))), t) for s, t in self.truths.items()]
        return Point(
            cost=cost,
            share=cost.slices / self.unit.all_slices,
            test_dice=tuple(test),
            labels_dice=round(float(np.mean(pool)), 4),
            accepted=self._accepted(pseudo),
            estimates=self._estimates(masks) if self.arm.assessed else None,
            is_held=is_held,
            seconds=round(seconds, 1),
        )

    def _labels(self) -> tuple[dict[str, LabelArray], dict[str, LabelArray], dict[str, LabelArray]]:
        """The final labels, the pseudo-labels, and the masks of what waits."""
        store = self.dataset.store
        with store.read() as transaction:
            finals = labels.current_of_all(transaction, FINAL)
            accepted = {record.label.scan: record.label for record in pseudo_labels.listing(transaction)}
            masks = labels.current_of_all(transaction, labels.ORIGINAL)
            waiting = set(scans.names(transaction)) - finals.keys()
        found = finals, accepted, {scan: mask for scan, mask in masks.items() if scan in waiting}
        finals_, accepted_, masks_ = (
            {scan: np.asarray(store.read_label(label).array, np.uint8) for scan, label in kind.items()}
            for kind in found
        )
        return finals_, accepted_, masks_

    def _accepted(self, pseudo: Mapping[str, LabelArray]) -> tuple[Accepted, ...]:
        with self.dataset.store.read() as transaction:
            records = {record.label.scan: record for record in pseudo_labels.listing(transaction)}
        return tuple(
            Accepted(
                scan=scan,
                estimated=round(records[scan].dice, 4),
                low=None if (low := records[scan].low) is None else round(low, 4),
                true=round(worst_dice(dice_by_structure(mask, self._true(scan), self.structures)), 4),
            )
            for scan, mask in sorted(pseudo.items())
        )

    def _estimates(self, masks: Mapping[str, LabelArray]) -> Estimates | None:
        """How good the estimates are of the masks that wait."""
        estimated, true = list[float](), list[float]()
        for scan, assessment in self.dataset.assessments().items():
            if scan in masks and assessment.dice is not None:
                estimated.append(assessment.dice)
                true.append(worst_dice(dice_by_structure(masks[scan], self._true(scan), self.structures)))
        if not true:
            return None
        errors, around = np.abs(np.subtract(estimated, true)), np.abs(np.subtract(true, np.median(true)))
        varies = len(true) > 2 and np.ptp(estimated) > 0 and np.ptp(true) > 0
        spearman = round(float(stats.spearmanr(estimated, true).statistic), 4) if varies else None
        return Estimates(
            scans=len(true),
            mae=round(float(errors.mean()), 4),
            constant_mae=round(float(around.mean()), 4),
            spearman=spearman,
        )

    def _true(self, scan: str) -> LabelArray:
        return np.asarray(self.truths[scan].array, np.uint8)

    def _mean_dice(self, mask: LabelArray | None, truth: Volume) -> float:
        """The mean over the structures; 0 where there is no mask yet."""
        if mask is None:
            return 0.0
        found = dice_by_structure(mask, np.asarray(truth.array, np.uint8), self.structures)
        return float(np.mean([value for value in found.values() if value is not None] or [1.0]))


@dataclass(frozen=True, slots=True)
class _Truth:
    """A scan's file and its true labels."""

    image: Path
    labels: Volume


def _truths(study: Study, data: Path) -> tuple[dict[str, _Truth], dict[str, _Truth]]:
    """The scans to draw the pool from, and the test scans.

    Raises:
        StudyError: if a study can't be made of them.
        DatasetError: if the data set can't be used.
        VolumeError: if a scan or its labels can't be read, or a label value is of no structure.
    """
    pairs = labelled_pairs(data)
    pool, test = (
        [scan for scans_ in scans_by_patient(data, part, list(pairs)).values() for scan in scans_]
        for part in (study.pool, study.test)
    )
    test = test[: study.max_scans]
    there = min(len(pool), study.max_scans or len(pool))
    if not test:
        raise StudyError(f"{data}: has no labelled scans in {study.test!r}, which masks are measured on")
    if shared := sorted({*pool} & {*test}):
        raise StudyError(f"{data}: {shared[0]} is in {study.pool!r} and in {study.test!r}; test scans must not train")
    if study.start > there:
        raise StudyError(f"{data}: the study starts with {study.start} labelled scans, but has {there} to annotate")
    values = {value for own in study.structures.values() for value in own}

    def read(scan: str) -> _Truth:
        image, label = pairs[scan]
        return _Truth(image, read_labels(label, scan=read_scan(image), values=values))

    return {scan: read(scan) for scan in pool}, {scan: read(scan) for scan in test}


def _is_held(steps: Mapping[str, JsonObject]) -> bool:
    """Whether the bundle of a round was held, by its steps."""
    return steps[PUBLISH_STEP].get("held_because") is not None


def _depth(truth: Volume) -> int:
    return truth.array.shape[through_plane_axis(truth)]


def _work(truth: Volume, label: LabelRecord, correction: CorrectionRecord | None) -> tuple[int, int, int]:
    """The slices that were opened for a label, those that were changed, and the voxels."""
    slices = _depth(truth) if label.checked_slices is None else len(label.checked_slices)
    if correction is not None:
        return slices, correction.change.slices_changed, correction.change.voxels_changed
    drawn = np.asarray(truth.array) != 0
    in_plane = tuple(a for a in range(3) if a != through_plane_axis(truth))
    return slices, int(drawn.any(axis=in_plane).sum()), int(drawn.sum())


def _continued(unit: Unit, path: Path) -> Unit:
    """The unit as it was left in a file.

    Raises:
        StudyError: if the file is of another one.
    """
    left = _read(path)
    begun = replace(unit, date=left.date, machine=left.machine, points=left.points, is_done=left.is_done)
    if begun != left:
        raise StudyError(_of_another(path.parent))
    return left


def _read(path: Path) -> Unit:
    try:
        return UNITS.validate_json(path.read_bytes())
    except ValidationError as error:
        raise StudyError(f"{path}: is of another version of SegQC; name another folder") from error


def _of_another(folder: Path) -> str:
    return f"{folder}: holds a unit of another study; name another folder, or remove this one"
