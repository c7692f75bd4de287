"""When a round begins by itself, and whether more of them are worth it.

A worker asks. What it puts is the same job as ``segqc round`` puts; both conditions are looked at once more with the
store's write lock held, so that any number of workers puts one round.

Counted are the scans whose final label no round has trained on, nor both networks of a bundle: of people, and of a
simulated annotator just as well. Words and tables say how many are simulated.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from segqc.loop.requests import (
    NETWORKS,
    RoundRequest,
    TrainRequest,
    TrainResult,
    enqueue,
    request_of,
    train_result_of,
    training_step,
)
from segqc.quality.stopping import CheckedRound, Outlook, StopReason, outlook, outlook_sentence
from segqc.settings import RoundSettings, Settings
from segqc.store import bundles, corrections, jobs, rounds
from segqc.store.database import Transaction
from segqc.store.events import SERVER
from segqc.store.records import JobRecord, LabelledSince, RoundRecord
from segqc.store.store import Store
from segqc.types import MaskDice

_DAY: Final = dt.timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DueRound:
    """What became of the question whether a round is due.

    Attributes:
        job: the round that was put; None where none is due.
        stopped: why one that would be due was not put; None where none would be, or it was put.
    """

    job: JobRecord | None = None
    stopped: Outlook | None = None


def put_due_round(store: Store, settings: Settings) -> DueRound:
    """Put a round into the queue if the settings say that it is due, none is open, and it is worth it."""
    if not settings.round.is_automatic:
        return DueRound()
    with store.read() as transaction:  # nobody has to wait for the write lock to learn that none is due
        if _why_due(transaction, settings) is None:
            return DueRound()
        found = outlook_of(transaction, settings.round)
        if found.stop is not None:
            return DueRound(stopped=found)
    with store.write() as transaction:
        reason = _why_due(transaction, settings)
        if reason is None:
            return DueRound()
        return DueRound(job=enqueue(transaction, RoundRequest(), SERVER, reason=f"by the settings: {reason}"))


def _why_due(transaction: Transaction, settings: Settings) -> str | None:
    """Why a round is due; None where it is not, or too few patients are labelled for any training.

    Nor is it while a round or a training is open: what that trains on is looked at when it has ended.
    """
    if jobs.open_jobs(transaction, "round") or jobs.open_jobs(transaction, "train"):
        return None
    waiting = rounds.labelled_since(transaction, rounds.newest_label(transaction))
    reason = why_due(waiting, rounds.last_number(transaction), settings.round, transaction.now)
    needed = max(settings.training_settings(network).min_cases for network in NETWORKS)
    return reason if reason is not None and rounds.labelled_patients(transaction) >= needed else None


def put_first_trainings(store: Store, requests: Sequence[TrainRequest]) -> None:
    """Put the trainings of a folder's first networks, but for those that are open.

    A round makes these networks, too, so that none is put beside one; a round that only waits, by the settings, is
    stopped instead: it would train on the same labels once more.

    Args:
        store: the store.
        requests: the trainings, in their order.
    """
    with store.write() as transaction:
        waiting = jobs.open_jobs(transaction, "round")
        if any(job.state == "running" or job.reason is None for job in waiting):
            return
        for job in waiting:
            jobs.stop(transaction, job.id, SERVER)
        asked = [request_of(job) for job in jobs.open_jobs(transaction, "train")]
        open_networks = {request.model for request in asked if isinstance(request, TrainRequest)}
        for request in requests:
            if request.model not in open_networks:
                enqueue(transaction, request, SERVER)


def why_due(
    waiting: LabelledSince,
    last: int | None,
    settings: RoundSettings,
    now: dt.datetime,
    zone: dt.tzinfo | None = None,
) -> str | None:
    """Why a round is due, in words; None where it is not.

    Args:
        waiting: the scans with a final label that no round has trained on.
        last: the number of the last round; None before the first one.
        settings: when rounds begin by themselves.
        now: the time.
        zone: that the time of day is meant in; by default the machine's.

    Example:
        >>> settings = RoundSettings(after_corrections=20)
        >>> now = dt.datetime(2026, 1, 2, 12, tzinfo=dt.UTC)
        >>> why_due(LabelledSince(scans=20, first_at=now), 3, settings, now)
        '20 corrections since round 3'
    """
    corrected = waiting.scans - waiting.imported
    count = "1 correction" if corrected == 1 else f"{corrected} corrections"
    count += f" ({waiting.simulated} simulated)" if waiting.simulated else ""
    parts = [count] if corrected or not waiting.imported else []
    parts += [_imported(waiting.imported)] if waiting.imported else []
    came = f"{' and '.join(parts)} {'before the first round' if last is None else f'since round {last}'}"
    if settings.after_corrections and waiting.scans >= settings.after_corrections:
        return came
    if settings.at is None or waiting.first_at is None:
        return None
    # what came a day or more from now came before the clock was set back
    if last_time_of_day(now, settings.at, zone) < waiting.first_at < now + _DAY:
        return None
    return f"{settings.at:%H:%M} o'clock, {came}"


def last_time_of_day(now: dt.datetime, at: dt.time, zone: dt.tzinfo | None = None) -> dt.datetime:
    """When it was last that time of day, in UTC.

    Args:
        now: the time, with its zone.
        at: the time of day.
        zone: that it is meant in; by default the machine's.

    Example:
        >>> last_time_of_day(dt.datetime(2026, 1, 2, 1, tzinfo=dt.UTC), dt.time(2), dt.UTC).isoformat()
        '2026-01-01T02:00:00+00:00'
    """
    today = now.astimezone(zone).date()
    # a time without a zone is the machine's, also where the clocks were changed today
    # one that clocks were put past at the end of yesterday is still to come: then it was the day before
    days = (today, today - _DAY, today - 2 * _DAY)
    by_day = [dt.datetime.combine(day, at, zone).astimezone(dt.UTC) for day in days]
    return next(time for time in by_day if time <= now)


def outlook_of(transaction: Transaction, settings: RoundSettings) -> Outlook:
    """Whether more rounds are worth it, by what the store knows now.

    The audits are people's; where they made none, a simulated annotator's count.
    """
    serving = bundles.serving(transaction)
    version = serving.bundle.segmenter_version if serving is not None else None
    served: list[MaskDice] = []
    if version is not None:
        served = corrections.audited_masks(transaction, version)
        served = served or corrections.audited_masks(transaction, version, simulated=True)
    waiting = rounds.labelled_since(transaction, rounds.newest_label(transaction))
    found = checked(rounds.listing(transaction))
    return outlook(served, found, waiting.scans, enough_dice=settings.enough_dice)


def checked(records: Sequence[RoundRecord]) -> list[CheckedRound]:
    """The finished rounds of those that have begun, with the Dice of their masks."""
    return [
        CheckedRound(number=record.number, labelled=record.labelled, validation=trained.validation)
        for record in records
        if record.ended_at is not None and (trained := masks_of(record)) is not None
    ]


def masks_of(record: RoundRecord) -> TrainResult | None:
    """What came of a round's training of the segmentation network; None before that."""
    result = record.steps.get(training_step("segmentation"))
    return None if result is None else train_result_of(result)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsInfo:
    """What clients see of rounds.

    Attributes:
        after_corrections, at: when rounds begin by themselves; 0 and None for never.
        corrections: the scans with a final label of an annotator that neither a round nor both networks of a bundle
            have trained on.
        simulated: how many of these labels are simulated corrections.
        imported: the scans with such a label that was put into the folder or the PACS; these count for rounds, too.
        stopped: why more rounds are not worth it, so that none begins by itself; None where they are.
        message: the same in one sentence, with the numbers.
    """

    after_corrections: int
    at: str | None
    corrections: int
    simulated: int
    imported: int
    stopped: StopReason | None
    message: str


