"""Do estimates of people's masks hold for errors of a kind that the network for people's masks has not learned from?

The product of a seed is that of `benchmarks/people.py`. For each group of related kinds its network for people's masks
is trained again from masks without them, and judges masks of unseen patients whose errors are all of these kinds,
beside the network that has learned from all kinds. Resumable: what is trained in the work folder is not trained again.

    python benchmarks/people_kinds.py run hippocampus --seed 0 --data $SEGQC_DATA --work /tmp/people
    python benchmarks/people_kinds.py table

``--pool development`` is for choosing; the test pool is measured once for each result that is reported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from people import RESULTS, SETS, Pool, arguments_of, keep, patients, serve
from pydantic import TypeAdapter
from sklearn.metrics import roc_auc_score

from segqc.evaluation.report.document import Table
from segqc.evaluation.report.formats import to_markdown
from segqc.loop.dataset import Dataset
from segqc.networks.assessor import Assessor
from segqc.quality.boxes import largest_evidence
from segqc.quality.metrics import true_metrics
from segqc.training import LineProgress
from segqc.training.cases import Case, read_case
from segqc.training.implanted_errors import ERROR_KINDS, ErrorKind, implant_errors
from segqc.training.people import train_people
from segqc.types import LabelArray
from segqc.volumes import Volume, through_plane_axis

GROUPS: Final[Mapping[str, tuple[ErrorKind, ...]]] = {
    "whole slices": ("missing slices", "repeated slices"),
    "too little": ("cut", "hole"),
    "too much": ("leak", "island", "wrong neighbour"),
    "contours": ("over-smoothed", "boundary noise", "shifted part"),
    "between structures": ("swapped structures", "swapped sides"),
}
"""Kinds that are left out together: a network that knows one of them knows something of the others."""
UNTOUCHED: Final = "untouched"
progress = LineProgress()


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A mask whose errors are of one group, or none, by a network.

    Attributes:
        patient, group: whose it is, and what is wrong in it.
        left_out: which group the network has not learned from; None where it knows all.
        dice, estimate: the mean over the structures that have a true one.
        evidence: the largest of an error.
        covered: the share of the structures whose interval holds.
    """

    patient: str
    group: str
    left_out: str | None
    dice: float
    estimate: float
    evidence: float
    covered: float


@dataclass(frozen=True, slots=True)
class Result:
    """What was judged in a pool with the networks of a seed."""

    set: str
    seed: int
    pool: Pool
    judged: tuple[Judged, ...]


RESULT: TypeAdapter[Result] = TypeAdapter(Result)


def without(dataset: Dataset, assessor: Assessor, group: str, folder: Path) -> Assessor:
    """SegQC-Net with a network for people's masks that has not learned from a group of errors."""
    path = folder / "model.pt"
    if path.is_file():
        return Assessor.load(path)
    people = train_people(
        assessor,
        dataset.cases(),
        dict(dataset.patient_splits()),
        dataset.settings.training_settings("segqc"),
        folder,
        progress,
        kinds=[kind for kind in ERROR_KINDS if kind not in GROUPS[group]],
    )
    assert people is not None, "enough scans are labelled"
    found = assessor.with_people(people)
    found.save(path)
    return found


def masks(
    truth: LabelArray, image: Volume, assessor: Assessor, scan: str, seed: int
) -> Iterator[tuple[str, LabelArray]]:
    """The right mask, and one with errors of each group; a function of the scan's name and the seed."""
    yield UNTOUCHED, truth
    of_scan = int.from_bytes(hashlib.sha256(scan.encode()).digest()[:8])
    for number, (group, kinds) in enumerate(GROUPS.items()):
        rng = np.random.default_rng((seed, of_scan, number))
        made = implant_errors(truth, image, assessor.structures, rng, kinds=kinds)
        if made.kinds:
            yield group, made.labels


def judge(
    assessor: Assessor,
    image: Volume,
    truth: LabelArray,
    mask: LabelArray,
    patient: str,
    group: str,
    left_out: str | None = None,
) -> Judged:
    """What a network says of a mask, and what is true."""
    labels = Volume(mask, image.affine, image.acquisition_axis)
    found = assessor.assess(image, labels, scan_id="scan", source="person")
    pairs = []
    for structure, quality in zip(assessor.structures, found.assessment.structures, strict=True):
        true, said = true_metrics(structure.mask(mask), structure.mask(truth)).dice, quality.estimated.dice
        interval = quality.intervals.dice
        if true is not None and said is not None:
            pairs.append((true, said, interval is not None and interval.low <= true <= interval.high))
    true_mean, said_mean, held = np.mean(np.array(pairs, float), axis=0)
    evidence = max(largest_evidence(error, through_plane_axis(image)) for error in found.errors)
    return Judged(
        patient=patient, group=group, left_out=left_out, dice=float(true_mean), estimate=float(said_mean),
        evidence=evidence, covered=float(held),
    )  # fmt: skip


