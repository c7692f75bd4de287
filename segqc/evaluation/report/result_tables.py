"""The tables of a report, from the results of experiments (paper, tables 1 to 5, and what they lack)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from segqc.evaluation.experiments.comparison import (
    BAD_UNDER,
    Compared,
    Covered,
    Detected,
    Dimension,
    ExperimentName,
    ExperimentResult,
    Family,
    Row,
    order_methods,
)
from segqc.evaluation.methods.registry import (
    CROSS_FITTED,
    EXTRACTED_MAP,
    ONE_NETWORK,
    SCAN_ONLY,
    SEGQC,
    TTA,
    VARIANTS,
    one_network,
)
from segqc.evaluation.report.document import UNDEFINED, Cell, Table
from segqc.evaluation.statistics.coverage import ALL
from segqc.evaluation.statistics.curves import OPTIMAL, RANDOM, RANDOM_NONEMPTY, SEQUENTIAL
from segqc.evaluation.statistics.detection import DetectionScores
from segqc.quality import estimation
from segqc.quality.metrics import METRIC_NAMES, MetricName
from segqc.text import slug

PAPERS = "paper's SegQC"
OWN = (SEGQC, EXTRACTED_MAP, "SegQC-TR", PAPERS)
REFERENCES = (OPTIMAL, RANDOM, RANDOM_NONEMPTY, SEQUENTIAL)
CONTROL = (SEGQC, PAPERS, TTA, "soft output", SCAN_ONLY, CROSS_FITTED, "constant")  # of the strata
THRESHOLD = 0.5
SHOWN: Mapping[MetricName, str] = {"dice": "Dice", "iou": "IoU", "arvd": "ARVD", "rvd": "RVD"}
EXPERIMENT_TITLES: Mapping[ExperimentName, str] = {
    "stratified": "stratified masks",
    "served": "the served network's own masks",
    "corrections": "corrected masks",
}
COVERAGE_KINDS: Mapping[str, str] = {
    "resplit": "random splits",
    "test": "on this experiment's masks",
    "shift": "groups: all others to",
    "structure": "calibrated on",
}
_SIMULATED = "masks that a simulated annotator corrected"
_BEST_ESTIMATES = {"MAE": "lowest", "raw MAE": "lowest", "Pearson": "highest", "Spearman": "highest"}


def title_of(result: ExperimentResult) -> str:
    """What an experiment's masks are called in titles."""
    return _SIMULATED if result.corrections == "simulated" else EXPERIMENT_TITLES[result.experiment]


def find_row(
    result: ExperimentResult,
    structure: str,
    method: str,
    metric: MetricName = "dice",
    dimension: Dimension = "3D",
    slices: str | None = None,
) -> Row | None:
    """One row of an experiment; None where the method says nothing of it."""
    wanted = (structure, method, metric, dimension, slices)
    found = (r for r in result.rows if (r.structure, r.method, r.metric, r.dimension, r.slices) == wanted)
    return next(found, None)


def methods_of(result: ExperimentResult, structure: str) -> list[str]:
    """The methods that say something of a structure, in the order of tables; variants of SegQC are left out."""
    return [m for m in dict.fromkeys(r.method for r in result.rows if r.structure == structure) if m not in VARIANTS]


def variants_of(result: ExperimentResult) -> list[str]:
    """The variants of SegQC that an experiment compares."""
    return [m for m in dict.fromkeys(r.method for r in result.rows) if m in VARIANTS]


def find_compared(
    result: ExperimentResult,
    structure: str,
    metric: MetricName = "dice",
    dimension: Dimension = "3D",
    statistic: str = "mae",
    family: Family = "methods",
    first: str = SEGQC,
) -> Compared | None:
    """One family of comparisons."""
    wanted = (structure, metric, dimension, statistic, family, first)
    found = (
        c for c in result.compared if (c.structure, c.metric, c.dimension, c.statistic, c.family, c.first) == wanted
    )
    return next(found, None)


def verdicts_of(family: Compared | None) -> dict[str, estimation.Verdict]:
    """The verdicts of a family by the method that SegQC is compared with."""
    return {} if family is None else dict(zip(family.others, family.verdicts, strict=True))


