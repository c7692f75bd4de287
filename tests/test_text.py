"""Text in other systems' encodings, and cells of CSV tables."""

from __future__ import annotations

import csv
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from segqc.cli import main
from segqc.evaluation.report.document import Table
from segqc.evaluation.report.formats import to_csv
from segqc.text import LineFormatter, TextError, decode_text, printable, spreadsheet_cell

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"))
FORMULAS = ["=1+1", "+1", "-1", "@A1", "\t=1", "\r=1", "\n=1", "=cmd|'/c calc'!A0"]


@given(TEXT, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_text_comes_back_from_every_encoding_with_a_mark(text: str, encoding: str) -> None:
    assert decode_text(text.encode(encoding)) == text


@given(TEXT, st.sampled_from(["utf-16-be", "utf-32-be"]))
def test_text_comes_back_in_the_other_byte_order(text: str, encoding: str) -> None:
    assert decode_text(("\ufeff" + text).encode(encoding)) == text


@given(st.binary())
@example(b"\xff\xfe\0")
@example(b"\xff\xfe\0\0\xff")
@example(b"\xfe\xff\xd8\x00")
def test_any_bytes_are_text_or_a_sentence(content: bytes) -> None:
    try:
        assert "\0" not in decode_text(content)
    except TextError as error:
        assert str(error).startswith("byte ")
        assert str(error).endswith("save the file as UTF-8.")


@pytest.mark.parametrize("value", FORMULAS)
def test_formulas_become_text(value: str) -> None:
    assert spreadsheet_cell(value) == "'" + value.replace("\r", "\n")


@pytest.mark.parametrize("value", [-1, -0.5, None, True, "", "a=b", "1-2", "\u00e4"])
def test_numbers_and_plain_text_stay(value: object) -> None:
    assert spreadsheet_cell(value) == value


@given(TEXT)
def test_a_cell_comes_back_from_csv(value: str) -> None:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerow([spreadsheet_cell(value), "end"])
    ((cell, end),) = csv.reader(io.StringIO(stream.getvalue(), newline=""))
    assert cell == spreadsheet_cell(value)
    assert end == "end"


def test_tables_of_a_report_quote_formulas() -> None:
    table = Table("t", "T", ("name", "=value"), (("=1+1", -0.5),))
    assert to_csv(table) == "name,'=value\n'=1+1,-0.5\n"


def scan(folder: Path, name: str) -> None:
    nib.save(nib.Nifti1Image(np.ones((8, 8, 4), np.int16), np.eye(4)), folder / f"{name}.nii.gz")


def test_csv_of_a_command_quotes_formulas(tmp_path: Path) -> None:
    scan(tmp_path, "=1+1")
    result = CliRunner().invoke(main.app, ["scans", str(tmp_path), "--csv"])
    assert result.exit_code == 0, result.output
    (row,) = csv.DictReader(io.StringIO(result.output))
    assert (row["scan"], row["fold"].lstrip("012")) == ("'=1+1", "")


def test_names_are_kept_where_the_locale_knows_ascii_only(tmp_path: Path) -> None:
    folder = tmp_path / "Bäume"
    folder.mkdir()
    scan(folder, "größe 肝")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONPATH"] = str(Path(main.__file__).parents[2])
    found = subprocess.run(
        [sys.executable, "-m", "segqc", "scans", folder, "--csv"],
        env=environment,
        capture_output=True,
        check=True,
    )
    assert "größe 肝" in found.stdout.decode()


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a\nb\x1b[0m", "a\\x0ab\\x1b[0m"), ("\udcff", "\\xff"), ("\u2028\x9b", "\\u2028\\x9b"), ("größe", "größe")],
)
def test_names_are_shown_on_one_line_and_move_no_cursor(name: str, shown: str) -> None:
    assert printable(name) == shown


def test_a_file_whose_name_is_no_text_is_named_and_stops_nothing(tmp_path: Path) -> None:
    scan(tmp_path, "good")
    (tmp_path / "labels" / "final").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "labels" / "final"):
        os.link(tmp_path / "good.nii.gz", folder / "\udcff.nii.gz")
    result = CliRunner().invoke(main.app, ["scans", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "1 scans" in result.output
    sentence = "\\xff.nii.gz: has a name that is not UTF-8 or holds control characters; rename the file"
    assert f"\n{sentence}" in result.output
    assert f"labels/final/{sentence}" in result.output


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\x0b", "\x1b[2K\x1b[G", "\x85", "\u2028", "\u202e"])
def test_what_a_log_record_is_about_forges_no_other_record(end: str) -> None:
    forged = f"scan{end}12:00:00 SegQC has ended."
    formatter = LineFormatter("%(asctime)s %(message)s", "%H:%M:%S")
    record = logging.LogRecord("segqc", logging.WARNING, __file__, 1, "%s is left out", (forged,), None)
    shown = formatter.format(record)
    assert len(shown.splitlines()) == 1
    assert end not in shown
    assert shown.endswith("12:00:00 SegQC has ended. is left out")
    try:
        raise ValueError(forged)
    except ValueError:
        record.exc_info = sys.exc_info()
    first, *traceback = formatter.format(record).splitlines()
    assert first == shown
    assert traceback
    assert all(line.startswith("  ") for line in traceback)
    assert not any(mark in line for line in traceback for mark in "\r\x0b\x1b\x85\u2028\u202e")
