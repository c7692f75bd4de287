"""The page of what not to conclude, from the facts of the sets that were evaluated (method, "Evaluation protocol")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from segqc.evaluation.data.manifest import Corrections, Selection
from segqc.evaluation.report.document import Point, Section, Table

_SELECTIONS: dict[Selection, str] = {
    "all": "every mask there was",
    "random": "drawn at random",
    "stratified": "equal numbers per quality bin",
    "worst-first": "worst first",
}
_TRUTHS: dict[Corrections, str] = {
    "none": "drawn without the mask",
    "real": "a person's corrections of the mask",
    "simulated": "a simulated annotator's corrections",
}


@dataclass(frozen=True, slots=True)
class EvaluatedSet:
    """The facts of one set of masks whose estimates are compared with truths.

    Attributes:
        name: what the report calls the set.
        patients, masks: their numbers.
        sources: who made the masks (networks, a person).
        sources_in_training: whether one of the sources also made masks that the estimator was trained on.
        true_range: the smallest and the largest true value of the metric.
        selection: how the masks were chosen.
        corrections: whether the truths are corrections of these very masks, and whose.
        seeds: trainings with different seeds behind the numbers.
        metric: the metric that range and errors are of.
        method: the method that ``mae`` is of.
        mae, constant_mae: the mean absolute error of the method, and of the best constant answer.
        compared: how many methods are compared.
        slices, missed_slices: slices that count in 2D averages, and those where only the mask is empty.
        after_training: whether methods had been trained before the masks were fixed.

    Raises:
        ValueError: if a count is impossible or the range is the wrong way round.
    """

    name: str
    patients: int
    masks: int
    sources: tuple[str, ...]
    sources_in_training: bool
    true_range: tuple[float, float]
    selection: Selection
    corrections: Corrections = "none"
    seeds: int = 1
    metric: str = "Dice"
    method: str = "SegQC"
    mae: float | None = None
    constant_mae: float | None = None
    compared: int = 1
    slices: int | None = None
    missed_slices: int | None = None
    after_training: bool = False

    def __post_init__(self) -> None:
        if min(self.patients, self.masks, self.seeds, self.compared) < 1 or self.masks < self.patients:
            raise ValueError(f"{self.name}: needs a patient, a seed, a method, and a mask per patient at least")
        if not self.true_range[0] <= self.true_range[1]:
            raise ValueError(f"{self.name}: the range of true values goes from low to high, got {self.true_range}")


def limitations(sets: Sequence[EvaluatedSet]) -> Section:
    """What a reader must not conclude: a table of the facts, and a paragraph per trap with the sets' own numbers.

    Traps that none of the sets has are left out.

    Args:
        sets: what was evaluated.

    Raises:
        ValueError: if there is no set.
    """
    if not sets:
        raise ValueError("the limitations need the facts of at least one evaluated set")
    points = tuple(point for trap in _TRAPS if (point := trap(sets)) is not None)
    intro = "Every number of this report holds for the masks in the table below. Before you use one elsewhere, read on."
    return Section("What not to conclude", (intro,), points, (_facts(sets),))


def _facts(sets: Sequence[EvaluatedSet]) -> Table:
    columns = (
        "set",
        "patients",
        "masks",
        "made by",
        "seen in training",
        "chosen",
        "truth",
        "metric",
        "from",
        "to",
        "seeds",
    )
    rows = tuple(
        (
            s.name,
            s.patients,
            s.masks,
            ", ".join(s.sources),
            "yes" if s.sources_in_training else "no",
            _SELECTIONS[s.selection],
            _TRUTHS[s.corrections],
            s.metric,
            *s.true_range,
            s.seeds,
        )
        for s in sets
    )
    note = (
        "Seen in training: whether a source of these masks also made masks that the estimator was trained on. "
        "From, to: the smallest and the largest true value."
    )
    return Table("evaluated-sets", "What was evaluated", columns, rows, 2, note)


def _range(sets: Sequence[EvaluatedSet]) -> Point:
    return Point(
        "A correlation is not a quality of the method alone",
        "Pearson's and Spearman's correlations depend on the range of the true values: the same errors give a high "
        "correlation on masks of all qualities and a low one on masks that are all good. Compare correlations within "
        "one set only, never between sets, papers or organs.",
        _each(sets, lambda s: f"true {s.metric} from {s.true_range[0]:.2f} to {s.true_range[1]:.2f}"),
    )


def _constant(sets: Sequence[EvaluatedSet]) -> Point:
    def compare(s: EvaluatedSet) -> str | None:
        if s.mae is None or s.constant_mae is None:
            return None
        nearer = "" if s.mae < s.constant_mae else ": here the estimate is no nearer to the truth"
        return f"the constant is wrong by {s.constant_mae:.3f}, {s.method} by {s.mae:.3f}{nearer}"

    return Point(
        "A small error can be no achievement",
        "Where all masks are about equally good, always answering their average is nearly right. Read every mean "
        "absolute error (MAE) beside that of the constant.",
        _each(sets, compare),
    )


def _patients(sets: Sequence[EvaluatedSet]) -> Point | None:
    several = [s for s in sets if s.masks > s.patients]
    if not several:
        return None
    return Point(
        "Several masks of one patient are not several patients",
        "They share the anatomy, the scan and its artefacts. The number that counts for certainty is the number of "
        "patients; a test or an interval over masks would be too sure, so both have to draw patients.",
        _each(several, lambda s: f"{s.masks} masks, but only {s.patients} patient{'' if s.patients == 1 else 's'}"),
    )


def _sources(sets: Sequence[EvaluatedSet]) -> Point:
    def describe(s: EvaluatedSet) -> str:
        seen = "some of whose masks it was trained on" if s.sources_in_training else "none of whose masks it trained on"
        return f"masks of {' and '.join(s.sources)}, {seen}"

    return Point(
        "The estimates hold for masks like those trained on",
        "An estimator learns the errors that its training masks have. Masks of another kind of network, of a person, "
        "of another scanner, protocol or disease can have errors that it has never seen, and it will not say so. Check "
        "it on some corrected scans of your own first.",
        _each(sets, describe),
    )


def _worst_first(sets: Sequence[EvaluatedSet]) -> Point:
    chosen = tuple(s.name for s in sets if s.selection == "worst-first")
    which = "The numbers of these sets are conditional on the choice:" if chosen else "No set here was chosen so."
    return Point(
        "Never average worst-first corrections",
        "Scans that were corrected worst first are those that the estimate called bad. Their average says nothing "
        "about the pool, and neither do errors, calibration or intervals computed from them: these need scans drawn "
        f"at random. {which}",
        chosen,
    )


def _stratified(sets: Sequence[EvaluatedSet]) -> Point | None:
    chosen = tuple(s.name for s in sets if s.selection == "stratified")
    if not chosen:
        return None
    return Point(
        "A stratified set is not what a clinic sees",
        "It holds as many bad masks as good ones, so that every quality is tested. Averages over it are not what to "
        "expect of a segmentation network in use, whose masks are mostly alike, and correcting the worst first gains "
        "more in it. Chosen so:",
        chosen,
    )


def _corrections(sets: Sequence[EvaluatedSet]) -> Point | None:
    kinds = {s.corrections for s in sets} - {"none"}
    if not kinds:
        return None
    text = []
    if "simulated" in kinds:
        text.append(
            "A simulated annotator is a program that repairs what it is told to, without fatigue, doubt or a taste of "
            "its own. It can compare orders of correction; it says nothing about time saved or how people correct."
        )
    if "real" in kinds:
        text.append(
            "A person who corrects starts from the mask, and leaves what looks good enough: the truth leans towards "
            "the mask, and an error that nobody noticed counts as right."
        )
    corrected = [s for s in sets if s.corrections != "none"]
    return Point(
        "A correction is not an independent truth", " ".join(text), _each(corrected, lambda s: _TRUTHS[s.corrections])
    )


def _truth(sets: Sequence[EvaluatedSet]) -> Point:
    return Point(
        "The truth is a drawing, too",
        "Where experts differ, a part of every difference between mask and truth is no error. A Dice of 1 cannot be "
        "reached then, and differences between methods that are smaller than those between experts have no meaning "
        "for a patient.",
    )


def _slices(sets: Sequence[EvaluatedSet]) -> Point:
    def count(s: EvaluatedSet) -> str | None:
        if s.missed_slices is None:
            return None
        return f"the mask alone is empty in {s.missed_slices}{'' if s.slices is None else f' of {s.slices}'} slices"

    return Point(
        "A 2D number has an edge",
        "In a slice where only the mask is empty the true Dice is 0, however little is missing, and an estimate that "
        "sees nothing missing is wrong by 1. Such slices, mostly at the ends of a structure, rule 2D averages: look "
        "whether a table counts them. ARVD is likewise ruled by slices with a tiny truth. A slice that is empty in "
        "both never counts.",
        _each(sets, count),
    )


def _order(sets: Sequence[EvaluatedSet]) -> Point | None:
    late = [s for s in sets if s.after_training]
    if not late:
        return None
    return Point(
        "Some masks were fixed late",
        "Test masks are to be fixed before anything is trained that is tested on them. Here methods had been trained "
        "already, for an experiment that was asked for earlier. Masks and trainings are functions of the data, the "
        "settings and the seed, so that the result is the same; but only a run that asks for all its experiments at "
        "once shows it.",
        _each(late, lambda s: "fixed after the trainings"),
    )


def _seeds(sets: Sequence[EvaluatedSet]) -> Point:
    return Point(
        "A training is a draw",
        "Intervals by patient say how other patients could change a number, not how another training could. Of that, "
        "one seed says nothing, and a few give a rough idea.",
        _each(sets, lambda s: f"{s.seeds} seed{'' if s.seeds == 1 else 's'}"),
    )


def _comparisons(sets: Sequence[EvaluatedSet]) -> Point | None:
    compared = max(s.compared for s in sets)
    if compared < 2:
        return None
    return Point(
        "The best of many is partly luck",
        f"Up to {compared} methods are compared, in several metrics or sets. The more comparisons, the more of them "
        "look like a difference by chance; p-values that are corrected for the number of methods are still not "
        "corrected for metrics, sets and structures. A bold number is the best one printed, and nothing else. Where "
        "the interval of a difference holds zero, the two are tied: a tie is no small win, and no proof that they are "
        "equal.",
    )


def _map(sets: Sequence[EvaluatedSet]) -> Point:
    return Point(
        "No box does not mean no error",
        "Boxes and error maps show where to look first. Part of the true errors has no box (the recall says how many), "
        "and part of the boxes holds no error. What lies outside of them has not been checked by anyone.",
    )


def _device(sets: Sequence[EvaluatedSet]) -> Point:
    return Point(
        "This is not a medical device",
        "It is research software for people who annotate scans. No estimate may decide that a mask needs no eye on it "
        "before it is used for a patient.",
    )


_TRAPS: tuple[Callable[[Sequence[EvaluatedSet]], Point | None], ...] = (
    _device,
    _constant,
    _range,
    _sources,
    _patients,
    _order,
    _seeds,
    _comparisons,
    _worst_first,
    _stratified,
    _corrections,
    _truth,
    _slices,
    _map,
)


def _each(sets: Sequence[EvaluatedSet], say: Callable[[EvaluatedSet], str | None]) -> tuple[str, ...]:
    """A line per set that has something to say."""
    return tuple(f"{s.name}: {text}." for s in sets if (text := say(s)) is not None)