def comparisons_of(family: Compared | None) -> dict[str, estimation.Comparison]:
    """The comparisons of a family by the method that SegQC is compared with."""
    return {} if family is None else dict(zip(family.others, family.comparisons, strict=True))


def span(interval: estimation.ConfidenceInterval, digits: int = 3) -> str:
    """The ends of an interval as text."""
    return span_of(interval.low, interval.high, digits)


def span_of(low: float | None, high: float | None, digits: int = 3) -> str:
    """Two ends as text; a dash without them."""
    if low is None or high is None:
        return UNDEFINED
    return f"{number(low, digits)} to {number(high, digits)}"


def p_text(p: float | None) -> str:
    """A p-value as text; what rounds to nothing is a bound."""
    return UNDEFINED if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def verdict_of(verdict: estimation.Verdict | None) -> str:
    """What SegQC is beside a method: better, worse or a tie; a dash where nothing can be said."""
    return UNDEFINED if verdict is None or verdict.outcome is None else verdict.outcome


# ---------------------------------------------------------------------------------------------------------- estimates


def main_table(result: ExperimentResult, structure: str) -> Table | None:
    """3D Dice: every method's errors and correlations, and whether SegQC is better."""
    verdicts = verdicts_of(find_compared(result, structure, "dice", "3D", "mae"))
    rows: list[tuple[Cell, ...]] = []
    scores = None
    for method in methods_of(result, structure):
        row = find_row(result, structure, method)
        if row is None:
            continue
        scores = row.calibrated
        rows.append(
            (
                method,
                row.calibrated.mae,
                span(row.mae),
                row.raw.mae,
                row.calibrated.pearson,
                row.calibrated.spearman,
                row.calibrated.aurc_excess,
                UNDEFINED if method == SEGQC else verdict_of(verdicts.get(method)),
            )
        )
    if scores is None:
        return None
    note = (
        f"{result.masks} masks of {result.patients} patients; true Dice "
        f"{span_of(scores.truth_min, scores.truth_max, 2)}, standard deviation {number(scores.truth_sd)}. MAE: "
        "mean absolute error after calibration (a line, where it helps) on patients of the training side that the "
        "method has not seen, with its 95% interval (bootstrap by patient); raw MAE: before it, but with the "
        "calibrated maps of SegQC, SegQC-TR and scan only. Always answering the median of "
        f"these very truths, which nobody knows beforehand, would give an MAE of {number(scores.median_mae)}. "
        "Excess AURC: area under the risk-coverage curve above that of the perfect order. SegQC is: by the "
        "difference in MAE, sign-flip test by patient after Holm's adjustment."
    )
    return Table(
        f"main-{result.experiment}-{slug(structure)}",
        f"Estimated 3D Dice of {structure}, {title_of(result)}",
        ("method", "MAE", "95% interval", "raw MAE", "Pearson", "Spearman", "excess AURC", "SegQC is"),
        tuple(rows),
        {"excess AURC": 4},
        note,
        {**_BEST_ESTIMATES, "excess AURC": "lowest"},  # type: ignore[dict-item]
    )


def metric_tables(result: ExperimentResult, structure: str) -> Iterator[Table]:
    """MAE and Pearson of every metric, 3D and 2D (paper, tables 1, 2 and 4), and 2D by which slices count."""
    kinds: tuple[tuple[Dimension, str | None], ...] = (("3D", None), ("2D", "mask"))
    measured = [(f"{SHOWN[m]} {d}", m, d, s) for d, s in kinds for m in METRIC_NAMES]
    for kind, aim in (("mae", "lowest"), ("pearson", "highest")):
        rows = []
        for method in methods_of(result, structure):
            found = [find_row(result, structure, method, m, d, s) for _, m, d, s in measured]
            cells = [None if r is None else getattr(r.calibrated, kind) for r in found]
            if any(cell is not None for cell in cells):
                rows.append((method, *cells))
        if rows:
            title = "Mean absolute error" if kind == "mae" else "Pearson correlation"
            yield Table(
                f"{kind}-{result.experiment}-{slug(structure)}",
                f"{title} of every metric of {structure}, {title_of(result)}",
                ("method", *(name for name, *_ in measured)),
                tuple(rows),
                note=(
                    "After calibration. ARVD is the summed difference over the truth's size (the paper's "
                    "definition), RVD the signed difference of the volumes. 2D: slices where the mask is not "
                    "empty, so that there is something to assess; the next table has the others. All methods are "
                    "scored on the same masks and slices: those that all of them say something of. A dash: the "
                    "method says nothing of it."
                ),
                best={name: aim for name, *_ in measured},  # type: ignore[misc]
            )
    yield from _slices_table(result, structure)


