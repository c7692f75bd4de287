"""What are the estimates of people's masks worth? SegQC-Net told who made a mask, and not told, beside other witnesses.

The labelled scans of a set become a dataset folder, in which the product trains at its default settings. Masks of
unseen patients are then judged: experts' untouched, the same with one to three implanted errors, the served network's,
these submitted by a person unchanged, and those of which somebody has corrected half the slices. Of the last two
SegQC-Net is told which slices the person let be, as the store knows it. Resumable: what is trained in the work folder
is not trained again.

    python benchmarks/people.py run hippocampus --seed 0 --data $SEGQC_DATA --work /tmp/people
    python benchmarks/people.py table

``--pool development`` is for choosing; the test pool is measured once for each result that is reported.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal, TypeAlias, get_args

import numpy as np
from pydantic import TypeAdapter
from sklearn.metrics import roc_auc_score

from segqc.evaluation.methods.estimates import AssessedMask
from segqc.evaluation.methods.maps import CrossFittedMean, SoftOutput
from segqc.evaluation.report.document import Table
from segqc.evaluation.report.formats import to_markdown
from segqc.loop.dataset import Dataset
from segqc.loop.training import train
from segqc.networks.assessor import AssessmentResult, Assessor
from segqc.networks.card import NetworkName
from segqc.networks.device import name_of_device
from segqc.networks.segmenter import Prediction, Segmenter
from segqc.quality.boxes import BoxSettings, find_boxes
from segqc.quality.error_maps import difference, extract_errors
from segqc.quality.metrics import true_metrics
from segqc.quality.proposal import propose
from segqc.settings import write_settings
from segqc.training import LineProgress
from segqc.training.implanted_errors import ErrorKind, implant_errors
from segqc.types import Assessment, ErrorBox, FloatArray, LabelArray, MaskSource, Structure
from segqc.volumes import Volume, atomic_write, read_labels, read_scan, through_plane_axis
from segqc.volumes.slices import Slices, unchanged

RESULTS = Path(__file__).parent / "results"
NETWORKS: tuple[NetworkName, ...] = ("segmentation", "segqc")
TOLD, NOT_TOLD, FOLDS, SOFT = "SegQC-Net, told", "SegQC-Net, not told", "folds' mean", "soft output"
ESTIMATORS = (TOLD, NOT_TOLD, FOLDS, SOFT)
Pool: TypeAlias = Literal["development", "test"]
Origin: TypeAlias = Literal["untouched", "implanted", "served", "unchanged", "half corrected"]
MADE_OF_SERVED: tuple[Origin, ...] = ("unchanged", "half corrected")
IMPLANTED = 3  # masks of one scan
LEAST_MM2 = 25.0  # of an error that is to be found
GOOD = 0.95  # errors in masks of a better Dice are told from none by themselves
RESAMPLES = 2000
progress = LineProgress()


@dataclass(frozen=True, slots=True)
class KnownSet:
    """A data set whose experts' labels are all known.

    Attributes:
        data: its folder within ``$SEGQC_DATA``.
        structures: names and label values.
        labelled: how many patients' scans are labelled.
        key: of the patients of a side in its ``splits.json``.
        scans: the scans of a patient.
    """

    data: str
    structures: dict[str, tuple[int, ...]]
    labelled: int
    key: str
    scans: Callable[[str], tuple[str, ...]]


SETS = {
    "hippocampus": KnownSet(
        "msd-hippocampus", {"anterior": (1,), "posterior": (2,)}, 30, "{}", lambda patient: (patient,)
    ),
    "sunnybrook": KnownSet(
        "sunnybrook-cine", {"cavity": (1,)}, 14, "{}_patients", lambda patient: (f"{patient}_ED", f"{patient}_ES")
    ),
}


@dataclass(frozen=True, slots=True)
class Judged:
    """One mask, the mean over its structures where several are there.

    Attributes:
        scan, patient, origin, kinds: what it is, and which errors were implanted.
        dice: the true one.
        said: what each estimator says.
        holds: the share of its structures whose 90% interval holds; None without one.
        boxes: error boxes in all slices.
        errors: slices' errors of at least `LEAST_MM2` that are to be found, and `found` how many a box touches.
        proposed: the true Dice of the proposal, all of its boxes taken.
        accepted: its true Dice with those boxes only in which it is nearer to the truth than the mask.
    """

    scan: str
    patient: str
    origin: Origin
    kinds: tuple[ErrorKind, ...]
    dice: float
    said: dict[str, float]
    holds: float | None
    boxes: int
    errors: int
    found: int
    proposed: float
    accepted: float


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured with the networks of one seed."""

    date: str
    machine: str
    set: str
    seed: int
    pool: Pool
    trust: tuple[tuple[float, ...], ...]
    masks: tuple[Judged, ...]


