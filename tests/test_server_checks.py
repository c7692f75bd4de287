from __future__ import annotations

import pytest

from segqc.server.checks import check_image_id, check_tag, choose_params, file_suffix, json_object
from segqc.server.errors import RequestError


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
    assert file_suffix("C:\\scans\\scan.v1.2.nii.gz", "the scan") == ".nii.gz"
    assert file_suffix("x.NRRD", "the scan") == ".nrrd"
    for name in ("x.sh", None, "x.nii.gz/../../y.py", ""):
        with pytest.raises(RequestError) as caught:
            file_suffix(name, "the scan")
        assert caught.value.status == 415


def test_json_fields() -> None:
    assert json_object("", "params") == {}
    assert json_object('{"a": [1, null]}', "params") == {"a": [1, None]}
    for text in ("{", "[1]", "7", '{"a": NaN}', "[" * 100_000):
        with pytest.raises(RequestError) as caught:
            json_object(text, "params")
        assert caught.value.status == 400
        assert "params" in caught.value.message


def test_params_cannot_name_what_is_read_or_run() -> None:
    assert choose_params({"label_tag": "final", "roi_size": 3}, {"label_tag"}) == {"label_tag": "final"}
    for key in ("image", "model", "label", "bundle_path", "session", "images", "path"):
        with pytest.raises(RequestError, match=key) as caught:
            choose_params({key: "/etc/passwd"}, {"label_tag"})
        assert caught.value.status == 400