def _slices_table(result: ExperimentResult, structure: str) -> Iterator[Table]:
    choices: tuple[tuple[str, MetricName, str], ...] = (
        ("Dice, mask", "dice", "mask"),
        ("Dice, either", "dice", "all"),
        ("ARVD, mask", "arvd", "mask"),
        ("ARVD, large", "arvd", "large"),
    )
    rows, count = [], dict[str, tuple[int, int]]()
    for method in methods_of(result, structure):
        found = [find_row(result, structure, method, m, "2D", s) for _, m, s in choices]
        if any(r is not None for r in found):
            rows.append(
                (
                    method,
                    *(None if r is None else r.calibrated.mae for r in found),
                    *(None if r is None else r.calibrated.pearson for r in found[:2]),
                    None if found[1] is None else found[1].calibrated.n,
                )
            )
            count |= {
                name: (r.calibrated.n, r.calibrated.left_out)
                for (name, _, s), r in zip(choices, found, strict=True)
                if r is not None and s != "all"
            }
    if not rows:
        return
    names = [name for name, *_ in choices]
    columns = ("method", *names, "Pearson, mask", "Pearson, either", "n, either")
    counted = "; ".join(f"{name}: {n} ({out} left out)" for name, (n, out) in count.items())
    yield Table(
        f"slices-{result.experiment}-{slug(structure)}",
        f"2D errors of {structure} by which slices count, {title_of(result)}",
        columns,
        tuple(rows),
        note=(
            "MAE after calibration, then Pearson of the 2D Dice. Mask: slices where the mask is not empty; "
            f"either: mask or truth; large: at least 20 truth voxels. Numbers of slices: {counted}; left out is what "
            "is undefined for one of the methods (an ARVD of an empty truth). Either: all that the method speaks of, "
            "with their number. Where only the truth is not empty, the true Dice is 0 however little is missing; such "
            "slices rule averages that count them. ARVD is ruled by slices with a tiny truth, unless only those with "
            "at least 20 truth voxels count."
        ),
        best={name: "highest" if name.startswith("Pearson") else "lowest" for name in columns[1:-1]},
    )


def comparison_tables(result: ExperimentResult, structure: str) -> Iterator[Table]:
    """SegQC against every other method: differences of MAE and Spearman of the Dice, and verdicts for all metrics."""
    for dimension in ("3D", "2D"):
        table = _differences(result, structure, "3D" if dimension == "3D" else "2D")
        if table is not None:
            yield table
    families = {
        f"{SHOWN[m]} {d} {'MAE' if s == 'mae' else 'rank'}": verdicts_of(find_compared(result, structure, m, d, s))
        for d in ("3D", "2D")
        for m in ("dice", "iou", "arvd")
        for s in ("mae", "spearman")
    }
    methods = [m for m in methods_of(result, structure) if any(m in family for family in families.values())]
    if methods:
        yield Table(
            f"verdicts-{result.experiment}-{slug(structure)}",
            f"Is SegQC better? All metrics of {structure}, {title_of(result)}",
            ("method", *families),
            tuple((m, *(verdict_of(family.get(m)) for family in families.values())) for m in methods),
            note=(
                "What SegQC is beside the method: better or worse where the p-value is at most 0.05 after Holm's "
                "adjustment over the methods; all else is a tie, which is no proof that they are equal. Rank: Spearman."
            ),
        )


