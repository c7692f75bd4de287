"""Text in the encodings that other systems write, names of files, and cells that are no formulas to spreadsheets."""

from __future__ import annotations

import codecs
import csv
import logging
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, TextIO, TypeAlias, TypeVar

from segqc.errors import SegqcError

T = TypeVar("T")
ExceptionInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

# UTF-32's mark of little-endian order begins with UTF-16's
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# C0, delete and C1, and what else ends a line
_CONTROLS: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    code: f"\\u{code:04x}" for code in (0x2028, 0x2029)
}
# what a terminal acts on, without what ends a line or indents it; and marks that turn the direction of what follows
_TERMINAL_CONTROLS: Final = {code: text for code, text in _CONTROLS.items() if chr(code) not in "\t\n"} | {
    code: f"\\u{code:04x}" for code in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
_MAX_PLACE: Final = 200  # characters: a key may be of any length
_MAX_SHOWN: Final = 40  # characters of a text that was given
_FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r", "\n")


class LineFormatter(logging.Formatter):
    """Makes one line of each log record, and indents the lines of its traceback.

    Names of files and what clients send may hold ends of lines, or what a terminal acts on: shown escaped, they look
    like no further record.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        """The record's line."""
        return _one_line(super().formatMessage(record))

    def formatException(self, ei: ExceptionInfo) -> str:  # noqa: N802 - the base class's name
        """The traceback."""
        return "\n".join(f"  {_one_line(line)}" for line in super().formatException(ei).split("\n"))


def _one_line(text: str) -> str:
    return visible(text).replace("\n", "\\x0a")


class TextError(SegqcError):
    """Bytes that are no text in a known encoding; the message says at which byte, and what to do."""


def decode_text(content: bytes) -> str:
    """Decode a text file: UTF-8, or UTF-16 and UTF-32 that begin with a byte order mark, as Windows writes them.

    Returns:
        The text without its mark; ends of lines stay as they are.

    Raises:
        TextError: if it is in another encoding.
    """
    mark, encoding = next((found for found in _MARKS if content.startswith(found[0])), (b"", "utf-8"))
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = len(mark) + error.start
        raise TextError(
            f"byte {place} (0x{content[place]:02X}) is not {encoding[:6].upper().rstrip('-')}; save the file as UTF-8"
        ) from error
    if "\0" in text:
        raise TextError(f"byte {content.index(0)} is zero, as in a file without text; save the file as UTF-8")
    return text


def printable(name: str) -> str:
    """A file's name as text that can be printed on one line and stored, whatever bytes it has on the disk."""
    text = name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else text.translate(_CONTROLS)


def visible(text: str) -> str:
    """Text for a terminal: what would move its cursor, change its colours or turn its text around is shown escaped."""
    return text.translate(_TERMINAL_CONTROLS)


def first_problem(problems: Sequence[Mapping[str, Any]]) -> str:
    """What pydantic found wrong at first, and where: "epochs: Input should be greater than 0, got -3 (and 1 more)".

    Args:
        problems: what `errors()` of its exception tells.
    """
    place = ".".join(map(str, problems[0]["loc"]))[:_MAX_PLACE]
    message = str(problems[0]["msg"]).removeprefix("Value error, ")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{place}{': ' if place else ''}{message}{_got(message, problems[0].get('input'))}{more}"


def _got(message: str, value: object) -> str:
    """What was given in place of what a message wants, where it is short; of a table, what the message names."""
    if isinstance(value, Mapping):
        words = set(re.findall(r"\w+", message))
        named = {name: item for name, item in value.items() if name in words and _is_short(item)}
        return f", got {', '.join(f'{name} = {item!r}' for name, item in named.items())}" if named else ""
    return f", got {value!r}" if _is_short(value) and "got " not in message else ""


def _is_short(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= _MAX_SHOWN)


def spreadsheet_cell(value: T) -> T | str:
    """A cell for a CSV table: text that a spreadsheet would run as a formula has an apostrophe in front.

    Spreadsheets run what begins with ``=``, ``+``, ``-``, ``@``, a tabulator or an end of line (OWASP, CSV injection).
    Numbers stay numbers. Ends of lines become line feeds, as `csv` puts no quotes around a lone carriage return.
    """
    if not isinstance(value, str):
        return value
    text = value.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{text}" if value.startswith(_FORMULA_STARTS) else text


def write_csv(file: TextIO, rows: Sequence[Mapping[str, object]], names: Sequence[str] = ()) -> None:
    """Write rows as a CSV table. No text in it is a formula to spreadsheets, or acts on a terminal.

    Args:
        file: what to write to.
        rows: each with the same cells.
        names: of the cells, for the line above; by default the first row's, and an empty line without rows.
    """
    names = names or (list(rows[0]) if rows else [])
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(spreadsheet_cell, names))
    writer.writerows([_csv_cell(row[name]) for name in names] for row in rows)


def _csv_cell(value: object) -> object:
    cell = spreadsheet_cell(value)
    return visible(cell) if isinstance(cell, str) else cell


def nfc(name: str) -> str:
    """A name in the form in which names are compared: each letter and its accents are one character (Unicode's NFC).

    Programs on macOS write them apart (NFD), so that one name may come in two forms.

    >>> nfc("e\u0301") == "\u00e9"
    True
    """
    return unicodedata.normalize("NFC", name)


def caseless(name: str) -> str:
    """A name as it is compared where its case and the blanks around it do not count."""
    return nfc(name).strip().casefold()


def slug(text: str) -> str:
    """A text as a part of a file's or an address's name: lower-case ASCII letters, digits and hyphens; "all" for none.

    >>> slug("SegQC, one network")
    'segqc--one-network'
    """
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower()).strip("-") or "all"