RESULT: TypeAdapter[Result] = TypeAdapter(Result)


# --- the product ------------------------------------------------------------------------------------------------------


def patients(known: KnownSet, seed: int, pool: Pool | None, data: Path) -> list[str]:
    """The labelled patients for a seed, or those of a pool."""
    splits = json.loads((data / known.data / "splits.json").read_text(encoding="utf-8"))
    if pool == "test":
        return sorted(splits[known.key.format("test")])
    train_side = sorted(splits[known.key.format("train")])
    order = [train_side[int(i)] for i in np.random.default_rng((27, seed)).permutation(len(train_side))]
    return order[: known.labelled] if pool is None else order[known.labelled :]


def serve(known: KnownSet, seed: int, data: Path, folder: Path) -> Dataset:
    """Make the dataset folder and train the networks, as far as it is not done yet."""
    if not folder.is_dir():
        new = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        (new / "labels" / "final").mkdir(parents=True)
        for patient in patients(known, seed, None, data):
            for scan in known.scans(patient):
                shutil.copy(data / known.data / "images" / f"{scan}.nii.gz", new)
                shutil.copy(data / known.data / "labels" / f"{scan}.nii.gz", new / "labels" / "final")
        several = {p: known.scans(p) for p in patients(known, seed, None, data) if len(known.scans(p)) > 1}
        path = write_settings(new, known.structures, several)
        path.write_text(f"{path.read_text(encoding='utf-8')}\n[training]\nseed = {seed}\n", encoding="utf-8")
        new.rename(folder)
    dataset = Dataset(folder)
    for network in NETWORKS:
        bundle = dataset.bundle()
        if bundle is None or not bundle.holds(network):
            train(dataset, network, progress)
    return dataset


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(name: str, seed: int, pool: Pool, data: Path, folder: Path) -> Result:
    """Judge the masks of all patients of a pool."""
    known = SETS[name]
    dataset = serve(known, seed, data, folder)
    bundle = dataset.bundle()
    if bundle is None or bundle.assessor().people is None:
        raise SystemExit(f"{folder}: no network for people's masks")
    judge = _Judge(bundle.assessor(), bundle.segmenter(), bundle.fold_networks())
    found: list[Judged] = []
    waiting = [(patient, scan) for patient in patients(known, seed, pool, data) for scan in known.scans(patient)]
    for number, (patient, scan) in enumerate(waiting):
        progress.step(number, len(waiting), "judging", scan)
        image = read_scan(data / known.data / "images" / f"{scan}.nii.gz")
        values = bundle.assessor().values
        truth = read_labels(data / known.data / "labels" / f"{scan}.nii.gz", scan=image, values=values)
        found += judge.masks(
            scan, patient, image, np.asarray(truth.array, np.uint8), np.random.default_rng((seed, number))
        )
    trained = bundle.assessor().people
    skips = [] if trained is None else [m for m in trained.network.modules() if hasattr(m, "trust")]
    return Result(
        date=datetime.date.today().isoformat(),
        machine=f"{platform.machine()}, {platform.system()}, {name_of_device()}",
        set=name,
        seed=seed,
        pool=pool,
        trust=tuple(tuple(round(float(t), 3) for t in skip.trust) for skip in skips),
        masks=tuple(found),
    )