def rounds_info(transaction: Transaction, settings: RoundSettings) -> RoundsInfo:
    """What clients see of rounds."""
    found = outlook_of(transaction, settings)
    waiting = rounds.labelled_since(transaction, rounds.newest_label(transaction))
    return RoundsInfo(
        after_corrections=settings.after_corrections,
        at=None if settings.at is None else f"{settings.at:%H:%M}",
        corrections=waiting.scans - waiting.imported,
        simulated=waiting.simulated,
        imported=waiting.imported,
        stopped=found.stop,
        message=outlook_sentence(found),
    )


def next_round_sentence(info: RoundsInfo) -> str:
    """When the next round begins by itself, and what has come for it, in one sentence."""
    came = f"{info.corrections} new correction{'' if info.corrections == 1 else 's'}"
    came += f", {info.simulated} of them simulated" if info.simulated else ""
    came += f", and {_imported(info.imported)}" if info.imported else ""
    labels = "corrections" if not info.imported else "corrections and imported labels"
    conditions = [f"after {info.after_corrections} {labels}"] if info.after_corrections else []
    conditions += [f"at {info.at}"] if info.at is not None else []
    if not conditions:
        return f"No round begins by itself ([round] in segqc.toml); {came}."
    if info.stopped is not None:
        return f"No round begins by itself now; {came}."
    return f"The next round begins by itself {' or '.join(conditions)}; {came}."


def _imported(count: int) -> str:
    return f"{count} imported label{'' if count == 1 else 's'}"
