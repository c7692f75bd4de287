"""A report as one HTML file that needs no other, and its tables and figures as files for papers."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from segqc.evaluation.report.document import MINUS, Figure, Point, Report, Table
from segqc.evaluation.report.formats import figure_path, report_to_markdown, to_csv, to_json, to_latex, to_markdown
from segqc.volumes import atomic_write

_ENVIRONMENT = Environment(
    loader=PackageLoader("segqc.evaluation.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PIXELS_PER_POINT = 96 / 72
# an image shrinks to this share on a narrow screen; then it scrolls, as its text would be too small to read
_MIN_SCALE = 0.68
_DEFAULT_SIZE = (640, 480)
_PNG_PIXELS_PER_INCH = 110


@dataclass(frozen=True, slots=True)
class _Cell:
    text: str
    numeric: bool
    best: bool
    repeated: bool


@dataclass(frozen=True, slots=True)
class _TableView:
    number: int
    table: Table
    numeric: tuple[bool, ...]
    groups: tuple[tuple[tuple[_Cell, ...], ...], ...]
    csv: str


@dataclass(frozen=True, slots=True)
class _FigureView:
    number: int
    figure: Figure
    source: str
    width: int
    height: int
    min_width: int


@dataclass(frozen=True, slots=True)
class _SectionView:
    number: int
    title: str
    text: tuple[str, ...]
    points: tuple[Point, ...]
    tables: tuple[_TableView, ...]
    figures: tuple[_FigureView, ...]


def write_report(report: Report, folder: Path) -> Path:
    """Write a report; each file appears whole or not at all, ``report.html`` last.

    ``report.html`` holds everything: style, images and tables, without scripts, fonts or links to elsewhere. Beside
    it: ``report.md``, ``tables.json``, ``tables/<name>.csv``, ``.md`` and ``.tex``, ``figures/<name>.svg`` (or
    ``.png``). Files of the same names are replaced, others are left alone.

    Args:
        report: the report.
        folder: where to; made if it is missing.

    Returns:
        The path of ``report.html``.
    """
    for path, content in _files(report):
        with atomic_write(folder / path) as temporary:
            temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / "report.html"


def to_html(report: Report) -> str:
    """The report as the text of one self-contained HTML file."""
    return _ENVIRONMENT.get_template("report.html.jinja").render(report=report, sections=tuple(_sections(report)))


def _files(report: Report) -> Iterator[tuple[str, str | bytes]]:
    for table in report.tables:
        yield f"tables/{table.name}.csv", to_csv(table)
        yield f"tables/{table.name}.md", to_markdown(table)
        yield f"tables/{table.name}.tex", to_latex(table)
    for figure in report.figures:
        yield figure_path(figure), figure.image
    yield "report.md", report_to_markdown(report)
    yield "tables.json", to_json(report)
    yield "report.html", to_html(report)


def _sections(report: Report) -> Iterator[_SectionView]:
    tables = figures = 0
    for number, section in enumerate(report.sections, start=1):
        yield _SectionView(
            number,
            section.title,
            section.text,
            section.points,
            tuple(_table(table, tables + i) for i, table in enumerate(section.tables, start=1)),
            tuple(_figure(figure, figures + i) for i, figure in enumerate(section.figures, start=1)),
        )
        tables += len(section.tables)
        figures += len(section.figures)


def _table(table: Table, number: int) -> _TableView:
    numeric = tuple(table.is_numeric(column) for column in range(len(table.columns)))
    group_column = None if table.group is None else table.columns.index(table.group)
    best = table.best_cells()
    groups = tuple(
        tuple(
            tuple(
                _Cell(
                    table.shown(row, column).replace("-", MINUS) if is_number else table.shown(row, column),
                    is_number,
                    (row, column) in best,
                    column == group_column and row != group[0],
                )
                for column, is_number in enumerate(numeric)
            )
            for row in group
        )
        for group in table.groups()
    )
    return _TableView(number, table, numeric, groups, _data_uri("text/csv;charset=utf-8", to_csv(table).encode()))


def _figure(figure: Figure, number: int) -> _FigureView:
    if isinstance(figure.image, str):
        source = _data_uri("image/svg+xml", figure.image.encode())
        width, height = _svg_size(figure.image)
    else:
        source = _data_uri("image/png", figure.image)
        pixels = struct.unpack(">II", figure.image[16:24])
        width, height = (round(side * 96 / _PNG_PIXELS_PER_INCH) for side in pixels)
    return _FigureView(number, figure, source, width, height, round(width * _MIN_SCALE))


def _svg_size(svg: str) -> tuple[int, int]:
    """Width and height in CSS pixels, from the view box: matplotlib's is in points."""
    box = re.search(r'viewBox="[\d.-]+ [\d.-]+ ([\d.]+) ([\d.]+)"', svg)
    if box is None:
        return _DEFAULT_SIZE
    return round(float(box[1]) * _PIXELS_PER_POINT), round(float(box[2]) * _PIXELS_PER_POINT)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