class _Judge:
    """All estimators of one bundle."""

    def __init__(self, trained: Assessor, segmenter: Segmenter, folds: Sequence[Segmenter]) -> None:
        self.structures: Sequence[Structure] = trained.structures
        boxes = replace(trained.settings.boxes, min_area_mm2=LEAST_MM2)
        self.assessor = trained.with_settings(replace(trained.settings, boxes=boxes))
        self.segmenter = segmenter
        self.others = {FOLDS: CrossFittedMean(folds), SOFT: SoftOutput(self.structures)}

    def masks(
        self, scan: str, patient: str, image: Volume, truth: LabelArray, rng: np.random.Generator
    ) -> list[Judged]:
        """Make and judge the masks of one scan."""
        prediction = self.segmenter.predict(image)
        served = np.asarray(prediction.labels.array, np.uint8)
        made: list[tuple[Origin, tuple[ErrorKind, ...], LabelArray]] = [("untouched", (), truth)]
        for _ in range(IMPLANTED):
            implanted = implant_errors(truth, image, self.structures, rng)
            made.append(("implanted", implanted.kinds, implanted.labels))
        made += [("served", (), served), ("unchanged", (), served)]
        made.append(("half corrected", (), _half_corrected(served, truth, image, rng)))
        return [
            judged
            for origin, kinds, mask in made
            if (judged := self._judge(scan, patient, origin, kinds, image, mask, truth, prediction)) is not None
        ]

    def _judge(
        self,
        scan: str,
        patient: str,
        origin: Origin,
        kinds: tuple[ErrorKind, ...],
        image: Volume,
        mask: LabelArray,
        truth: LabelArray,
        prediction: Prediction,
    ) -> Judged | None:
        labels = Volume(mask, image.affine, image.acquisition_axis)
        axis = through_plane_axis(image)
        if origin == "served":
            result = not_told = self._assess(image, labels, "network", prediction)
        elif origin in MADE_OF_SERVED:
            network_slices = unchanged(prediction.labels.array, mask, axis)
            result = self._assess(image, labels, "person", prediction, network_slices)
            not_told = self._assess(image, labels, "network", None)
        else:
            result, not_told = (self._assess(image, labels, source, None) for source in ("person", "network"))
        told, blind = result.assessment, not_told.assessment
        assessed = AssessedMask(image, labels, self.segmenter)
        said = {
            TOLD: [q.estimated.dice for q in told.structures],
            NOT_TOLD: [q.estimated.dice for q in blind.structures],
        }
        said |= {name: [e.metrics.dice for e in other.estimate(assessed)] for name, other in self.others.items()}
        true = [true_metrics(s.mask(mask), s.mask(truth)).dice for s in self.structures]
        there = [
            k for k, dice in enumerate(true) if dice is not None and all(of[k] is not None for of in said.values())
        ]
        if not there:
            return None
        holds = [
            interval.low <= dice <= interval.high
            for k in there
            if (interval := told.structures[k].intervals.dice) is not None and (dice := true[k]) is not None
        ]
        errors, found = self._found(told, mask, truth, image)
        proposals = self._proposals(result, mask, truth, axis)
        proposed, accepted = (
            _mean([true_metrics(s.mask(made), s.mask(truth)).dice for s in self.structures]) for made in proposals
        )
        return Judged(
            scan=scan,
            patient=patient,
            origin=origin,
            kinds=kinds,
            dice=_mean([true[k] for k in there]),
            said={name: _mean([of[k] for k in there]) for name, of in said.items()},
            holds=fmean(holds) if holds else None,
            boxes=sum(len(q.extracted.boxes) for q in told.structures),
            errors=errors,
            found=found,
            proposed=proposed,
            accepted=accepted,
        )

    def _assess(
        self,
        image: Volume,
        labels: Volume,
        source: MaskSource,
        prediction: Prediction | None,
        network_slices: Slices = (),
    ) -> AssessmentResult:
        soft = None if prediction is None else self.segmenter.soft_outputs(prediction, self.assessor.structures)
        return self.assessor.assess(
            image, labels, scan_id="scan", soft=soft, source=source, network_slices=network_slices
        )

    def _proposals(
        self, result: AssessmentResult, mask: LabelArray, truth: LabelArray, axis: int
    ) -> tuple[LabelArray, LabelArray]:
        """The whole proposal, and that of the boxes in which it is nearer to the truth than the mask."""
        boxes = [q.extracted.boxes for q in result.assessment.structures]
        whole = propose(mask, result.errors, self.structures, boxes, axis)
        accepted = [[box for box in of if _is_nearer(whole, mask, truth, box, axis)] for of in boxes]
        return whole, propose(mask, result.errors, self.structures, accepted, axis)

    def _found(self, told: Assessment, mask: LabelArray, truth: LabelArray, image: Volume) -> tuple[int, int]:
        """The errors of single slices that are to be found, and how many of them a box touches."""
        axis, count, hits = through_plane_axis(image), 0, 0
        settings = BoxSettings(min_area_mm2=LEAST_MM2, max_area_mm2=float("inf"))
        for structure, quality in zip(self.structures, told.structures, strict=True):
            held, real = structure.mask(mask), structure.mask(truth)
            extraction = self.assessor.settings.extraction.for_structure(structure.name)
            error: FloatArray = np.asarray(
                extract_errors(difference(held, real), held, axis, image.spacing_mm, extraction), np.float32
            )
            for true in find_boxes(error, axis, image.spacing_mm, settings):
                count += 1
                hits += any(_touches(true, box) for box in quality.extracted.boxes)
        return count, hits


