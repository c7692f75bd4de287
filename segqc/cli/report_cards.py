"""Report cards as commands print them: small tables, and a sentence for each verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import typer

from segqc.cli.common import Cell, Row, emit

if TYPE_CHECKING:
    from segqc.quality.estimation import ConfidenceInterval
    from segqc.quality.report_card import BesideConstant, FoundErrors, ReportCard, StructureReport

TITLE: Final = "what the estimated Dice is worth, on masks of patients that the networks had not seen"
TERMS: Final = (
    "MAE: mean absolute error of the estimated Dice; constant: that of the best single number for all. MAE/constant: "
    "below 1, the estimate is better than a constant. Spearman: rank correlation with the true Dice; above 0, the "
    "order is better than chance. In brackets: 90% confidence intervals. regret: what correcting in this order loses "
    "of the best order's gain; 0 is the best order, 1 a random one. 90% hold: share of prediction intervals that hold "
    "the truth, of scans that are not marked as unlike the others."
)
_PEOPLE_TITLE: Final = "people's masks: experts' labels with implanted errors, of patients that were not seen"
_MORE_TITLE: Final = "errors that are found, and volumes"
_MORE_TERMS: Final = (
    "missed, included: share of the tissue that masks lack, or should lack, with an error probability of 1/2 or more; "
    "at .5: where half of what is found is wrong. RVD, |RVD|, ARVD: mean absolute error, and that of the best constant."
)


def print_card(card: ReportCard | None, *, more: bool = False) -> None:
    """Print the report card of a bundle; nothing where it has none.

    Args:
        card: the card.
        more: also print what is found of the errors, and how well volumes are estimated.
    """
    from segqc.quality.report_card import messages

    if card is None:
        return
    if card.worst.figures is not None:
        emit([_row(report) for report in _reports(card)], TITLE, terms=TERMS)
        if more:
            emit([_more(report) for report in card.structures], _MORE_TITLE, terms=_MORE_TERMS)
    for sentence in messages(card):
        typer.echo(sentence)


def print_people_card(card: ReportCard | None) -> None:
    """Print the report card of the network for people's masks; nothing where there is none."""
    from segqc.quality.report_card import people_sentence

    if card is None:
        return
    if card.worst.figures is not None:
        emit([_row(report, "masks") for report in _reports(card)], _PEOPLE_TITLE, terms=TERMS)
    typer.echo(people_sentence(card))


def summary(card: ReportCard | None) -> dict[str, Cell]:
    """A card in the columns of a table of bundles: that of each scan's worst structure, which ranks."""
    figures = card.worst.figures if card is not None else None
    return {
        "checked patients": card.worst.patients if card is not None else None,
        "MAE/constant": _ends(figures.ratio) if figures is not None else None,
        "Spearman": _ends(figures.spearman) if figures is not None else None,
    }


def _reports(card: ReportCard) -> Sequence[StructureReport]:
    """Each structure's, and where there are several, that of the worst one."""
    return card.structures if len(card.structures) == 1 else (*card.structures, card.worst)


def _row(report: StructureReport, counted: str = "scans") -> Row:
    figures = report.figures
    counts: dict[str, Cell] = {"structure": report.structure, "patients": report.patients, counted: report.scans}
    return {
        **counts,
        "true Dice": figures.true_dice if figures is not None else None,
        "MAE": figures.dice.mae if figures is not None else None,
        "constant": figures.dice.constant_mae if figures is not None else None,
        "MAE/constant": _ends(figures.ratio) if figures is not None else None,
        "Spearman": _ends(figures.spearman) if figures is not None else None,
        "regret": figures.regret if figures is not None else None,
        "90% hold": figures.coverage if figures is not None else None,
    }


def _more(report: StructureReport) -> Row:
    figures = report.figures
    row: dict[str, Cell] = {"structure": report.structure}
    for name, found in (
        ("missed", figures.missed if figures is not None else None),
        ("included", figures.included if figures is not None else None),
    ):
        row |= _shares(name, found)
    for name, error in (
        ("RVD", figures.rvd if figures is not None else None),
        ("|RVD|", figures.abs_rvd if figures is not None else None),
        ("ARVD", figures.arvd if figures is not None else None),
    ):
        row |= _beside(name, error)
    return row


def _shares(name: str, found: FoundErrors | None) -> dict[str, Cell]:
    return {
        name: found.at_half if found is not None else None,
        f"{name}, at .5": found.at_precision if found is not None else None,
    }


def _beside(name: str, error: BesideConstant | None) -> dict[str, Cell]:
    return {
        name: error.mae if error is not None else None,
        f"{name} constant": error.constant_mae if error is not None else None,
    }


def _ends(number: ConfidenceInterval) -> str | None:
    """A number with its interval: "0.61 (0.32 to 0.80)"."""
    if number.value is None:
        return None
    ends = "" if number.low is None or number.high is None else f" ({number.low:.2f} to {number.high:.2f})"
    return f"{number.value:.2f}{ends}"
