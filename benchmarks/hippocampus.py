"""Does the method hold on real scans? MSD hippocampus, from training to the estimate's error on held-out masks.

At most 30 of the train split's cases teach the segmentation network. SegQC-Net learns on masks of networks that never
saw their scans: recipe ``single`` on the other 80 cases, all with masks of the same two networks; recipe ``crossfit``
as the product trains it, on all 110, each fold's with masks of its own network, so that every SegQC-Net of the ensemble
is calibrated on patients and on a network that it does not know. The stratified test masks are made by other networks,
and fixed (with their hashes in the result) before SegQC-Net is trained. Resumable: run it again after an interruption.

    python benchmarks/hippocampus.py --data $SEGQC_DATA/msd-hippocampus --work /tmp/hippocampus

Parts can run side by side, one thread each (OMP_NUM_THREADS=1): ``--only`` test-masks, segmentation and source; with
``crossfit`` fold-0 to fold-2 instead of source, then member-0 to member-2; then all of it without ``--only``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import itertools
import json
import logging
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import pearsonr, spearmanr

from segqc.networks.assessor import Assessor
from segqc.networks.device import name_of_device
from segqc.networks.segmenter import Segmenter
from segqc.quality.metrics import true_metrics, true_slice_metrics
from segqc.split import SplitConfig, place
from segqc.training import LineProgress, TrainingSettings
from segqc.training.assessor import train_member, train_on_masks
from segqc.training.cases import Case, read_case
from segqc.training.crossfit import crossfit_masks, stored_masks, train_mask_sources
from segqc.training.segmentation import plan_for, train_segmentation
from segqc.types import Structure
from segqc.volumes import Volume, read_labels, read_scan, write_labels

STRUCTURES = (Structure("anterior", (1,)), Structure("posterior", (2,)), Structure("hippocampus", (1, 2)))
BINS = (0.0, 0.6, 0.7, 0.8, 0.85, 1.01)
PER_BIN = 25
# short epochs: bad masks come from the first ten steps on
SEGMENTER = TrainingSettings(epochs=100, fold_epochs=50, steps_per_epoch=10, batch=4, patience=40, folds=2)
TEST_SOURCE_EPOCHS = 40
SINGLE = TrainingSettings(
    epochs=34, steps_per_epoch=40, batch=4, patience=34, folds=2, scan_only_share=0.25, empty_mask_share=0.25,
    mask_deformation=4.0, average_flips=True, ensemble=False,
)  # fmt: skip
CROSSFIT = TrainingSettings(
    epochs=25, fold_epochs=50, steps_per_epoch=40, batch=4, folds=3, scan_only_share=0.25, empty_mask_share=0.25,
    mask_deformation=4.0,
)  # fmt: skip
RECIPES = {"single": SINGLE, "crossfit": CROSSFIT}
TIMES = "seconds.json"
FOLDS = [f"fold-{k}" for k in range(CROSSFIT.folds)]
MEMBERS = [f"member-{k}" for k in range(CROSSFIT.folds)]
ONLY = ["test-masks", "segmentation", "source", *FOLDS, *MEMBERS]
progress = LineProgress()


@contextlib.contextmanager
def timed(part: str, work: Path) -> Iterator[None]:
    """Keep the seconds of a part's first complete run: a later one finds its results on disk.

    Beside the seconds that passed, those of the processor: other work on the machine does not change them.
    """
    started, used = time.monotonic(), time.process_time()
    yield
    work.mkdir(parents=True, exist_ok=True)
    times = json.loads((work / TIMES).read_text(encoding="utf-8")) if (work / TIMES).is_file() else {}
    if times.get(part, 0) < 1:
        times[part], times[f"{part} (CPU)"] = time.monotonic() - started, time.process_time() - used
        (work / TIMES).write_text(json.dumps(times), encoding="utf-8")


def cases_of(data: Path, names: Sequence[str]) -> list[Case]:
    """The cases of these names."""
    return [Case(n, n, data / "images" / f"{n}.nii.gz", data / "labels" / f"{n}.nii.gz") for n in names]


def stratified_test_masks(trained: list[Case], test: list[Case], work: Path) -> list[tuple[Case, Path, float]]:
    """Masks of the test scans by two networks of their own, early and at their end, equally many per Dice bin."""
    folder = work / "test-masks"
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        candidates: list[tuple[Case, Path, float]] = []
        for k in range(2):
            rng = np.random.default_rng((100, k))
            subset = [trained[int(i)] for i in rng.permutation(len(trained))[: 12 + 8 * k]]
            settings = replace(SEGMENTER, seed=100 + k, fold_epochs=TEST_SOURCE_EPOCHS)
            plan = plan_for(subset, settings, in_channels=1, out_channels=3)
            name, training = f"test maker {k + 1}", work / f"source-{k}"  # the name seeds the draws
            # at random early epochs, as the paper's test masks: one per third of the first half's logarithm, as masks
            # change most at the start
            draws = np.random.default_rng((settings.seed, *name.encode())).uniform(size=3)
            early = sorted({round((TEST_SOURCE_EPOCHS / 2) ** ((i + float(u)) / 3)) for i, u in enumerate(draws)})
            sources = train_mask_sources(name, subset, STRUCTURES, plan, settings, training, progress, early=early)
            for m, source in enumerate(sources):
                for case in test:
                    scan, truth = read_case(case, (1, 2))
                    labels = source.predict(scan).labels
                    dice = true_metrics(labels.array > 0, truth.array > 0).dice or 0.0
                    path = folder / f"{case.id}-{k}{m}.nii.gz"
                    write_labels(labels, path)
                    candidates.append((case, path, dice))
        chosen = _stratify(candidates, np.random.default_rng(7))
        rows = [
            {"case": c.id, "file": p.name, "dice": d, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
            for c, p, d in chosen
        ]
        manifest.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    by_id = {c.id: c for c in test}
    return [(by_id[r["case"]], folder / r["file"], r["dice"]) for r in json.loads(manifest.read_text(encoding="utf-8"))]


def single_source(taught: list[Case], work: Path) -> list[Segmenter]:
    """The network that makes masks beside the served one: at its end and at early epochs."""
    plan = plan_for(taught, SEGMENTER, in_channels=1, out_channels=3)
    with timed("train a mask source", work):
        return train_mask_sources(
            "source", taught, STRUCTURES, plan, replace(SEGMENTER, seed=1), work / "source", progress
        )


def train_single(taught: list[Case], assessed: list[Case], segmenter: Segmenter, work: Path) -> Assessor:
    """One SegQC-Net, on masks of the served network and of another one that the same cases have taught."""
    sources = single_source(taught, work)
    with timed("make masks", work):
        sets = [stored_masks([segmenter, *sources], c, SEGMENTER, work / "masks") for c in assessed]
    placed = place(
        [c.patient for c in assessed], split_config=SplitConfig(folds=2, validation_share=SINGLE.validation_share)
    )
    with timed("train SegQC-Net, calibrate", work):
        return train_on_masks(sets, STRUCTURES, placed, SINGLE, work / "segqc-single", progress)


def train_crossfit(cases: list[Case], only: str | None, work: Path) -> Assessor | None:
    """The product's way: a network per fold makes masks, another assesses them; None where only a part was asked."""
    # nobody validates: each fold's network is calibrated on the cases of its fold, at its last epoch
    placed = place([c.patient for c in cases], split_config=SplitConfig(folds=CROSSFIT.folds, validation_share=0.0))
    plan, folder = plan_for(cases, CROSSFIT, in_channels=1, out_channels=3), work / "segqc-crossfit"
    sources = replace(CROSSFIT, steps_per_epoch=SEGMENTER.steps_per_epoch)
    sets = []
    for k, fold in enumerate(FOLDS):
        if only in (fold, None, *MEMBERS):
            with timed(f"train a mask source, make masks: {fold}", work):
                sets += crossfit_masks(cases, STRUCTURES, placed, plan, sources, folder, progress, only=[k]).sets
    for k, member in enumerate(MEMBERS):
        if only in (member, None):
            with timed(f"train SegQC-Net: {member}", work):
                train_member(k, sets, STRUCTURES, placed, CROSSFIT, folder, progress)
    if only is not None:
        return None
    with timed("calibrate", work):
        return train_on_masks(sets, STRUCTURES, placed, CROSSFIT, folder, progress)


