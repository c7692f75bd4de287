"""The commands `segqc score`, `segqc rank` and `segqc intervals`: estimates of all scans of a folder."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from segqc.cli.common import (
    ESTIMATE_PANEL,
    NOT_ENOUGH_DATA,
    AsCsv,
    AsJson,
    Cell,
    CommandError,
    ConfigFile,
    DatasetFolder,
    Row,
    brackets,
    dataset_at,
    emit,
    estimate,
    me,
    shown,
    shown_progress,
)

if TYPE_CHECKING:
    from segqc.loop.agreement import Agreement, Ranking
    from segqc.loop.dataset import Dataset
    from segqc.loop.drift import StructureDrift
    from segqc.selection import Strategy
    from segqc.types import Unlikeness

app = typer.Typer()

_SUGGESTION_TERMS: Final = (
    "ordered by: the strategy whose order chose the scan; another one than was asked for where that has nothing to go "
    "by yet. score: what it was chosen by, the lowest first; - where it was drawn or compared with others."
)
_NO_SUGGESTION: Final = "No scan of a training patient waits for a label and is free."
_AUDIT_TERMS: Final = (
    "audited patients: whose scans were audit draws, shown with estimates of the networks that serve, and corrected; "
    "new networks begin with none. wanted: so many patients make new intervals (--use). covered: of the estimates with "
    "an interval, those whose interval holds the truth."
)
_DRIFT_TERMS: Final = (
    "evidence of drift: how strongly the audited patients speak for errors larger than those of the calibration; 1 is "
    "nothing. Patients whose corrections are part of the calibration are not tested."
)


def _scored(method: str) -> str:
    """Refuse what is no scoring method while the command line is read."""
    from segqc.selection import StrategyError, score_of

    try:
        score_of(method)
    except StrategyError as error:
        raise typer.BadParameter(str(error)) from error
    return method


def _strategy(method: str) -> str:
    """Refuse what is no strategy while the command line is read."""
    from segqc.selection import strategies

    if method not in strategies():
        raise typer.BadParameter(f"there is no strategy {method!r}; there are {', '.join(strategies())}.")
    return method


@app.command(rich_help_panel=ESTIMATE_PANEL)
def score(
    folder: DatasetFolder,
    method: Annotated[
        str,
        typer.Option(
            callback=_scored,
            help="What to score by. segqc: SegQC-Net's estimate; tta, entropy, class-stratified: baselines by "
            "test-time augmentation; ensemble: by the networks of the folds.",
        ),
    ] = "segqc",
    force: Annotated[bool, typer.Option("--force", help="Also score scans that have a current score.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Segment and score every scan without a final label; continues where an earlier run stopped."""
    from segqc.loop.scoring import score as score_all
    from segqc.types import UNLIKE

    dataset = dataset_at(folder, config)
    with shown_progress() as progress:
        summary = score_all(dataset, method, progress, force=force)
    row: dict[str, Cell] = {
        "scored": summary.scored, "had a current score": summary.skipped, "failed": len(summary.failed)
    }  # fmt: skip
    if summary.marked is not None:
        row["unlike the training scans"] = summary.marked
    terms = f"{UNLIKE}." if summary.marked else ""
    emit([row], f"scores by {method}", as_json=as_json, extra={"failures": summary.failed}, terms=terms)
    if summary.failed:
        first, reason = next(iter(summary.failed.items()))
        raise CommandError(f"{len(summary.failed)} scans could not be scored; the first, {first}: {reason}")