def _half_corrected(mask: LabelArray, truth: LabelArray, image: Volume, rng: np.random.Generator) -> LabelArray:
    """The mask with the truth in a random half of the slices that hold anything."""
    axis = through_plane_axis(image)
    there = np.flatnonzero(((mask > 0) | (truth > 0)).any(axis=tuple(a for a in range(3) if a != axis)))
    chosen = rng.permutation(there)[: len(there) // 2]
    corrected = mask.copy()
    np.moveaxis(corrected, axis, 0)[chosen] = np.moveaxis(truth, axis, 0)[chosen]
    return corrected


def _is_nearer(proposed: LabelArray, mask: LabelArray, truth: LabelArray, box: ErrorBox, axis: int) -> bool:
    of_box = (box.slice_index, slice(box.start[0], box.stop[0]), slice(box.start[1], box.stop[1]))
    new, old, true = (np.moveaxis(labels, axis, 0)[of_box] for labels in (proposed, mask, truth))
    return bool((new != true).sum() < (old != true).sum())


def _touches(one: ErrorBox, other: ErrorBox) -> bool:
    sides = zip(one.start, one.stop, other.start, other.stop, strict=True)
    return one.slice_index == other.slice_index and all(a < d and c < b for a, b, c, d in sides)


def _mean(values: Sequence[float | None]) -> float:
    return fmean(v for v in values if v is not None)


# --- tables -----------------------------------------------------------------------------------------------------------


def of_origin(masks: Sequence[Judged], *origins: Origin) -> list[Judged]:
    """The masks of some origins."""
    return [m for m in masks if m.origin in origins]


def tables(results: Sequence[Result]) -> list[Table]:
    """The tables of the results of one set and pool, of one seed or several."""
    first = results[0]
    title = f"{first.set}, {first.pool} pool, seeds {', '.join(str(r.seed) for r in results)}"
    rows: list[tuple[str | float | None, ...]] = []
    for origin in [origin for origin in get_args(Origin) if of_origin(first.masks, origin)]:
        for estimator in ESTIMATORS:
            of = [_numbers(of_origin(r.masks, origin), estimator) for r in results]
            rows.append((origin, estimator, *(_mean_of(column) for column in zip(*of, strict=True))))
    dice = Table(
        "dice",
        f"Estimated Dice of people's and networks' masks: {title}",
        ("mask", "estimator", "n", "true Dice", "said", "MAE", "constant", "bias", "Pearson", "Spearman", "regret"),
        tuple(rows),
        digits={"n": 0},
    )
    wanted = [_wanted(r.masks) for r in results]
    names = list(wanted[0])
    must = Table(
        "wanted",
        f"What is wanted, and what is reached: {title}",
        ("what", *(f"seed {r.seed}" for r in results)),
        tuple((name, *(of[name] for of in wanted)) for name in names),
    )
    kinds = sorted({k for r in results for m in r.masks for k in m.kinds})
    of_kind = Table(
        "kinds",
        f"By kind of error: {title}",
        ("kind", "n", "true Dice", "MAE", "AUROC"),
        tuple(
            (kind, *(_mean_of(c) for c in zip(*(_of_kind(r.masks, kind) for r in results), strict=True)))
            for kind in kinds
        ),
        digits={"n": 0},
    )
    return [dice, must, of_kind]


def _numbers(masks: Sequence[Judged], estimator: str) -> tuple[float | None, ...]:
    true, said = np.array([m.dice for m in masks]), np.array([m.said[estimator] for m in masks])
    constant = float(np.abs(true - np.median(true)).mean())
    errors = float(np.abs(said - true).mean())
    is_flat = np.ptp(true) == 0 or np.ptp(said) == 0
    return (
        len(masks),
        float(true.mean()),
        float(said.mean()),
        errors,
        constant,
        float((said - true).mean()),
        None if is_flat else float(np.corrcoef(true, said)[0, 1]),
        None if is_flat else float(np.corrcoef(_ranks(true), _ranks(said))[0, 1]),
        _rank_regret(true, said),
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.unique(values, return_inverse=True)[1], np.float64)


def _rank_regret(true: np.ndarray, said: np.ndarray) -> float:
    """The true quality lost by taking the estimate's worst tenth instead of the true one."""
    k = max(1, len(true) // 10)
    return float(true[np.argsort(said, kind="stable")[:k]].mean() - np.sort(true)[:k].mean())


def _wanted(masks: Sequence[Judged]) -> dict[str, float | None]:
    implanted, untouched = of_origin(masks, "implanted"), of_origin(masks, "untouched")
    people = [*implanted, *untouched]
    good = [m for m in people if m.dice > GOOD]
    before = {m.scan: m for m in of_origin(masks, "served")}
    half = [(before[m.scan], m) for m in of_origin(masks, "half corrected") if m.scan in before]
    low, high = _difference(implanted, TOLD, FOLDS)
    errors = sum(m.errors for m in implanted)
    return {
        "implanted: MAE (.024)": _numbers(implanted, TOLD)[3],
        "implanted: Pearson (.95)": _numbers(implanted, TOLD)[6],
        "untouched: said (.97)": fmean(m.said[TOLD] for m in untouched),
        "half corrected: said higher than before (.95)": fmean(b.said[TOLD] < m.said[TOLD] for b, m in half),
        "90% intervals hold (.87)": fmean(m.holds for m in implanted if m.holds is not None),
        "MAE less folds' mean's, lower": low,
        "MAE less folds' mean's, upper": high,
        "false boxes an untouched scan (.2)": fmean(m.boxes for m in untouched),
        "errors over 25 mm2 found (.90)": sum(m.found for m in implanted) / errors if errors else None,
        "implanted: true Dice before": fmean(m.dice for m in implanted),
        "implanted: of the proposal": fmean(m.proposed for m in implanted),
        "implanted: of its boxes that help": fmean(m.accepted for m in implanted),
        "half corrected: true Dice before": fmean(m.dice for _, m in half),
        "half corrected: of the proposal": fmean(m.proposed for _, m in half),
        "untouched: of the proposal": fmean(m.proposed for m in untouched),
        "AUROC (.98)": _auroc(people),
        "AUROC, true Dice over .95 (.90)": _auroc(good),
    }


def _of_kind(masks: Sequence[Judged], kind: ErrorKind) -> tuple[float | None, ...]:
    of, untouched = [m for m in masks if kind in m.kinds], of_origin(masks, "untouched")
    if not of:
        return 0.0, None, None, None
    mae = fmean(abs(m.dice - m.said[TOLD]) for m in of)
    return float(len(of)), fmean(m.dice for m in of), mae, _auroc([*of, *untouched])


def _auroc(masks: Sequence[Judged]) -> float | None:
    wrong = [m.dice < 1 for m in masks]
    return float(roc_auc_score(wrong, [-m.said[TOLD] for m in masks])) if len(set(wrong)) == 2 else None


def _difference(masks: Sequence[Judged], one: str, other: str) -> tuple[float, float]:
    """The 95% interval of the difference of two estimators' mean absolute errors, patients drawn again."""
    of_patient: dict[str, list[float]] = defaultdict(list)
    for m in masks:
        of_patient[m.patient].append(abs(m.said[one] - m.dice) - abs(m.said[other] - m.dice))
    sums = np.array([(sum(values), len(values)) for values in of_patient.values()])
    drawn = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn, 0].sum(axis=1) / sums[drawn, 1].sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _mean_of(values: Sequence[float | None]) -> float | None:
    return None if any(v is None for v in values) else fmean(v for v in values if v is not None)


def path_of(name: str, seed: int, pool: Pool) -> Path:
    """Where a result is kept."""
    return RESULTS / f"people-{name}-{seed}-{pool}.json"


def main() -> None:
    """Run one unit, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, judge and keep the result")
    run.add_argument("set", choices=SETS)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--pool", choices=get_args(Pool), default="development")
    run.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    run.add_argument("--work", type=Path, required=True)
    run.add_argument("--result", type=Path, help="where to write it, instead of benchmarks/results")
    commands.add_parser("table", help="print the tables of all results")
    arguments = parser.parse_args()
    if arguments.command == "run":
        folder = arguments.work / f"{arguments.set}-{arguments.seed}"
        arguments.work.mkdir(parents=True, exist_ok=True)
        result = measure(arguments.set, arguments.seed, arguments.pool, arguments.data, folder)
        path = arguments.result or path_of(arguments.set, arguments.seed, arguments.pool)
        with atomic_write(path) as temporary:
            temporary.write_bytes(RESULT.dump_json(result, indent=1))
        print("\n\n".join(to_markdown(table) for table in tables([result])))
        return
    of: dict[tuple[str, Pool], list[Result]] = defaultdict(list)
    for path in sorted(RESULTS.glob("people-*.json")):
        result = RESULT.validate_json(path.read_bytes())
        of[result.set, result.pool].append(result)
    print("\n\n".join(to_markdown(table) for results in of.values() for table in tables(results)))


if __name__ == "__main__":
    main()
