"""Reports: nothing is lost, nothing comes from elsewhere, and the same values give the same bytes."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread
from scipy import stats

from segqc.evaluation.report.document import Cell, Figure, Point, Report, Section, Table
from segqc.evaluation.report.examples import ExampleScan, draw_example, pick_examples
from segqc.evaluation.report.figures import (
    Estimates,
    ForestEntry,
    Series,
    StratumCoverage,
    Values,
    band_curves,
    correction_curves,
    coverage,
    forest,
    precision_recall,
    risk_coverage,
    scatter,
    styles_for,
)
from segqc.evaluation.report.formats import NUMBERS, to_csv, to_latex, to_markdown
from segqc.evaluation.report.html import to_html, write_report
from segqc.evaluation.report.limitations import EvaluatedSet, limitations
from segqc.types import BoolArray, ErrorBox, FloatArray
from segqc.volumes import Volume

NASTY = "a<b> & \"c\" 'd' </td><script>alert(1)</script> | *e* _f_ $g$ 50% #1 {h} \\i ~j ^k"
VOID = {"meta", "img", "br", "hr", "link"}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 36"></svg>'


class Page(HTMLParser):
    """Checks that elements nest, and collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice: {attrs}"
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]


def table(rows: tuple[tuple[Cell, ...], ...], **more: object) -> Table:
    columns = tuple("abcdefg"[: len(rows[0])])
    return Table("t", "Title", columns, rows, **more)  # type: ignore[arg-type]


def report() -> Report:
    rows: tuple[tuple[Cell, ...], ...] = (("x", NASTY, 0.12345, 3), ("x", "m", None, -4), ("y", "n", -0.5, 5))
    nasty = Table("main", NASTY, ("set", NASTY, "MAE", "n"), rows, 2, NASTY, {"MAE": "nearest zero"}, "set")
    first = Section(NASTY, (NASTY,), (Point(NASTY, NASTY, (NASTY,)),), (nasty,), (Figure("svg", NASTY, SVG, NASTY),))
    estimates = [Estimates("m", np.array([0.5, 0.6]), np.array([0.4, 0.7]))]
    figures = (scatter("one", "One", estimates), scatter("two", "Two", estimates))
    second = Section("Second", tables=(table((("k", 1.0),)),), figures=figures)
    return Report(NASTY, NASTY, {NASTY: NASTY}, (first, second))


def test_the_page_is_well_formed_and_its_links_lead_somewhere() -> None:
    page = Page(to_html(report()))
    ids = page.values("id")
    assert len(set(ids)) == len(ids)
    inner = [href for href in page.values("href") if href.startswith("#")]
    assert {"#section-1", "#section-2", "#table-main", "#table-t", "#figure-svg", "#figure-one", "#figure-two"} == set(
        inner
    )
    assert {href[1:] for href in inner} <= set(ids)
    assert set(page.values("aria-labelledby")) <= set(ids)
    assert [text for text in page.texts["title"]] == [NASTY]


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = Page(to_html(report()))
    for value in page.values("src") + page.values("href"):
        assert value.startswith(("data:", "#"))
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in ("srcset", "action")]
    style = "".join(page.texts["style"]) + "".join(page.values("style"))
    assert "url(" not in style and "@import" not in style


def test_text_comes_back_from_the_page_as_it_went_in() -> None:
    page = Page(to_html(report()))
    assert NASTY in page.texts["h1"] and NASTY in page.texts["dt"] and NASTY in page.texts["dd"]
    assert NASTY in page.texts["h3"] and NASTY in page.texts["li"] and NASTY in page.texts["td"]
    assert NASTY in page.texts["th"] and NASTY in page.texts["p"] and f"1. {NASTY}" in page.texts["h2"]
    assert NASTY in page.values("alt")


def test_pictures_and_tables_lie_in_the_page_byte_for_byte() -> None:
    made = report()
    page = Page(to_html(made))
    images = [base64.b64decode(src.split(",", 1)[1]).decode() for src in page.values("src")]
    assert images == [figure.image for figure in made.figures]
    saved = [base64.b64decode(h.split(",", 1)[1]).decode() for h in page.values("href") if h.startswith("data:")]
    assert saved == [to_csv(each) for each in made.tables]
    assert page.values("width")[0] == "96" and page.values("height")[0] == "48"  # 72 x 36 points