@app.command(rich_help_panel=ESTIMATE_PANEL)
def rank(
    folder: DatasetFolder,
    method: Annotated[
        str,
        typer.Option(callback=_strategy, help="The strategy by whose score to order, or whose next scans to list."),
    ] = "segqc",
    first: Annotated[int, typer.Option(min=1, help="How many scans to list of a strategy that has no score.")] = 20,
    truth: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="True labels, named as the scans: also print the true Dice and how well the two agree."
        ),
    ] = None,
    include_final: Annotated[bool, typer.Option("--all", help="Also list scans that have a final label.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """List the scored scans, worst first, with the slices to look at first.

    Where the estimates' order is known not to be better than chance, it says so, and lists the scans in another order.
    Of a strategy that has no score of its own, such as segqc-diverse or cold-start, it lists the scans that would be
    handed out next; docs/strategies.md says which strategies there are.
    """
    from segqc.loop.agreement import agreement
    from segqc.loop.agreement import rank as order
    from segqc.quality.drift import drift_sentence
    from segqc.quality.drift import to_json as alarm_to_json
    from segqc.quality.report_card import AT_RANDOM, estimate_sentence, order_sentence, to_json
    from segqc.quality.witnesses import UNLIKENESS
    from segqc.selection import strategies

    strategy = strategies()[method]
    wanted = strategy.score
    if wanted is None and (truth is not None or include_final):
        raise CommandError(f"--truth and --all are for strategies with a score, and {method} has none")
    if truth is not None and not truth.is_dir():
        raise CommandError(f"{truth}: no such folder of true labels")
    dataset = dataset_at(folder, config)
    if wanted is None:
        _print_suggestions(dataset, strategy, first, as_json=as_json, as_csv=as_csv)
        return
    ranking = order(dataset, method, truth=truth, include_final=include_final)
    ranked = ranking.scans
    if not ranked:
        raise CommandError(f"{folder}: {_unscored(dataset, ranking, method)}")
    names = list(dict.fromkeys(name for scan in ranked for name in scan.true_by_structure))
    rows: list[Row] = [
        {
            "rank": scan.rank,
            "scan": scan.id,
            **(
                estimate("estimated Dice", scan.score, scan.interval, as_json=as_json, as_csv=as_csv)
                if wanted.is_estimate
                else {"estimated Dice" if wanted.is_dice else "score": scan.score}
            ),
            **(_unlikeness(scan.unlikeness, as_text=not as_json and not as_csv) if wanted.is_estimate else {}),
            "worst slices": " ".join(map(str, scan.worst_slices)),
            **({"ordered by": ranking.by} if as_json or as_csv else {}),
            **({"true Dice": scan.true_dice} if truth is not None else {}),
            **({f"true {name}": scan.true_by_structure.get(name) for name in names} if len(names) > 1 else {}),
        }
        for scan in ranked
    ]
    pairs = [(scan.score, scan.true_dice) for scan in ranked if scan.true_dice is not None]
    if truth is not None and not pairs:
        raise CommandError(
            f"{truth}: no ranked scan has both a mask and a true label file here; score by segqc makes masks"
        )
    found = agreement([p[0] for p in pairs], [p[1] for p in pairs]) if pairs else None
    extra: dict[str, object] = {"agreement": dataclasses.asdict(found)} if found is not None else {}
    orders = {AT_RANDOM: "in random order", UNLIKENESS: "most unlike the training scans first"}
    title = f"{folder}: {orders.get(ranking.by, f'worst first, by {ranking.by}')}"
    card = dataset.report_card() if wanted.is_estimate else None
    alarm = dataset.drift_alarm() if wanted.is_estimate else None
    if wanted.is_estimate:
        title += brackets(scan.interval for scan in ranked)
        extra["report_card"] = None if card is None else to_json(card)
        extra["drift_alarm"] = None if alarm is None else alarm_to_json(alarm)
    if as_json:
        extra |= {"waiting": ranking.waiting, "unscored": ranking.unscored}
    emit(rows, title, as_json=as_json, as_csv=as_csv, extra=extra, key="scans", terms=wanted.legend)
    if ranking.unscored and not as_json:
        typer.echo(f"The list is not complete: {_unscored(dataset, ranking, method)}.", err=as_csv)
    sentences = [drift_sentence(alarm)] if alarm is not None else []
    if card is not None:  # an alarm is later than the card: its word on the estimate counts
        sentences += [*([estimate_sentence(card)] if alarm is None else []), order_sentence(card, ranking.by)]
    for text in sentences if not as_json else ():
        typer.echo(text, err=as_csv)
    if found is not None and not as_json:
        typer.echo(_agreement_text(found, is_dice=wanted.is_dice), err=as_csv)


def _unscored(dataset: Dataset, ranking: Ranking, method: str) -> str:
    """How many of the waiting scans are scored, and what scores the others."""
    from segqc.selection import score_of
    from segqc.store import bundles, jobs

    if not ranking.waiting:
        return "no scan waits for a label"
    with dataset.store.read() as transaction:
        serving = bundles.serving(transaction)
        work = [job for kind in ("scoring", "round") for job in jobs.open_jobs(transaction, kind)]
    pair = serving.bundle if serving is not None else None
    needs_assessor = score_of(method).is_estimate
    if pair is None or pair.segmenter_version is None or (needs_assessor and pair.assessor_version is None):
        return f"no scan has a score of the method {method}, as its networks are not trained yet; run segqc round first"
    scored = f"{ranking.waiting - ranking.unscored} of {ranking.waiting} waiting scans are scored by bundle {pair.id}"
    if any(job.state == "running" for job in work):
        return f"{scored}, which serves; a worker is at it, and the rest follows"
    command = "segqc score" if needs_assessor else f"segqc score --method {method}"
    is_workers = needs_assessor or method == dataset.settings.server.strategy
    return f"{scored}, which serves; {'a worker (segqc serve, segqc worker) or ' * is_workers}{command} does the rest"


@app.command(rich_help_panel=ESTIMATE_PANEL)
def intervals(
    folder: DatasetFolder,
    use: Annotated[
        bool, typer.Option("--use", help="From now on, make intervals from the audit draws instead of the training.")
    ] = False,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Take a simulated annotator's corrections instead of people's.")
    ] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Check the prediction intervals on audit draws: scans drawn at random, estimated, and then corrected.

    Only audit draws count (the setting audit_share): scans that came worst-first are no fair sample. A drift alarm says
    that the estimated Dice errs more on them than its calibration knows.
    """
    from segqc.loop.drift import alarm_of, drift, watch_serving
    from segqc.loop.recalibration import audit
    from segqc.loop.recalibration import use as use_them
    from segqc.quality.drift import drift_sentence
    from segqc.quality.drift import to_json as alarm_to_json
    from segqc.quality.intervals import LEVEL, patients_needed

    dataset = dataset_at(folder, config)
    assessor = dataset.assessor()
    if assessor is None:
        raise CommandError(f"{folder}: no SegQC network is trained yet, so there are no estimates (segqc train segqc)")
    found = audit(dataset, assessor, simulated=simulated)
    watched = watch_serving(dataset)
    with dataset.store.read() as transaction:
        tests = drift(transaction, watched, simulated=simulated) if watched is not None else ()
    alarm = alarm_of(tests)
    rows: list[Row] = [
        {
            "structure": a.structure,
            "audited patients": a.patients,
            "wanted": patients_needed(),
            "audited estimates": a.estimates,
            "mean Dice error": a.mean_error,
            "with interval": a.with_interval,
            "covered": a.covered,
            "new intervals": "ready" if a.intervals is not None else NOT_ENOUGH_DATA,
        }
        for a in found
    ]
    drift_rows = [_drift_row(test) for test in tests]
    if as_json or as_csv:
        rows = [{**row, **of_drift} for row, of_drift in zip(rows, drift_rows or [{}] * len(rows), strict=True)]
    title = f"{folder}: {LEVEL:.0%} intervals on audit draws"
    extra: dict[str, object] = {"drift_alarm": None if alarm is None else alarm_to_json(alarm)}
    emit(rows, title, as_json=as_json, as_csv=as_csv, extra=extra, key="structures", terms=_AUDIT_TERMS)
    if drift_rows and not as_json and not as_csv:
        emit(drift_rows, "drift of the estimated Dice", terms=_DRIFT_TERMS)
    if alarm is not None and not as_json:
        typer.echo(drift_sentence(alarm), err=as_csv)
    if use:
        renewed = use_them(dataset, assessor, found, me())
        typer.echo(f"intervals are made of audit draws from now on; {renewed} waiting scans have new ones", err=True)


def _drift_row(found: StructureDrift) -> Row:
    test = found.test
    return {
        "structure": found.structure,
        "calibrating patients": test.calibrating,
        "patients tested": test.audited,
        "evidence of drift": test.evidence,
        "alarm from": test.threshold if math.isfinite(test.threshold) else None,
        "alarm at patient": test.alarm,
    }


def _print_suggestions(dataset: Dataset, strategy: Strategy, count: int, *, as_json: bool, as_csv: bool) -> None:
    from segqc.loop.agreement import suggestions

    dataset.refresh()
    found = suggestions(dataset, strategy, count)
    rows: list[Row] = [
        {
            "rank": place,
            "scan": suggestion.id,
            "ordered by": suggestion.by,
            "score": suggestion.score,
            "estimated Dice": suggestion.dice,
            "worst slices": " ".join(map(str, suggestion.worst_slices)),
        }
        for place, suggestion in enumerate(found, start=1)
    ]
    title = f"{dataset.folder}: the next {len(rows)} scans by {strategy.name}, if none is submitted meanwhile"
    emit(rows, title, as_json=as_json, as_csv=as_csv, key="scans", terms=_SUGGESTION_TERMS, empty=_NO_SUGGESTION)


def _unlikeness(found: Unlikeness | None, *, as_text: bool) -> dict[str, Cell]:
    """The cells of how unlike the training's a scan is."""
    if as_text:
        return {"unlikeness": None if found is None else f"{found.score:.2f}"}
    return {
        "unlikeness": None if found is None else found.score,
        "unlikeness p-value": None if found is None else found.p_value,
    }


def _agreement_text(found: Agreement, *, is_dice: bool) -> str:
    low, high = found.true_range
    lines = [
        f"{found.scans} scans with a truth; true Dice from {low:.3f} to {high:.3f}",
        f"Spearman {shown(found.spearman)}   Pearson {shown(found.pearson)}",
    ]
    if is_dice:
        lines.append(
            f"mean absolute error {found.mae:.4f}; of the constant {found.constant:.3f}, the median truth: "
            f"{found.constant_mae:.4f}"
        )
    return "\n".join(lines)