def _stratify(candidates: list[tuple[Case, Path, float]], rng: np.random.Generator) -> list[tuple[Case, Path, float]]:
    """Up to `PER_BIN` masks per bin, scans that are not in the bin yet first."""
    chosen = []
    for low, high in itertools.pairwise(BINS):
        inside = [c for c in candidates if low <= c[2] < high]
        inside = [inside[int(i)] for i in rng.permutation(len(inside))]
        seen: set[str] = set()
        first = [c for c in inside if not (c[0].id in seen or seen.add(c[0].id))]
        rest = [c for c in inside if c not in first]
        chosen += (first + rest)[:PER_BIN]
    return chosen


def estimate(assessor: Assessor, masks: Sequence[tuple[Case, Volume]]) -> dict[str, dict[str, float]]:
    """Error and correlation of the estimated Dice of each structure, beside the constant predictor's error."""
    true: dict[str, list[float]] = {s.name: [] for s in STRUCTURES}
    raw, calibrated = {s.name: [] for s in STRUCTURES}, {s.name: [] for s in STRUCTURES}
    missed = dict.fromkeys((s.name for s in STRUCTURES), 0)
    true_2d: dict[str, list[float]] = {s.name: [] for s in STRUCTURES}
    raw_2d: dict[str, list[float]] = {s.name: [] for s in STRUCTURES}
    for case, labels in masks:
        scan, truth = read_case(case, (1, 2))
        assessment = assessor.assess(scan, labels, scan_id=case.id).assessment
        for s, quality in zip(STRUCTURES, assessment.structures, strict=True):
            real = true_metrics(s.mask(labels.array), s.mask(truth.array)).dice
            true[s.name].append(1.0 if real is None else real)
            raw[s.name].append(quality.raw.metrics.dice)
            calibrated[s.name].append(quality.estimated.dice)
            slices = true_slice_metrics(s.mask(labels.array), s.mask(truth.array), assessment.through_plane_axis)
            axes = tuple(a for a in range(3) if a != assessment.through_plane_axis)
            masked = s.mask(labels.array).any(axis=axes)
            # where the mask is empty the estimate is "both empty", 1.0, or 0.0: counted apart, it is no measurement
            missed[s.name] += int((slices.counted & ~masked).sum())
            for i in np.flatnonzero(masked):
                estimated = quality.raw.slices[int(i)].metrics.dice
                true_2d[s.name].append(float(slices.dice[i]))
                raw_2d[s.name].append(1.0 if estimated is None else estimated)
    rows = {}
    for s in STRUCTURES:
        t, r, c = (np.array(x[s.name], float) for x in (true, raw, calibrated))
        t2, r2 = np.array(true_2d[s.name]), np.array(raw_2d[s.name])
        rows[s.name] = {
            "masks": len(t),
            "true mean": float(t.mean()),
            "true sd": float(t.std()),
            "MAE raw": float(np.abs(r - t).mean()),
            "MAE calibrated": float(np.abs(c - t).mean()),
            "MAE of the test mean": float(np.abs(t - t.mean()).mean()),
            "Pearson": float(pearsonr(r, t)[0]),
            "Spearman": float(spearmanr(r, t)[0]),
            "2D MAE": float(np.abs(r2 - t2).mean()),
            "2D Pearson": float(pearsonr(r2, t2)[0]),
            "slices": len(t2),
            "slices where only the mask is empty": missed[s.name],
        }
    return rows


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/, labels/ and splits.json")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and masks")
    parser.add_argument("--recipe", choices=RECIPES, default="single")
    parser.add_argument(
        "--only", choices=ONLY, help="one part, beside another process (source: single; folds, members: crossfit)"
    )
    parser.add_argument("--out", type=Path, help="the result; by default results/hippocampus[-crossfit].json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("ignite").setLevel(logging.WARNING)
    work, only, crossfit = arguments.work, arguments.only, arguments.recipe == "crossfit"
    splits = json.loads((arguments.data / "splits.json").read_text(encoding="utf-8"))
    train = cases_of(arguments.data, splits["train"])
    order = np.random.default_rng(0).permutation(len(train))
    taught, assessed = [train[int(i)] for i in order[:30]], [train[int(i)] for i in order[30:]]
    test = cases_of(arguments.data, splits["test"])
    if only in ("test-masks", None):
        with timed("test masks (networks of their own)", work):
            fixed = stratified_test_masks(taught, test, work)
    if only in ("segmentation", None):
        with timed("train segmentation", work):
            placed = place([c.patient for c in taught], split_config=SplitConfig(folds=2, validation_share=0.15))
            segmenter = train_segmentation(taught, STRUCTURES, placed, SEGMENTER, work / "segmentation", progress)
    if only == "source":
        single_source(taught, work)
    if only in ("test-masks", "segmentation", "source"):
        return
    if not (work / "test-masks" / "manifest.json").is_file():
        raise SystemExit(f"{work}: the test masks are fixed before SegQC-Net is trained; run --only test-masks first")
    if crossfit:
        assessor = train_crossfit(train, only, work)
        if assessor is None:
            return
    else:
        assessor = train_single(taught, assessed, segmenter, work)
    segmenter.save(work / "segmentation.pt")
    assessor.save(work / "segqc.pt")
    out = arguments.out or Path(__file__).parent / "results" / f"hippocampus{'-crossfit' * crossfit}.json"
    report(out, segmenter, assessor, test, fixed, json.loads((work / TIMES).read_text(encoding="utf-8")))


def report(
    out: Path,
    segmenter: Segmenter,
    assessor: Assessor,
    test: list[Case],
    fixed: list[tuple[Case, Path, float]],
    seconds: dict[str, float],
) -> None:
    """Measure on the test split, print the tables and write them down."""
    own: list[tuple[Case, Volume]] = []
    dice: dict[str, list[float]] = {s.name: [] for s in STRUCTURES}
    for case in test:
        scan, truth = read_case(case, (1, 2))
        labels = segmenter.predict(scan).labels
        own.append((case, labels))
        for s in STRUCTURES:
            dice[s.name].append(true_metrics(s.mask(labels.array), s.mask(truth.array)).dice or 0.0)
    stratified = [(case, read_labels(path, scan=read_scan(case.scan))) for case, path, _ in fixed]
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, {name_of_device()}",
        "seconds": {k: round(v) for k, v in seconds.items()},
        "peak memory GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "segmenter test Dice": {k: round(float(np.mean(v)), 4) for k, v in dice.items()},
        "stratified masks": estimate(assessor, stratified),
        "served network's own masks": estimate(assessor, own),
        "test masks sha256": hashlib.sha256(b"".join(p.read_bytes() for _, p, _ in fixed)).hexdigest(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console = Console()
    if not console.is_terminal:
        console.width = 220  # a pipe has no width: nothing is to be cut off
    console.print(result["segmenter test Dice"], result["seconds"])
    for title in ("stratified masks", "served network's own masks"):
        table = Table("structure", *next(iter(result[title].values())), title=title)
        for name, row in result[title].items():
            table.add_row(name, *(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)


if __name__ == "__main__":
    main()
