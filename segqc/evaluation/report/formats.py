"""A table as CSV, Markdown and LaTeX; a report as Markdown; all its numbers as JSON."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass, replace

from pydantic import TypeAdapter

from segqc.evaluation.report.document import MINUS, UNDEFINED, Cell, Figure, Report, Section, Table
from segqc.text import spreadsheet_cell

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|#~$&])")
# where a line starts with these, Markdown sees a list
_MARKDOWN_LIST = re.compile(r"^(\s*)([-+]|\d+[.)])(?=\s)")
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    # after the end of a row, both would be taken for an argument of it
    "[": "{[}",
    "*": "{*}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    # what pdfLaTeX's fonts lack, or would set in another width
    MINUS: "$-$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "±": r"$\pm$",
    "²": "$^2$",
    "³": "$^3$",
    "·": r"$\cdot$",
    "\N{GREEK SMALL LETTER RHO}": r"$\rho$",
    UNDEFINED: "--",
    "—": "---",
}


def to_csv(table: Table) -> str:
    """A table as CSV: numbers unrounded, undefined ones empty, UTF-8, a line feed after each row.

    Text that a spreadsheet would run as a formula has an apostrophe in front.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(spreadsheet_cell, table.columns))
    writer.writerows(["" if cell is None else spreadsheet_cell(cell) for cell in row] for row in table.rows)
    return stream.getvalue()


def to_markdown(table: Table) -> str:
    """A table as a Markdown pipe table, with the title above and the note below."""
    numeric = [table.is_numeric(column) for column in range(len(table.columns))]
    best = table.best_cells()
    lines = [f"**{_markdown(table.title)}**", ""]
    lines.append(_pipes([_markdown(column) for column in table.columns]))
    lines.append(_pipes(["---:" if right else "---" for right in numeric]))
    for row in range(len(table.rows)):
        cells = []
        for column in range(len(table.columns)):
            text = _markdown(table.shown(row, column))
            cells.append(f"**{text}**" if (row, column) in best else text)
        lines.append(_pipes(cells))
    if table.note:
        lines += ["", _markdown_paragraph(table.note)]
    return "\n".join(lines) + "\n"


def to_latex(table: Table) -> str:
    """A table as a LaTeX float; it needs the package ``booktabs``. Row groups are set apart by a rule."""
    numeric = [table.is_numeric(column) for column in range(len(table.columns))]
    best = table.best_cells()
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex(table.title)}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in numeric)}}}",
        r"\toprule",
        " & ".join(_latex(column) for column in table.columns) + r" \\",
        r"\midrule",
    ]
    for number, group in enumerate(table.groups()):
        if number:
            lines.append(r"\midrule")
        for row in group:
            cells = []
            for column, right in enumerate(numeric):
                text = table.shown(row, column)
                text = _latex(text.replace("-", MINUS) if right else text)
                cells.append(rf"\textbf{{{text}}}" if (row, column) in best else text)
            lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if table.note:
        lines += ["", r"\smallskip", rf"{{\footnotesize {_latex(table.note)}\par}}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def report_to_markdown(report: Report) -> str:
    """A whole report as Markdown; its images are the files under ``figures/``."""
    blocks = [f"# {_markdown(report.title)}"]
    if report.subtitle:
        blocks.append(_markdown_paragraph(report.subtitle))
    if report.facts:
        blocks.append("\n".join(f"* {_markdown(key)}: {_markdown(value)}" for key, value in report.facts.items()))
    for section in report.sections:
        blocks += _section(section)
    return "\n\n".join(block.rstrip("\n") for block in blocks) + "\n"


def figure_path(figure: Figure) -> str:
    """Where a report's folder keeps a figure."""
    return f"figures/{figure.name}.{figure.suffix}"


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a report says in numbers: small enough to be kept with a project, and enough to draw its tables again."""

    title: str
    facts: dict[str, str]
    tables: tuple[Table, ...]


NUMBERS: TypeAdapter[Numbers] = TypeAdapter(Numbers)


def to_json(report: Report) -> str:
    """Title, facts and tables of a report as JSON, numbers with five digits; `NUMBERS` reads it."""
    tables = tuple(replace(table, rows=tuple(tuple(map(_short, row)) for row in table.rows)) for table in report.tables)
    return NUMBERS.dump_json(Numbers(report.title, dict(report.facts), tables)).decode() + "\n"


def _short(cell: Cell) -> Cell:
    return float(f"{cell:.5g}") if isinstance(cell, float) else cell


def _section(section: Section) -> list[str]:
    blocks = [f"## {_markdown(section.title)}", *map(_markdown_paragraph, section.text)]
    for point in section.points:
        blocks += [f"### {_markdown(point.title)}", _markdown_paragraph(point.text)]
        if point.items:
            blocks.append("\n".join(f"* {_markdown(item)}" for item in point.items))
    blocks += [to_markdown(table) for table in section.tables]
    for figure in section.figures:
        caption = f" {_markdown(figure.caption)}" if figure.caption else ""
        blocks.append(f"![{_markdown(figure.title)}]({figure_path(figure)})")
        blocks.append(f"**{_markdown(figure.title)}**{caption}")
    return blocks


def _pipes(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def _markdown_paragraph(text: str) -> str:
    return _MARKDOWN_LIST.sub(lambda m: f"{m[1]}{m[2][:-1]}\\{m[2][-1]}", _markdown(text))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
