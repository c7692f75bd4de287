"""The loop: rounds and bundles, what estimates were worth, who corrected what, and what runs now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import APIRouter, Path, Response

from segqc.errors import SegqcError
from segqc.loop.due import RoundsInfo, next_round_sentence, rounds_info
from segqc.loop.publishing import BundleStatus
from segqc.loop.rounds import ROUND_COLUMNS, summaries
from segqc.quality.drift import drift_sentence
from segqc.quality.report_card import WORST, Figures, ReportCard, messages
from segqc.server.context import AppContext
from segqc.server.errors import RequestError
from segqc.server.pages import charts
from segqc.server.pages.charts import EstimatePoint, PointKind
from segqc.server.pages.now import ShownJob, now_shown
from segqc.server.pages.page import AskedPage, Columns, csv_file
from segqc.server.routers.rounds import start_round
from segqc.store import assessments, corrections, jobs, leases, rounds
from segqc.store.database import Transaction
from segqc.store.records import AnnotatorWork, CheckedEstimate, CorrectionLine, Cost, JobRecord, PublishedBundle
from segqc.types import PredictionInterval, bounds

router = APIRouter(include_in_schema=False)

_LAST_CORRECTIONS: Final = 15
_LAST_ROUNDS: Final = 30
_BAND_SCANS: Final = 500  # whose intervals the band is made of


@dataclass(frozen=True, slots=True)
class Now:
    """What runs, and what the next round waits for.

    Attributes:
        jobs: that run or wait.
        last: the job that ended last, where none runs.
        info: of rounds.
        next_round: when the next one begins by itself, in a sentence.
        wanted: patients with a final label that a training needs.
        labelled: patients that have one.
        is_round_open: whether a round or a training runs or waits already.
    """

    jobs: list[ShownJob]
    last: JobRecord | None
    info: RoundsInfo
    next_round: str
    wanted: int
    labelled: int
    is_round_open: bool

    @property
    def refusal(self) -> str | None:
        """Why no round can be begun now, in a sentence; None where one can."""
        if self.is_round_open:
            return "A round or a training runs or waits already."
        if self.labelled < self.wanted:
            return f"A round needs final labels of {self.wanted} patients; there are {self.labelled}."
        return None


def _now(context: AppContext) -> Now:
    from segqc.loop.requests import KINDS, NETWORKS

    open_jobs = now_shown()
    with context.dataset.store.read() as transaction:
        info = rounds_info(transaction, context.settings.round)
        ended = [job for kind in KINDS for job in jobs.listing(transaction, kind, most=1) if job.ended_at is not None]
        labelled = rounds.labelled_patients(transaction)
    return Now(
        jobs=open_jobs,
        last=max(ended, key=lambda job: job.id, default=None),
        info=info,
        next_round=next_round_sentence(info),
        wanted=max(context.settings.training_settings(network).min_cases for network in NETWORKS),
        labelled=labelled,
        is_round_open=any(shown.job.kind in ("round", "train") for shown in open_jobs),
    )


@router.get("/loop")
def show_loop(page: AskedPage) -> Response:
    """Show the loop."""
    context = page.app.context
    store = context.dataset.store
    with store.read() as transaction:
        found = summaries(transaction)
        points = _points(transaction, context)
        intervals = _intervals(transaction, points)
        workers = corrections.by_annotator(transaction)
        last = corrections.lines(transaction, most=_LAST_CORRECTIONS)
        costs = [cost for cost in leases.costs(transaction) if cost.handed_out]
    card, alarm = context.dataset.report_card(), context.dataset.drift_alarm()
    held = [p.is_held for p in points if p.is_held is not None]
    measured = [(f"round {s.number}", s.validation_dice) for s in found if s.validation_dice is not None]
    return page.render(
        "loop.html.jinja",
        now_shown=_now(context),
        rounds=found[::-1][:_LAST_ROUNDS],
        line=charts.line(measured) if len(measured) > 1 else None,
        bundles=context.dataset.bundles.listing()[::-1],
        points=points,
        chart=charts.scatter(points, intervals) if points else None,
        held=sum(held),
        with_interval=len(held),
        card=card,
        messages=_messages(card),
        drift=drift_sentence(alarm) if alarm is not None else None,
        annotators=workers,
        has_attention=any(w.attention is not None and w.attention.submitted for w in workers),
        busiest=max((w.corrections for w in workers), default=1),
        corrections=last,
        costs=costs,
        jobs=now_shown(),
    )


def _messages(card: ReportCard | None) -> list[str]:
    return list(messages(card)) if card is not None else []


def _points(transaction: Transaction, context: AppContext) -> list[EstimatePoint]:
    """The estimates whose truth is known: those of the report card, of audits, and of other corrections."""
    card = context.dataset.report_card()
    points = [
        EstimatePoint(scan=s.scan, structure=WORST, kind="check", estimated=s.estimated, true=s.true)
        for s in (card.scans if card is not None else ())
    ]
    audits = corrections.audited(transaction)
    known = {(a.scan, a.label, a.structure) for a in audits}
    for checked in corrections.checked_estimates(transaction):
        kind: PointKind = "audit" if (checked.scan, checked.label, checked.structure) in known else "other"
        if (point := _point(checked, kind)) is not None:
            points.append(point)
    return points


def _point(checked: CheckedEstimate, kind: PointKind) -> EstimatePoint | None:
    if checked.estimated.dice is None or checked.true.dice is None:
        return None
    return EstimatePoint(
        scan=checked.scan,
        structure=checked.structure,
        kind=kind,
        estimated=checked.estimated.dice,
        true=checked.true.dice,
        interval=checked.intervals.dice,
    )


def _intervals(transaction: Transaction, points: list[EstimatePoint]) -> list[tuple[float, PredictionInterval]]:
    """The intervals that are known, with the estimates that they belong to."""
    own = [(p.estimated, p.interval) for p in points if p.interval is not None]
    return own + assessments.ranking_estimates(transaction, _BAND_SCANS)


@router.get("/loop/now")
def now_fragment(page: AskedPage) -> Response:
    """Tell what runs now, as a part of the page."""
    return page.render("now.html.jinja", now_shown=_now(page.app.context))


@router.get("/pages/status")
def status_fragment(page: AskedPage) -> Response:
    """Tell what runs now in a few words, as a part of every page."""
    return page.render("status.html.jinja", jobs=now_shown())


@router.post("/loop/round")
def begin_round(page: AskedPage) -> Response:
    """Put a round into the queue."""
    if (refusal := _now(page.app.context).refusal) is not None:
        raise RequestError(409, refusal)
    try:
        answer = start_round(page.user, {})
    except SegqcError as error:
        return page.go("/loop", str(error), problem=True)
    note = answer.get("note")
    return page.go("/loop", str(note) if note else "The round is put: a worker begins it within seconds.")


@router.post("/loop/jobs/{public_id}/stop")
def stop_job(page: AskedPage, public_id: Annotated[str, Path(max_length=64)]) -> Response:
    """Stop a job."""
    store = page.app.context.dataset.store
    with store.write() as transaction:
        found = next((shown.job for shown in now_shown() if shown.job.public_id == public_id), None)
        if found is None:
            raise RequestError(404, f"no job {public_id[:64]!r} runs or waits any more.")
        job = jobs.stop(transaction, found.id, page.actor)
    if job.state == "stopped":
        return page.go("/loop", "The job was stopped before it began.")
    return page.go("/loop", "The job is told to stop; what it has finished is kept.")


# ------------------------------------------------------------------------------------------------------------- tables


@router.get("/loop/rounds.csv")
def rounds_csv(page: AskedPage) -> Response:
    """Send the rounds as a table."""
    with page.app.context.dataset.store.read() as transaction:
        return csv_file("rounds", ROUND_COLUMNS, summaries(transaction))


@router.get("/loop/estimates.csv")
def estimates_csv(page: AskedPage) -> Response:
    """Send estimated and true Dice as a table."""
    with page.app.context.dataset.store.read() as transaction:
        points = _points(transaction, page.app.context)
    return csv_file("estimates", _ESTIMATE_COLUMNS, points)


def _end(end: str) -> Callable[[EstimatePoint], object]:
    return lambda point: (bounds(point.interval) or {}).get(end)


_KINDS: Final[Mapping[PointKind, str]] = {"check": "report card", "audit": "audit draw", "other": "other correction"}
_ESTIMATE_COLUMNS: Final[Columns[EstimatePoint]] = {
    "scan": lambda point: point.scan,
    "structure": lambda point: point.structure,
    "kind": lambda point: _KINDS[point.kind],
    "estimated Dice": lambda point: point.estimated,
    "low": _end("low"),
    "high": _end("high"),
    "level": _end("level"),
    "true Dice": lambda point: point.true,
}


@router.get("/loop/bundles.csv")
def bundles_csv(page: AskedPage) -> Response:
    """Send the bundles as a table."""
    return csv_file("bundles", _BUNDLE_COLUMNS, page.app.context.dataset.bundles.listing())


def _published(cell: Callable[[PublishedBundle], object]) -> Callable[[BundleStatus], object]:
    return lambda status: cell(status.published) if status.published is not None else None


def _checked(cell: Callable[[Figures], object]) -> Callable[[BundleStatus], object]:
    def found(status: BundleStatus) -> object:
        report = status.files.manifest.report if status.files is not None else None
        figures = report.worst.figures if report is not None else None
        return cell(figures) if figures is not None else None

    return found


def _patients(status: BundleStatus) -> object:
    report = status.files.manifest.report if status.files is not None else None
    return report.worst.patients if report is not None else None


_BUNDLE_COLUMNS: Final[Columns[BundleStatus]] = {
    "bundle": lambda status: status.number,
    "published": _published(lambda published: published.published_at.isoformat(timespec="seconds")),
    "by": _published(lambda published: published.actor.name),
    "reason": _published(lambda published: published.reason),
    "segmentation": _published(lambda published: published.bundle.segmenter_version),
    "segqc": _published(lambda published: published.bundle.assessor_version),
    "serving": lambda status: status.published is not None and status.published.is_serving,
    "held because": _published(lambda published: published.held_because),
    "checked patients": _patients,
    "true Dice": _checked(lambda figures: figures.true_dice),
    "MAE": _checked(lambda figures: figures.dice.mae),
    "constant MAE": _checked(lambda figures: figures.dice.constant_mae),
    "Spearman": _checked(lambda figures: figures.spearman.value),
    "coverage": _checked(lambda figures: figures.coverage),
}


@router.get("/loop/annotators.csv")
def annotators_csv(page: AskedPage) -> Response:
    """Send what each annotator has corrected as a table."""
    with page.app.context.dataset.store.read() as transaction:
        return csv_file("annotators", _ANNOTATOR_COLUMNS, corrections.by_annotator(transaction))


_ANNOTATOR_COLUMNS: Final[Columns[AnnotatorWork]] = {
    "annotator": lambda work: work.actor.name,
    "known by": lambda work: work.actor.identified_by,
    "corrections": lambda work: work.corrections,
    "timed": lambda work: work.timed,
    "seconds": lambda work: work.seconds,
    "voxels changed": lambda work: work.voxels_changed,
    "slices changed": lambda work: work.slices_changed,
    "mean Dice before": lambda work: work.mean_dice_before,
    # not how many were planted: it would tell an annotator that the scan at hand holds one
    "planted errors": lambda work: work.attention.submitted if work.attention is not None else 0,
    "planted errors found": lambda work: work.attention.found if work.attention is not None else 0,
    "last": lambda work: work.last_at.isoformat(timespec="seconds"),
}


@router.get("/loop/corrections.csv")
def corrections_csv(page: AskedPage) -> Response:
    """Send all corrections as a table."""
    with page.app.context.dataset.store.read() as transaction:
        return csv_file("corrections", _CORRECTION_COLUMNS, corrections.lines(transaction))


_CORRECTION_COLUMNS: Final[Columns[CorrectionLine]] = {
    "scan": lambda line: line.scan,
    "seconds": lambda line: line.seconds,
    "voxels changed": lambda line: line.voxels_changed,
    "slices changed": lambda line: line.slices_changed,
    "dice before": lambda line: line.dice_before,
    "estimated dice": lambda line: line.estimated_dice,
    "draw": lambda line: line.draw,
    "simulated": lambda line: line.simulated,
    "from version": lambda line: line.from_version,
    "to version": lambda line: line.to_version,
    "boxes offered": lambda line: line.boxes_offered,
    "boxes taken": lambda line: line.boxes_taken,
    "annotator": lambda line: line.actor.name,
    "at": lambda line: line.made_at.isoformat(timespec="seconds"),
}


@router.get("/loop/costs.csv")
def costs_csv(page: AskedPage) -> Response:
    """Send what suggestions have cost as a table."""
    with page.app.context.dataset.store.read() as transaction:
        return csv_file("costs", _COST_COLUMNS, leases.costs(transaction))


_COST_COLUMNS: Final[Columns[Cost]] = {
    "draw": lambda cost: cost.draw,
    "handed out": lambda cost: cost.handed_out,
    "submitted": lambda cost: cost.submitted,
    "skipped": lambda cost: cost.skipped,
    "hours": lambda cost: cost.hours,
}
