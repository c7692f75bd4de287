"""What a report is made of: frozen values without any form; `html.write_report` gives them one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, TypeAlias

Cell: TypeAlias = str | int | float | None
Row: TypeAlias = tuple[Cell, ...]
Aim: TypeAlias = Literal["lowest", "highest", "nearest zero"]

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
UNDEFINED = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text and numbers.

    Attributes:
        name: the file name without suffix, and the anchor: lower-case letters, digits, ``-`` and ``_``.
        title: one line, without a full stop.
        columns: names, each once.
        rows: one cell per column; None is an undefined number.
        digits: decimals of the floats: one number for all, or by column (3 where a column is not named).
        note: what a reader has to know (units, n, what a row is).
        best: columns whose best number is set bold, and what is best there. Numbers that print alike are ties: all of
            them are bold.
        group: the column whose equal neighbours make a row group; the best is sought in each group. Without it, all
            rows are one group.

    Raises:
        ValueError: if the name is unusable, columns repeat or are unknown, a row has another length, or a cell is
            of another type, NaN or infinite.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    digits: int | Mapping[str, int] = 3
    note: str = ""
    best: Mapping[str, Aim] = field(default_factory=dict)
    group: str | None = None

    def __post_init__(self) -> None:
        _check_name(self.name, "table")
        if not self.columns or len(set(self.columns)) != len(self.columns):
            raise ValueError(f"table {self.name} needs columns with different names, got {self.columns}")
        mentioned = {*self.best, *([self.group] if self.group is not None else [])}
        mentioned |= set(self.digits) if isinstance(self.digits, Mapping) else set()
        if unknown := mentioned - set(self.columns):
            raise ValueError(f"table {self.name} has no column {', '.join(sorted(unknown))}; it has {self.columns}")
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.name} has {len(self.columns)} columns, but a row of {len(row)}: {row}")
            if not all(isinstance(cell, Cell) for cell in row):
                raise ValueError(f"table {self.name}: cells are text, numbers of Python or None, got {row}")
            if any(isinstance(cell, float) and not math.isfinite(cell) for cell in row):
                raise ValueError(f"table {self.name}: undefined numbers are None, got NaN or infinity in {row}")

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers (or undefined ones) only, and at least one."""
        cells = [row[column] for row in self.rows]
        return any(not isinstance(c, str | None) for c in cells) and not any(isinstance(c, str) for c in cells)

    def shown(self, row: int, column: int) -> str:
        """A cell as it is printed: floats rounded, an undefined number as a dash."""
        cell = self.rows[row][column]
        if cell is None:
            return UNDEFINED
        if not isinstance(cell, float):
            return str(cell)
        text = f"{cell:.{self._decimals(column)}f}"
        return text.lstrip("-") if float(text) == 0 else text

    def groups(self) -> Iterator[tuple[int, ...]]:
        """The row groups: indices of neighbouring rows that agree in the ``group`` column."""
        if self.group is None:
            if self.rows:
                yield tuple(range(len(self.rows)))
            return
        column = self.columns.index(self.group)
        for _, members in groupby(range(len(self.rows)), key=lambda row: self.rows[row][column]):
            yield tuple(members)

    def best_cells(self) -> frozenset[tuple[int, int]]:
        """The cells (row, column) to set bold; none in a group whose numbers all print alike."""
        found: set[tuple[int, int]] = set()
        for name, aim in self.best.items():
            column = self.columns.index(name)
            for group in self.groups():
                numbers = {
                    row: float(self.shown(row, column))
                    for row in group
                    if isinstance(self.rows[row][column], int | float)
                }
                worth = {row: {"lowest": -x, "highest": x, "nearest zero": -abs(x)}[aim] for row, x in numbers.items()}
                if len(set(worth.values())) > 1:
                    found |= {(row, column) for row, value in worth.items() if value == max(worth.values())}
        return frozenset(found)

    def _decimals(self, column: int) -> int:
        return self.digits if isinstance(self.digits, int) else self.digits.get(self.columns[column], 3)


@dataclass(frozen=True, slots=True)
class Figure:
    """An image: an SVG document (text) or a PNG file (bytes).

    Attributes:
        name: the file name without suffix, and the anchor, as a table's.
        title: one line, without a full stop.
        image: the image itself.
        caption: how to read it.
    """

    name: str
    title: str
    image: str | bytes
    caption: str = ""

    def __post_init__(self) -> None:
        _check_name(self.name, "figure")
        known = "<svg" in self.image if isinstance(self.image, str) else self.image.startswith(b"\x89PNG\r\n\x1a\n")
        if not known:
            raise ValueError(f"figure {self.name} needs an SVG document as text, or a PNG file as bytes")

    @property
    def suffix(self) -> str:
        """``svg`` or ``png``."""
        return "svg" if isinstance(self.image, str) else "png"


@dataclass(frozen=True, slots=True)
class Point:
    """A short heading with a paragraph, and a list below it."""

    title: str
    text: str
    items: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A chapter: paragraphs, then points, then tables, then figures."""

    title: str
    text: tuple[str, ...] = ()
    points: tuple[Point, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """A whole report.

    Attributes:
        title, subtitle: its head.
        facts: what it was made from: data set, date, machine, seeds, settings.
        sections: its chapters.

    Raises:
        ValueError: if two tables, or two figures, have the same name.
    """

    title: str
    subtitle: str
    facts: Mapping[str, str]
    sections: tuple[Section, ...]

    def __post_init__(self) -> None:
        for kind, parts in (("tables", self.tables), ("figures", self.figures)):
            names = [part.name for part in parts]
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"a report's {kind} need different names; more than one is named {repeated}")

    @property
    def tables(self) -> tuple[Table, ...]:
        """All tables, in the order of their numbers."""
        return tuple(table for section in self.sections for table in section.tables)

    @property
    def figures(self) -> tuple[Figure, ...]:
        """All figures, in the order of their numbers."""
        return tuple(figure for section in self.sections for figure in section.figures)


def _check_name(name: str, kind: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"a {kind}'s name is a file name of lower-case letters, digits, - and _, got {name!r}")