def measure(name: str, seed: int, pool: Pool, data: Path, work: Path) -> Result:
    """Judge the masks of all patients of a pool by all networks."""
    known = SETS[name]
    dataset = serve(known, seed, data, work / f"{name}-{seed}")
    all_kinds = dataset.assessor()
    assert all_kinds is not None
    groups = [g for g in GROUPS if g != "between structures" or len(all_kinds.structures) > 1]
    others = {g: without(dataset, all_kinds, g, work / f"{name}-{seed}-without" / g.replace(" ", "-")) for g in groups}
    judged: list[Judged] = []
    unseen = patients(known, seed, pool, data)
    for i, patient in enumerate(unseen):
        progress.step(i, len(unseen), "judging")
        for scan in known.scans(patient):
            files = (data / known.data / kind / f"{scan}.nii.gz" for kind in ("images", "labels"))
            image, labels = read_case(Case(scan, patient, *files), all_kinds.values)
            truth = np.asarray(labels.array, np.uint8)
            for group, mask in masks(truth, image, all_kinds, scan, seed):
                judged.append(judge(all_kinds, image, truth, mask, patient, group))
                asked = groups if group == UNTOUCHED else [group] if group in others else []
                judged += [judge(others[g], image, truth, mask, patient, group, g) for g in asked]
    return Result(name, seed, pool, tuple(judged))


def table(results: Sequence[Result]) -> Table:
    """For each group: what the network says that knows it, and one that does not."""
    judged = [mask for result in results for mask in result.judged]
    rows: list[list[str | int | float | None]] = []
    for group in GROUPS:
        for left_out in (None, group):
            wrong = [m for m in judged if m.group == group and m.left_out == left_out]
            right = [m for m in judged if m.group == UNTOUCHED and m.left_out == left_out]
            if not wrong or not right:
                continue
            true, said = (np.array([getattr(m, name) for m in wrong]) for name in ("dice", "estimate"))
            is_wrong = [True] * len(wrong) + [False] * len(right)
            rows.append(
                [
                    group,
                    "yes" if left_out is None else "no",
                    len(wrong),
                    float(true.mean()),
                    float(np.abs(said - true).mean()),
                    float((said - true).mean()),
                    float(np.corrcoef(said, true)[0, 1]),
                    float(np.mean([m.covered for m in wrong])),
                    float(roc_auc_score(is_wrong, [m.evidence for m in (*wrong, *right)])),
                    float(np.mean([m.estimate for m in right])),
                ]
            )
    where = f"{results[0].set}, {results[0].pool} pool, seeds {', '.join(str(r.seed) for r in results)}"
    return Table(
        "kinds",
        f"Errors of kinds that were left out of the training: {where}",
        ["errors", "learned from", "n", "true Dice", "MAE", "bias", "Pearson", "intervals that hold", "AUROC, evidence",
         "untouched said"],
        rows,
        note="All errors of a mask are of the group. AUROC: of telling these masks from untouched ones by the largest "
        "evidence of an error.",
    )  # fmt: skip


def main() -> None:
    """Run one unit, or print the tables."""
    arguments = arguments_of(__doc__)
    if arguments.command == "run":
        result = measure(arguments.set, arguments.seed, arguments.pool, arguments.data, arguments.work)
        path = RESULTS / f"kinds-{arguments.set}-{arguments.seed}-{arguments.pool}.json"
        keep(RESULT.dump_python(result, mode="json"), arguments.result or path)
        print(to_markdown(table([result])))
        return
    of: dict[tuple[str, Pool], list[Result]] = {}
    for path in sorted(RESULTS.glob("kinds-*.json")):
        result = RESULT.validate_json(path.read_bytes())
        of.setdefault((result.set, result.pool), []).append(result)
    print("\n\n".join(to_markdown(table(results)) for results in of.values()))


if __name__ == "__main__":
    main()