def _differences(result: ExperimentResult, structure: str, dimension: Dimension) -> Table | None:
    families = [find_compared(result, structure, "dice", dimension, s) for s in ("mae", "spearman")]
    found = [(comparisons_of(family), verdicts_of(family)) for family in families]
    rows: list[tuple[Cell, ...]] = []
    for method in methods_of(result, structure):
        cells: list[Cell] = []
        for comparisons, verdicts in found:
            if method not in comparisons:
                cells += [None, UNDEFINED, UNDEFINED, UNDEFINED]
            else:
                difference, verdict = comparisons[method].difference, verdicts[method]
                cells += [difference.value, span(difference), p_text(verdict.p_holm), verdict_of(verdict)]
        if any(method in comparisons for comparisons, _ in found):
            rows.append((method, *cells))
    if not rows:
        return None
    return Table(
        f"comparisons-{dimension.lower()}-{result.experiment}-{slug(structure)}",
        f"SegQC against the others: {dimension} Dice of {structure}, {title_of(result)}",
        (
            "method", "MAE diff.", "95% interval", "p (Holm)", "SegQC is",
            "rank diff.", "95% (rank)", "p (rank)", "by rank",
        ),
        tuple(rows),
        note=(
            "Differences are SegQC minus the method: below zero in MAE, and above zero in Spearman, is SegQC's favour. "
            "Intervals: bootstrap by patient, the same patients for both. p: sign-flip test by patient (MAE), "
            f"bootstrap (Spearman), after Holm's adjustment over {max(len(verdicts) for _, verdicts in found)} methods."
        ),
    )  # fmt: skip


def shared_table(result: ExperimentResult, structure: str) -> Table | None:
    """Whether methods err on the same patients."""
    here = [s for s in result.shared if s.structure == structure and s.method not in VARIANTS]
    if len(here) < 2:
        return None
    return Table(
        f"shared-{result.experiment}-{slug(structure)}",
        f"Whose errors they are: 3D Dice of {structure}, {title_of(result)}",
        ("method", "patients' share", "correlation with SegQC's"),
        tuple(
            (s.method, s.errors.patient_share, UNDEFINED if s.method == SEGQC else s.errors.correlation) for s in here
        ),
        2,
        "Patients' share: how much of a method's squared error about its mean lies between patients and not between "
        "masks of one. Correlation: of the patients' mean errors with those of SegQC. Where methods without a network "
        "in common err on the same patients, the truths of these differ from what the training side makes one expect, "
        "and no better method of the kind would help.",
    )