def test_numbers_are_rounded_right_aligned_and_the_best_is_bold() -> None:
    page = Page(to_html(report()))
    text = to_html(report())
    assert '<td class="number best">' not in text.split('id="table-t"')[1]
    assert "\N{MINUS SIGN}0.50" in page.texts["td"] and "0.12" in page.texts["td"] and "\N{EN DASH}" in page.texts["td"]
    # the second row of the group "x" repeats it for readers who do not see, only
    assert page.texts["span"] == ["x"]


def test_a_report_can_be_empty() -> None:
    page = Page(to_html(Report("t", "", {}, ())))
    assert "table" not in page.tags and "dl" not in page.tags


def test_a_report_writes_all_its_files_and_writes_them_again_alike(tmp_path: Path) -> None:
    made = report()
    path = write_report(made, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    files = {str(p.relative_to(path.parent)): p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
    tables = {f"tables/{name}.{suffix}" for name in ("main", "t") for suffix in ("csv", "md", "tex")}
    kept = NUMBERS.validate_json(files["tables.json"])
    assert [t.columns for t in kept.tables] == [t.columns for t in made.tables]
    assert set(files) == {
        "report.html",
        "report.md",
        "tables.json",
        *tables,
        *(f"figures/{n}.svg" for n in ("svg", "one", "two")),
    }
    write_report(report(), path.parent)
    assert files == {str(p.relative_to(path.parent)): p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
    for target in re.findall(r"\]\((figures/[^)]+)\)", files["report.md"].decode()):
        assert target in files


def test_csv_gives_back_every_cell() -> None:
    rows: tuple[tuple[Cell, ...], ...] = (
        ("a,b", 0.1 + 0.2, 7),
        ('say "no"\nor yes', None, -1),
        (NASTY, 1e-17, 10**20),
    )
    read = list(csv.reader(io.StringIO(to_csv(table(rows)), newline="")))
    assert read[0] == ["a", "b", "c"]
    for got, row in zip(read[1:], rows, strict=True):
        assert got[0] == row[0]
        assert (float(got[1]) if got[1] else None) == row[1]
        assert int(got[2]) == row[2]


def test_markdown_keeps_its_columns_and_its_text() -> None:
    text = to_markdown(table(((NASTY, 0.5), ("b", None)), best={"b": "lowest"}))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert rows[1] == "| --- | ---: |"
    cell = re.split(r"(?<!\\)\|", rows[2])[1].strip()
    assert re.sub(r"\\(.)", r"\1", cell) == NASTY
    for special in "*_<>$":
        assert not re.search(rf"(?<!\\){re.escape(special)}", cell)


def test_latex_escapes_what_it_would_take_for_a_command() -> None:
    text = to_latex(table(((NASTY, -0.5), ("[0.1, 0.2]", 1.0)), best={"b": "lowest"}, note="n < 3"))
    assert r"\& " in text and r"50\%" in text and r"\#1" in text and r"\{h\}" in text and r"\_f\_" in text
    assert r"\textbackslash{}i" in text and r"\textasciitilde{}j" in text and r"\textasciicircum{}k" in text
    assert r"\$g\$" in text and r"\textless{} 3" in text
    assert r"\textbf{$-$0.500}" in text
    assert "\n{[}0.1" in text  # after \\, a bracket would be a length
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    for row in body:
        assert len(re.findall(r"(?<!\\)&", row)) == 1 and row.endswith(r"\\")
    unescaped = re.sub(r"\\[{}]", "", text)
    assert unescaped.count("{") == unescaped.count("}")


def test_ties_are_ties_and_undefined_numbers_never_win() -> None:
    rows: tuple[tuple[Cell, ...], ...] = (
        ("x", 0.1001, 0.9),
        ("x", 0.1004, None),
        ("x", 0.2, 0.95),
        ("y", 0.5, 0.5),
        ("y", 0.5, 0.5),
        ("z", 0.3, -0.1),
    )
    made = table(rows, best={"b": "lowest", "c": "highest"}, group="a")
    # by what is printed; a group in which all are alike, or that has one row only, has no best
    assert made.best_cells() == {(0, 1), (1, 1), (2, 2)}
    assert list(made.groups()) == [(0, 1, 2), (3, 4), (5,)]
    whole = table(rows, best={"c": "nearest zero"}, digits={"b": 1})
    assert whole.best_cells() == {(5, 2)}
    assert whole.shown(0, 1) == "0.1" and whole.shown(0, 2) == "0.900"
    assert table(((-0.0001,),)).shown(0, 0) == "0.000"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Table("Main Table", "", ("a",), ()), "file name"),
        (lambda: Table("../t", "", ("a",), ()), "file name"),
        (lambda: Table("t", "", ("a", "a"), ()), "different names"),
        (lambda: Table("t", "", ("a",), (), best={"b": "lowest"}), "no column b"),
        (lambda: Table("t", "", ("a",), ((1, 2),)), "a row of 2"),
        (lambda: Table("t", "", ("a",), ((float("nan"),),)), "None"),
        (lambda: Table("t", "", ("a",), ((float("inf"),),)), "None"),
        (lambda: Table("t", "", ("a",), ((np.int64(3),),)), "numbers of Python"),  # type: ignore[arg-type]
        (lambda: Figure("f", "", "no picture"), "SVG"),
        (lambda: Figure("f", "", b"GIF89a"), "PNG"),
        (
            lambda: Report("", "", {}, (Section("a", figures=(Figure("f", "", SVG),)),) * 2),
            "more than one is named",
        ),
        (lambda: Estimates("m", np.zeros(2), np.zeros(3)), "one length"),
        (lambda: Series("c", np.zeros(2), np.zeros(2), low=np.zeros(2)), "two bounds"),
        (lambda: Series("c", np.zeros(2), np.zeros(2), marks=("a",)), "1 marks"),
        (lambda: StratumCoverage("s", np.array([0.9]), np.array([3.0]), np.array([2.0])), "covered"),
        (lambda: StratumCoverage("s", np.array([0.9]), np.array([0.0]), np.array([0.0])), "trials"),
        (lambda: scatter("f", "", []), "at least one"),
        (lambda: forest("f", "", []), "at least one"),
        (lambda: coverage("f", "", []), "at least one"),
        (lambda: risk_coverage("f", "", []), "at least one"),
        (lambda: limitations([]), "at least one"),
        (lambda: pick_examples([None], [0.5]), "at least one"),
        (lambda: pick_examples([0.5], []), "as many"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def line(label: str, **more: object) -> Series:
    return Series(label, np.array([0.0, 0.5, 1.0]), np.array([0.5, 0.8, 1.0]), **more)  # type: ignore[arg-type]


def cloud(count: int) -> list[Estimates]:
    rng = np.random.default_rng(0)
    true = rng.random(count)
    return [Estimates(name, true + rng.normal(0, 0.1, count), true) for name in ("a", "b", "c", "d", "e")]


BAND = (np.array([0.4, 0.7, 0.9]), np.array([0.6, 0.9, 1.0]))
FIGURES: dict[str, Callable[[], Figure]] = {
    "scatter": lambda: scatter("f", "t", cloud(20)),
    "dense scatter": lambda: scatter("f", "t", cloud(500)),
    "corrections": lambda: correction_curves(
        "f",
        "t",
        [line("optimal", reference=True), line("s", low=BAND[0], high=BAND[1]), line("random", reference=True)],
        unit="slices",
    ),
    "risk": lambda: risk_coverage("f", "t", [line("s")]),
    "band": lambda: band_curves("f", "t", [line("kept"), line("found")], chosen=0.5),
    "precision": lambda: precision_recall("f", "t", [line("with", marks=("0.05", "0.1", "0.2")), line("without")]),
    "forest": lambda: forest(
        "f",
        "t",
        [ForestEntry("s", 0.1, 0.05, 0.2, "3D"), ForestEntry("t", 0.2, None, None, "2D")],
        references={"3D": 0.3},
        styles=styles_for(["s"]),
    ),
    "coverage at one level": lambda: coverage("f", "t", [StratumCoverage("all", *np.array([[0.9], [8.0], [9.0]]))]),
    "coverage": lambda: coverage(
        "f", "t", [StratumCoverage(s, np.array([0.5, 0.9]), np.array([4.0, 9.0]), np.array([9.0, 9.0])) for s in "ab"]
    ),
}


@pytest.mark.parametrize("kind", FIGURES)
@pytest.mark.server
def test_figures_are_sound_small_and_the_same_every_time(kind: str) -> None:
    image = FIGURES[kind]().image
    assert isinstance(image, str)
    assert FIGURES[kind]().image == image
    tree = ElementTree.fromstring(image)
    ids = [e.attrib["id"] for e in tree.iter() if "id" in e.attrib]
    assert len(set(ids)) == len(ids)
    assert not [e.tag for e in tree.iter() if e.tag.endswith(("}date", "}creator", "}script"))]
    assert len(image) < 300_000


def said(figure: Figure) -> set[str]:
    """The texts of a figure: matplotlib notes each beside the outlines it is drawn with."""
    assert isinstance(figure.image, str)
    return set(re.findall(r"<!-- (.*?) -->", figure.image))


def test_a_scatter_tells_error_correlation_and_number_of_the_defined_pairs() -> None:
    rng = np.random.default_rng(1)
    true = rng.random(40)
    estimated = true + rng.normal(0, 0.1, 40)
    shown = said(
        scatter("f", "t", [Estimates("$m$", np.append(estimated, [np.nan, 0.5]), np.append(true, [0.5, np.nan]))])
    )
    mae = np.mean([abs(a - b) for a, b in zip(true, estimated, strict=True)])
    assert {f"MAE {mae:.3f}", f"r = {stats.pearsonr(true, estimated).statistic:.3f}", "n = 40", "$m$"} <= shown


@pytest.mark.parametrize("values", [np.array([]), np.array([np.nan]), np.array([0.5]), np.full(5, 0.5)])
def test_a_scatter_of_nothing_or_of_constants_has_no_correlation(values: Values) -> None:
    shown = said(scatter("f", "t", [Estimates("m", values, values)]))
    assert not [text for text in shown if text.startswith("r =")]
    assert f"n = {np.isfinite(values).sum()}" in shown


@pytest.mark.parametrize(("covered", "trials"), [(0, 7), (7, 7), (5, 9), (90, 100)])
def test_coverage_has_the_exact_binomial_interval(covered: int, trials: int) -> None:
    observed, low, high = StratumCoverage(
        "s", np.array([0.9]), np.array([float(covered)]), np.array([float(trials)])
    ).observed()
    reference = stats.binomtest(covered, trials).proportion_ci(0.95, method="exact")
    assert observed == pytest.approx(covered / trials)
    assert (low[0], high[0]) == pytest.approx((reference.low, reference.high))


def test_many_methods_are_all_drawn_differently() -> None:
    styles = styles_for([f"m{i}" for i in range(28)] + ["m0"])
    assert len(styles) == 28
    assert len({(s.colour, s.line) for s in styles.values()}) == 28
    assert len({(s.colour, s.marker) for s in styles.values()}) == 28


def test_examples_are_the_nearest_the_middle_and_the_farthest_estimate() -> None:
    true = [0.5, 0.5, None, 0.5, 0.5, 0.5]
    assert pick_examples([0.9, 0.5, 0.5, None, 0.6, 0.3], true) == (1, 4, 0)  # errors .4 .0 - - .1 .2
    assert pick_examples([0.6, 0.6], [0.5, 0.5]) == (0, 0, 1)
    assert pick_examples([None, 0.6], [0.5, 0.5]) == (1, 1, 1)


SHAPE = (40, 30, 6)


def example(axis: int, *, predicted: tuple[ErrorBox, ...] = (), true: tuple[ErrorBox, ...] = ()) -> ExampleScan:
    scan = Volume(np.random.default_rng(0).normal(100, 5, SHAPE).astype(np.float32), np.diag([1.0, 1.0, 4.0, 1.0]))
    mask: BoolArray = np.zeros(SHAPE, bool)
    truth = mask.copy()
    mask[10:30, 8:22, 1:5], truth[12:32, 8:22, 1:5] = True, True
    error: FloatArray = (mask != truth).astype(np.float32)
    return ExampleScan(scan, mask, truth, error, axis, predicted, true, 0.8, None, "$s$ of A")


def pixels(figure: Figure) -> FloatArray:
    assert isinstance(figure.image, bytes)
    return np.asarray(imread(io.BytesIO(figure.image)), np.float32)


def coloured(figure: Figure, colour: tuple[int, int, int]) -> int:
    near = np.abs(pixels(figure)[..., :3] * 255 - np.array(colour)).max(axis=-1) < 12
    return int(near.sum())


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_an_example_shows_mask_and_truth_along_any_axis(axis: int) -> None:
    figure = draw_example("e", "t", example(axis))
    assert coloured(figure, (0x56, 0xB4, 0xE9)) > 100
    assert coloured(figure, (0xF0, 0xE4, 0x42)) > 100


def test_an_example_is_the_same_every_time() -> None:
    assert draw_example("e", "t", example(2)).image == draw_example("e", "t", example(2)).image


def test_boxes_are_drawn_in_their_slices_only() -> None:
    plain = pixels(draw_example("e", "t", example(2), slices=2))
    box = ErrorBox(1, (10, 8), (12, 22), 28.0, 1.0, 1.0)
    # the two slices with the largest sums, the first ones of equals, are 1 and 2
    here = pixels(draw_example("e", "t", example(2, predicted=(box,)), slices=2))
    elsewhere = ErrorBox(5, (10, 8), (12, 22), 28.0, 1.0, 1.0)
    assert (plain != pixels(draw_example("e", "t", example(2, true=(elsewhere,)), slices=2))).sum() == 0
    rows, columns = np.nonzero((plain != here).any(axis=-1))
    assert rows.size
    height, width = plain.shape[:2]
    assert rows.min() > height / 2 and columns.max() < width / 2


def test_a_scan_without_anything_can_be_drawn() -> None:
    whole = example(2)
    nothing: BoolArray = np.zeros(SHAPE, bool)
    empty = ExampleScan(whole.scan, nothing, nothing, np.zeros(SHAPE, np.float32), 2, (), (), None, None, "s")
    assert pixels(draw_example("e", "t", empty, slices=20)).std() > 0
    with pytest.raises(ValueError, match="one shape"):
        ExampleScan(whole.scan, nothing[1:], nothing, whole.error, 2, (), (), None, None, "s")


def evaluated(**more: object) -> EvaluatedSet:
    values: dict[str, object] = {
        "name": "hippocampus",
        "patients": 50,
        "masks": 112,
        "sources": ("network A", "network B"),
        "sources_in_training": False,
        "true_range": (0.42, 0.95),
        "selection": "stratified",
    }
    return EvaluatedSet(**(values | more))  # type: ignore[arg-type]


def whole_text(section: Section) -> str:
    return " ".join([*section.text, *(" ".join([p.title, p.text, *p.items]) for p in section.points)])


def test_the_cautions_have_the_numbers_of_the_set() -> None:
    text = whole_text(
        limitations([evaluated(mae=0.016, constant_mae=0.077, slices=2100, missed_slices=193, seeds=3, compared=9)])
    )
    for words in (
        "true Dice from 0.42 to 0.95",
        "112 masks, but only 50 patients",
        "the constant is wrong by 0.077, SegQC by 0.016.",
        "none of whose masks it trained on",
        "the mask alone is empty in 193 of 2100 slices",
        "3 seeds",
        "Up to 9 methods",
        "not a medical device",
    ):
        assert words in text


def test_cautions_that_do_not_apply_are_left_out_and_those_that_do_are_not() -> None:
    plain = whole_text(limitations([evaluated(masks=50, selection="all")]))
    assert "but only" not in plain and "methods are compared" not in plain and "simulated" not in plain
    assert "clinic" not in plain and "No set here was chosen so" in plain and "fixed late" not in plain
    sets = [
        evaluated(name="first", selection="worst-first", corrections="simulated"),
        evaluated(name="second", corrections="real", sources_in_training=True, mae=0.02, constant_mae=0.02),
        evaluated(name="third", after_training=True),
    ]
    section = limitations(sets)
    text = whole_text(section)
    assert "first: a simulated annotator's corrections." in text and "second: a person's corrections" in text
    assert "conditional on the choice: first" in text.replace("  ", " ")
    assert "no nearer to the truth" in text and "some of whose masks it was trained on" in text
    assert "third: fixed after the trainings." in text and "first: fixed" not in text
    assert [row[0] for row in section.tables[0].rows] == ["first", "second", "third"]


@pytest.mark.parametrize("wrong", [{"patients": 0}, {"masks": 49}, {"seeds": 0}, {"true_range": (0.9, 0.1)}])
def test_impossible_facts_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="hippocampus"):
        evaluated(**wrong)
