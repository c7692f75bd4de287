from __future__ import annotations

import pytest

from segqc.server.errors import RequestError
from segqc.server.names import (
    MAX_ID_BYTES,
    check_file_name,
    check_image_id,
    check_tag,
    known,
    split_suffix,
    usable_image_id,
)


@pytest.mark.parametrize("name", ["scan", "scan.v1.2", "MRI 03 (T2)", "Überlauf_7", "a=b,c+d@e[0]"])
def test_plain_names_are_image_ids(name: str) -> None:
    assert check_image_id(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", "/etc/passwd", ".hidden", "a..b", "a\0b", "a\nb", "x" * 201, "-rf", "a."],
)
def test_what_could_be_a_path_is_no_image_id(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_image_id(name)
    assert caught.value.status == 400


@pytest.mark.parametrize("tag", ["", "..", "../../..", "a/b", "final ", ".x", "é"])
def test_what_could_be_a_path_is_no_tag(tag: str) -> None:
    with pytest.raises(RequestError):
        check_tag(tag)


def test_suffix_is_the_format_only() -> None:
    assert split_suffix("C:\\scans\\scan.v1.2.nii.gz", "the scan") == ("scan.v1.2", ".nii.gz")
    assert split_suffix("x.NRRD", "the scan") == ("x", ".nrrd")
    for name in ("x.sh", None, "x.nii.gz/../../y.py", ""):
        with pytest.raises(RequestError) as caught:
            split_suffix(name, "the scan")
        assert caught.value.status == 415


@pytest.mark.parametrize("letter", ["a", "\u00e9", "\u4e2d", "\U00020000"])
def test_ids_and_file_names_are_limited_in_bytes_as_file_systems_limit_them(letter: str) -> None:
    most = MAX_ID_BYTES // len(letter.encode())
    assert check_image_id(letter * most) == letter * most
    assert check_file_name(letter * most) == letter * most
    for check in (check_image_id, check_file_name):
        with pytest.raises(RequestError) as caught:
            check(letter * (most + 1))
        assert caught.value.status == 400
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "name", ["IM-0001-0001.dcm", "1.2.840.10008", "C:\\scans\\2: AX T2.nii.gz", "x/y/z.dcm", "e\u0301"]
)
def test_file_names_are_the_last_part(name: str) -> None:
    assert check_file_name(name) == name.replace("\\", "/").rsplit("/", 1)[-1]


@pytest.mark.parametrize(
    "name", [None, "", ".", "..", "x/", "x\0.nii", "x\n.nii", "\x7f", "\ud800.nii", "a/..", "a\\.."]
)
def test_what_no_file_can_be_called_is_refused(name: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        check_file_name(name)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("name", "usable"), [("e\u0301", "\u00e9"), ("2: AX T2", "2_ AX T2"), ("a/b", "a/b"), ("a\u200bb", "a_b")]
)
def test_ids_are_made_usable_in_the_same_way_on_every_system(name: str, usable: str) -> None:
    assert usable_image_id(name) == usable


def test_what_is_not_there_is_named_briefly() -> None:
    with pytest.raises(RequestError) as caught:
        known("strategy", "x" * 10_000, ["segqc", "random"])
    assert caught.value.status == 404
    assert "random, segqc" in str(caught.value)
    assert len(str(caught.value)) < 200