def bad_masks_table(result: ExperimentResult, structure: str) -> Table | None:
    """Whether looking at the mask helps where it is bad: SegQC against estimates of the truth without the mask."""
    named: tuple[tuple[Family, str], ...] = (
        ("bad masks", f"under {BAD_UNDER:g}"), ("good masks", f"{BAD_UNDER:g} and more"),
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for family, name in named:
        found = find_compared(result, structure, family=family)
        verdicts = verdicts_of(found)
        for method, c in comparisons_of(found).items():
            verdict = verdicts[method]
            if c.n:
                cells = (c.difference.value, span(c.difference), p_text(verdict.p_holm), verdict_of(verdict))
                rows.append((name, method, c.n, c.patients, c.first, c.second, *cells))
    if not rows:
        return None
    return Table(
        f"bad-masks-{result.experiment}-{slug(structure)}",
        f"What the mask adds, by quality: 3D Dice of {structure}, {title_of(result)}",
        ("true Dice", "method", "masks", "patients", "MAE of SegQC", "its MAE", "MAE diff.", "95% interval", "p (Holm)",
         "SegQC is"),
        tuple(rows),
        note=(
            "SegQC against the estimates of the truth that never see the mask, on bad and on good masks apart. "
            "Differences are SegQC minus the method; sign-flip test by patient, adjusted over the two methods."
        ),
        group="true Dice",
    )  # fmt: skip


def strata_table(result: ExperimentResult, structure: str) -> Table | None:
    """The error of the 3D Dice by how good the mask truly is."""
    found = [(m, find_row(result, structure, m)) for m in CONTROL]
    shown = [(m, row) for m, row in found if row is not None and row.strata]
    if not shown:
        return None
    rows: list[tuple[Cell, ...]] = []
    for i, stratum in enumerate(shown[0][1].strata):
        if stratum.scores.n:
            low, high = stratum.low, stratum.high
            name = f"under {high:g}" if low is None else f"{low:g} and more" if high is None else f"{low:g} to {high:g}"
            scores = [row.strata[i].scores for _, row in shown]
            rows.append((name, scores[0].n, scores[0].patients, *(s.mae for s in scores), scores[0].bias))
    return Table(
        f"strata-{result.experiment}-{slug(structure)}",
        f"MAE of the 3D Dice of {structure} by quality, {title_of(result)}",
        ("true Dice", "masks", "patients", *(m for m, _ in shown), f"bias of {shown[0][0]}"),
        tuple(rows),
        note=(
            "After calibration. The strata are of the truth: a bias towards the middle (bad masks estimated too "
            "good, good ones too bad) is natural in them."
        ),
    )


# ------------------------------------------------------------------------------------------------- orders of correction


def order_table(result: ExperimentResult, structure: str, dimension: Dimension) -> Table | None:
    """The share of the optimal order's gain over random that each order captures."""
    ordered = next((o for o in result.ordered if (o.structure, o.dimension) == (structure, dimension)), None)
    if ordered is None:
        return None
    comparison = ordered.comparison
    differences = {d.second: d for d in comparison.differences}
    verdicts = {d.second: v for d, v in zip(comparison.differences, comparison.verdicts, strict=True)}
    rows: list[tuple[Cell, ...]] = []
    method_of, further = order_methods(), (SEGQC, EXTRACTED_MAP, TTA, SCAN_ONLY, CROSS_FITTED)
    for order in comparison.orders:
        method = method_of.get(order.name, order.name)
        if method in VARIANTS or (method != order.name and method not in further):
            continue
        found, verdict = differences.get(order.name), verdicts.get(order.name)
        rows.append(
            (
                order.name,
                order.captured.value,
                span(order.captured, 2),
                None if found is None else found.difference.value,
                UNDEFINED if verdict is None else p_text(verdict.p_holm),
                verdict_of(verdict),
            )
        )
    what = "scans" if dimension == "3D" else "slices, pooled over the scans,"
    extra = "" if dimension == "3D" else (
        " A method's own order: a slice's sum of errors (TTA's and softmax entropy's: of entropies) as a share of its "
        "scan's size, about what correcting it adds to the scan's Dice; within a scan that is the order of the sums. "
        "Error sum, TTA entropy: the plain sums. EE: after error extraction. These are shown for SegQC, TTA and the "
        "closest rivals only."
    )  # fmt: skip
    return Table(
        f"orders-{dimension.lower()}-{result.experiment}-{slug(structure)}",
        f"Orders of correcting {'scans' if dimension == '3D' else 'slices'} of {structure}, {title_of(result)}",
        ("order", "captured", "95% interval", "SegQC minus it", "p (Holm)", "SegQC is"),
        tuple(rows),
        {"captured": 3, "SegQC minus it": 3},
        f"{comparison.units} {what} of {comparison.masks} masks. Captured: the share of the optimal order's gain over "
        "random (area under the curve of the mean true Dice): 1 is optimal, 0 random, below 0 worse than random."
        f"{extra} p: bootstrap by patient, after Holm's adjustment over {len(differences)} orders, each method's main "
        "one.",
    )


# ------------------------------------------------------------------------------------------------- boxes and error maps


def at_threshold(detected: Detected, threshold: float = THRESHOLD) -> tuple[DetectionScores, ...]:
    """A method's scores at one threshold (the nearest there is), by rising IoU."""
    known = {s.threshold for s in detected.boxes if s.threshold is not None}
    if not known:
        return tuple(sorted(detected.boxes, key=lambda s: s.min_iou))
    nearest = min(known, key=lambda t: (abs(t - threshold), t))
    return tuple(sorted((s for s in detected.boxes if s.threshold == nearest), key=lambda s: s.min_iou))


def detection_tables(result: ExperimentResult, structure: str) -> Iterator[Table]:
    """Boxes of SegQC at every IoU, with and without extraction (paper, table 3), over probabilities, of all methods."""
    here = [d for d in result.detected if d.structure == structure and d.method not in VARIANTS]
    made = (_boxes_of_segqc, _boxes_over_probabilities, _boxes_of_all)
    yield from (table for make in made if (table := make(result, structure, here)) is not None)


def _boxes_of_segqc(result: ExperimentResult, structure: str, here: Sequence[Detected]) -> Table | None:
    rows: list[tuple[Cell, ...]] = []
    for detected in (d for d in here if d.method == SEGQC):
        rows += [_boxes_row(f"map {detected.predicted}, truth {detected.true}", s) for s in at_threshold(detected)]
    extracted = _both_extracted(here, SEGQC)
    if extracted is not None and extracted.chosen is not None:
        chosen = at_threshold(extracted, extracted.chosen)
        rows += [_boxes_row(f"both extracted, probability {extracted.chosen:g}", s) for s in chosen]
    if not rows:
        return None
    return Table(
        f"detection-{result.experiment}-{slug(structure)}",
        f"Error boxes of SegQC on {structure}, {title_of(result)}",
        ("boxes of", "IoU", "precision", "95% interval", "recall", "95% interval (recall)", "paired", "predicted",
         "true"),
        tuple(rows),
        {"IoU": 2, "precision": 2, "recall": 2},
        f"At an error probability of {THRESHOLD:g}, and at the one chosen on the masks that calibrate, the lowest "
        "with the wanted precision there. IoU: from which overlap on a predicted and a true box are "
        "a pair. Extracted: after error extraction, of the error map and of D, the true error. Intervals by "
        "patient.",
        group="boxes of",
    )  # fmt: skip


def _boxes_over_probabilities(result: ExperimentResult, structure: str, here: Sequence[Detected]) -> Table | None:
    extracted = _both_extracted(here, SEGQC)
    if extracted is None:
        return None
    return Table(
        f"detection-thresholds-{result.experiment}-{slug(structure)}",
        f"Error boxes of SegQC over error probabilities: {structure}, {title_of(result)}",
        ("probability", "IoU", "precision", "recall", "paired", "predicted", "true"),
        tuple(
            (s.threshold, s.min_iou, s.precision.value, s.recall.value, s.matched, s.predicted, s.true)
            for s in extracted.boxes
        ),
        2,
        "After error extraction, of the map and of D; a voxel belongs to a box from this probability on.",
        group="probability",
    )


def _boxes_of_all(result: ExperimentResult, structure: str, here: Sequence[Detected]) -> Table | None:
    by_method: dict[str, list[Cell]] = {}
    lowest = None
    for method in dict.fromkeys(d.method for d in here):
        cells: list[Cell] = []
        for kind in ("raw", "extracted"):
            found = [d for d in here if (d.method, d.predicted, d.true) == (method, kind, kind)]
            scores = at_threshold(found[0])[:1] if found else ()
            if scores:
                lowest = scores[0].min_iou
            cells += [scores[0].precision.value, scores[0].recall.value] if scores else [None, None]
        both = _both_extracted(here, method)
        if both is not None and both.chosen is not None:
            at_chosen = at_threshold(both, both.chosen)[0]
            cells += [both.chosen, at_chosen.precision.value, at_chosen.recall.value]
        else:
            cells += [None] * 3
        by_method[method] = cells
    if lowest is None or len(by_method) < 2:
        return None
    return Table(
        f"detection-methods-{result.experiment}-{slug(structure)}",
        f"Error boxes of all methods with an error map on {structure}, {title_of(result)}",
        ("method", "precision", "recall", "precision, extracted", "recall, extracted", "chosen probability",
         "precision, chosen", "recall, chosen"),
        tuple((method, *cells) for method, cells in by_method.items()),
        2,
        f"At an IoU of {lowest:g} and an error probability of {THRESHOLD:g}; extracted: boxes of the extracted map "
        "against those of extracted D; chosen: the same at a probability chosen on the masks that calibrate.",
    )  # fmt: skip


def _both_extracted(here: Sequence[Detected], method: str) -> Detected | None:
    wanted = (method, "extracted", "extracted")
    return next((d for d in here if (d.method, d.predicted, d.true) == wanted), None)


def _boxes_row(name: str, s: DetectionScores) -> tuple[Cell, ...]:
    return (name, s.min_iou, s.precision.value, span(s.precision, 2), s.recall.value, span(s.recall, 2), s.matched,
            s.predicted, s.true)  # fmt: skip


def error_map_table(result: ExperimentResult, structure: str) -> Table | None:
    """How well the error maps show the wrong voxels; false positives (mask without truth) and negatives apart."""
    here = [m for m in result.mapped if m.structure == structure and m.method not in VARIANTS]
    rows: list[tuple[Cell, ...]] = []
    for extracted in (False, True):
        for method in dict.fromkeys(m.method for m in here):
            found = {m.errors: m.scores for m in here if (m.method, m.extracted) == (method, extracted)}
            every, positive, negative = (found.get(e) for e in ("all", "false positive", "false negative"))
            if every is None:
                continue
            rows.append(
                (
                    "after extraction" if extracted else "as it is",
                    method,
                    every.pooled_dice.value,
                    span(every.pooled_dice, 2),
                    every.mean_dice.value,
                    every.average_precision.value,
                    None if positive is None else positive.pooled_dice.value,
                    None if positive is None else positive.average_precision.value,
                    None if negative is None else negative.pooled_dice.value,
                    None if negative is None else negative.average_precision.value,
                )
            )
    if not rows:
        return None
    numbers = ("Dice, pooled", "Dice, mean", "AP", "FP Dice", "FP AP", "FN Dice", "FN AP")
    return Table(
        f"error-maps-{result.experiment}-{slug(structure)}",
        f"Error maps against the true error, voxel by voxel: {structure}, {title_of(result)}",
        ("map", "method", "Dice, pooled", "95% interval", *numbers[1:]),
        tuple(rows),
        note=(
            "Dice of the voxels with an error probability of at least 0.5 with the wrong ones: over all masks "
            "together, and the mean of the masks' own. AP: average precision over all voxels. FP: voxels of the "
            "mask that the truth lacks; FN: voxels that the mask lacks. After extraction: of the map and of the "
            "true error."
        ),
        best={name: "highest" for name in numbers},
        group="map",
    )


# -------------------------------------------------------------------------------------------------- variants, coverage


def ablation_table(result: ExperimentResult, structure: str) -> Table | None:
    """What each part of the recipe does: variants of SegQC beside it (paper, table 5)."""
    variants = variants_of(result)
    if not variants:
        return None
    verdicts = verdicts_of(find_compared(result, structure))
    for first in (SEGQC, ONE_NETWORK):
        verdicts |= verdicts_of(find_compared(result, structure, family="variants", first=first))
    methods = (SEGQC, SCAN_ONLY, *OWN[1:], *variants)
    rows = [row for m in methods if (row := _variant(result, structure, m, verdicts.get(m))) is not None]
    best = {
        "training side": "lowest",
        "raw MAE": "lowest",
        "MAE": "lowest",
        "Pearson": "highest",
        "2D MAE": "lowest",
        "2D Pearson": "highest",
    }
    return Table(
        f"ablations-{result.experiment}-{slug(structure)}",
        f"Variants of SegQC: Dice of {structure}, {title_of(result)}",
        ("variant", "training side", "raw MAE", "MAE", "95% interval", "Pearson", "2D MAE", "2D Pearson", "3D order",
         "2D order", "beside", "that is"),
        tuple(rows),
        note=(
            "Training side: the MAE on the calibrating masks, by networks that have not seen their patients; a recipe "
            "is to be chosen by such errors, never by the test masks'. MAE after calibration, raw MAE before it. "
            "Orders: share of the optimal gain captured. Variants that are "
            "trained anew are one fold's network and are compared with 'SegQC, one network', the same fold of the "
            "recipe, calibrated on the same masks. That is: whether this one is better than the variant. 'scan only' "
            "has never seen a mask, 'no flips', 'mask always shown' and 'mask never shown' are SegQC's own networks, "
            "asked otherwise: what SegQC is better by is what the mask input adds. SegQC-TR learns from one "
            "network's masks and their augmentations, 'median masks only' from their median (the paper's table 5: "
            "beside 'SegQC-TR, one network'). 'in-sample masks' has a leak on purpose: its training masks are of "
            "networks that knew the scans. 'soft input' sees the soft output of the mask's source network as well."
        ),
        best=best,  # type: ignore[arg-type]
    )  # fmt: skip


def _variant(
    result: ExperimentResult, structure: str, method: str, verdict: estimation.Verdict | None
) -> tuple[Cell, ...] | None:
    """A variant's row among the ablations; None where it says nothing of the 3D Dice."""
    dice = find_row(result, structure, method)
    if dice is None:
        return None
    slices = find_row(result, structure, method, "dice", "2D", "mask")
    captured = [
        next((o.captured.value for o in ordered.comparison.orders if o.name == method), None)
        for dimension in ("3D", "2D")
        for ordered in result.ordered
        if (ordered.structure, ordered.dimension) == (structure, dimension)
    ]
    return (
        method,
        dice.training_mae,
        dice.raw.mae,
        dice.calibrated.mae,
        span(dice.mae),
        dice.calibrated.pearson,
        None if slices is None else slices.calibrated.mae,
        None if slices is None else slices.calibrated.pearson,
        *captured,
        ONE_NETWORK if method in VARIANTS and one_network(method) else SEGQC,
        UNDEFINED if method in (SEGQC, ONE_NETWORK) else verdict_of(verdict),
    )


def coverage_tables(result: ExperimentResult, structures: Sequence[str], kinds: Sequence[str]) -> list[Table]:
    """How often prediction intervals hold the truth: of the 3D Dice in strata, and of the other 3D metrics.

    Args:
        result: of the experiment.
        structures: to show.
        kinds: those of `COVERAGE_KINDS` to show.
    """
    shown = [c for c in result.covered if c.structure in structures and c.kind in kinds]
    # a stratum without masks is nothing to report, a group that can't be tested is
    dice = [c for c in shown if c.metric == "dice" and (c.coverage.patients or not _in_strata(c))]
    others = [c for c in shown if c.metric != "dice"]
    if not dice:
        return []
    level = f"{dice[0].coverage.level:.0%}"
    columns = ("tested", "stratum", "coverage", "error", "width", "patients", "masks", "splits")
    return [
        Table(
            f"coverage-{result.experiment}",
            f"How often {level} intervals of the 3D Dice hold the truth, {title_of(result)}",
            ("structure", *columns),
            tuple((c.structure, *_coverage_row(c)) for c in dice),
            note=(
                "Random splits: calibrated on some patients of the training side, tested on its others. On "
                "this experiment's masks: calibrated on the whole training side. Groups: calibrated on the patients "
                "of all other groups, tested on this one's. Calibrated on: another structure, of other patients. "
                "Strata are of the true Dice. Error: binomial, with patients as trials. A dash: not enough patients "
                f"for an interval. The promise of {level} holds on average over masks like those calibrated on, not in "
                "every stratum, and not under shift."
            ),
            group="structure",
        ),
        Table(
            f"coverage-metrics-{result.experiment}",
            f"How often {level} intervals of the other 3D metrics hold the truth, {title_of(result)}",
            ("structure", "metric", *columns),
            tuple((c.structure, SHOWN[c.metric], *_coverage_row(c)) for c in others),
            note="As the table before, but over all masks. Masks without a defined number are left out.",
            group="structure",
        ),
    ]


def _in_strata(covered: Covered) -> bool:
    """Whether a coverage is of one quality stratum."""
    return covered.kind in ("resplit", "test") and covered.stratum != ALL


def _coverage_row(covered: Covered) -> tuple[Cell, ...]:
    c = covered.coverage
    return (
        COVERAGE_KINDS[covered.kind], covered.stratum, c.coverage, c.error, c.width, c.patients, c.masks, c.resplits
    )  # fmt: skip


def cost_table(results: Sequence[ExperimentResult]) -> Table | None:
    """Seconds of one estimate, by method and experiment."""
    methods = [m for m in dict.fromkeys(m for r in results for m in r.seconds) if m not in VARIANTS]
    if not methods:
        return None
    return Table(
        "cost",
        "Seconds of one estimate",
        ("method", *(r.experiment for r in results)),
        tuple((m, *(r.seconds.get(m) for r in results)) for m in methods),
        3,
        "Median over the masks, on the machine of the run, without reading files. With several masks of one scan "
        "in a row, what depends on the scan only is computed once: the column of the served network, one mask per "
        "scan, says more.",
    )


def joined(names: Iterable[str], most: int = 20) -> str:
    """Names as a list in a sentence."""
    listed = list(names)
    if len(listed) > most:
        return f"{', '.join(listed[:most])} and {len(listed) - most} more"
    return " and ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)


def number(value: float | None, digits: int = 3) -> str:
    """A number as text; a dash where it is undefined."""
    if value is None:
        return UNDEFINED
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")
