"""What requests take as JSON: every model, with what clients send and with what nobody can use."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from segqc.server.errors import RequestError
from segqc.server.parameters import (
    BatchParams,
    InferParams,
    JsonBody,
    JsonInfo,
    JsonText,
    LabelParams,
    ReviewParams,
    SampleParams,
    ScoringParams,
    SkipParams,
    check_json,
)
from segqc.store.records import JsonObject

COMMANDS: list[type[BaseModel]] = [SampleParams, SkipParams, ReviewParams, ScoringParams, BatchParams, InferParams]
NEEDED: dict[type[BaseModel], JsonObject] = {SkipParams: {"reason": "motion"}, ReviewParams: {"decision": "approve"}}


def parse(model: Any, value: object) -> Any:
    """The same by both ways: as a body, and as text in a form's field."""
    body = TypeAdapter(JsonBody[model]).validate_python(value)
    assert TypeAdapter(JsonText[model]).validate_python(json.dumps(value)) == body
    return body


def refused(model: Any, value: object) -> str:
    messages = []
    for kind, sent in ((JsonBody[model], value), (JsonText[model], json.dumps(value))):
        with pytest.raises(RequestError) as caught:
            TypeAdapter(kind).validate_python(sent)
        assert caught.value.status == 400
        assert len(str(caught.value)) < 500
        messages.append(str(caught.value))
    assert all(message.startswith("params: ") for message in messages)
    return messages[0]


@pytest.mark.parametrize("model", COMMANDS)
def test_what_clients_send_to_any_server_is_ignored(model: type[BaseModel]) -> None:
    needed = NEEDED.get(model, {})
    foreign = {"client_id": None, "device": "cuda", "roi_size": [96, 96, 96], "result_dtype": "uint16", "labels": [{}]}
    fields = set(model.model_fields)  # an inference keeps the rest, for tasks that take it
    assert parse(model, {**needed, **foreign}).model_dump(include=fields) == model(**needed).model_dump()
    assert parse(model, {**needed, "client_id": "anna"}) == model(**needed, client_id="anna")
    if not needed:
        assert parse(model, None) == parse(model, {}) == model()


def test_an_inference_task_gets_what_it_takes_and_nothing_else() -> None:
    params = parse(InferParams, {"seconds": 3, "image_file": "/etc/passwd", "label_tag": "final"})
    assert isinstance(params, InferParams)
    given = params.for_task({"seconds", "clicks"})
    assert (given["seconds"], given["label_tag"]) == (3, "final")
    assert given.keys() == {*InferParams.model_fields, "seconds"}


@pytest.mark.parametrize("model", COMMANDS)
@pytest.mark.parametrize("key", ["image", "model", "label", "bundle_path", "session", "images", "path", "strategy"])
def test_params_cannot_name_what_is_read_or_run(model: type[BaseModel], key: str) -> None:
    assert repr(key) in refused(model, {**NEEDED.get(model, {}), key: "/etc/passwd"})


@pytest.mark.parametrize(
    ("model", "field", "values"),
    [
        (SampleParams, "client_id", [7, "x" * 201, "a\nb", [], {}]),
        (SampleParams, "skip_reason", [7, "x" * 501, "a\nb", ["blurred"]]),
        (SampleParams, "resume", [7, "x" * 501, ["scan_1"]]),
        (SkipParams, "reason", [7, "", None, "x" * 501, ["motion"]]),
        (ReviewParams, "decision", [7, "", None, "shred", ["approve"]]),
        (ReviewParams, "reason", [7, "x" * 501, {}]),
        (ScoringParams, "force", ["perhaps", 2, None, []]),
        (BatchParams, "max_batch_size", [-1, 2**31, 1.5, "many", None]),
        (InferParams, "save_label", ["perhaps", 2, []]),
        (InferParams, "result_extension", [".exe", "nii.gz", 7]),
        (InferParams, "result_compress", ["perhaps", 2]),
        (InferParams, "label_info", [7, "liver", ["liver"], {"liver": 1}]),
        (LabelParams, "label_names", [7, "liver", ["liver"]]),
        (LabelParams, "opened_slices", ["all", ["all"], [1.5], [True], 3]),
        (LabelParams, "opened_structures", ["liver", [1], {}]),
        (LabelParams, "simulated", ["perhaps", None, 2]),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_the_name_of_its_field(
    model: type[BaseModel], field: str, values: list[object]
) -> None:
    for value in values:
        assert field in refused(model, {**NEEDED.get(model, {}), field: value})


def test_what_is_needed_and_missing_is_named() -> None:
    assert "reason: Field required" in refused(SkipParams, {"client_id": "anna"})
    assert "decision: Field required" in refused(ReviewParams, None)


@pytest.mark.parametrize("model", [BatchParams, InferParams])
@pytest.mark.parametrize("tag", ["", "..", "../x", "a/b", "final ", ".x", "x" * 65])
def test_a_tag_that_could_be_a_path_is_refused(model: type[BaseModel], tag: str) -> None:
    with pytest.raises(RequestError, match="label tag") as caught:
        parse(model, {"label_tag": tag})
    assert caught.value.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "idx"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(["note", "segmentationMeta", "label", "id", "client id"]), JSON))
def test_what_is_noted_of_a_label_map_is_kept_as_it_was_sent(noted: JsonObject) -> None:
    sent = {**noted, "label_info": [{"name": "liver", "idx": 1, "color": [1, 0, 0]}], "opened_slices": [2, 3]}
    assert parse(LabelParams, sent).to_json() == sent


@pytest.mark.parametrize(
    "text", ["{", "nul", "[1]", "7", '"x"', '{"a": NaN}', "[" * 100_000, '{"a": "\\ud800"}', "\ufeff{}"]
)
@pytest.mark.parametrize("model", [*COMMANDS, LabelParams, JsonObject])
def test_text_that_is_no_json_object_is_refused(model: Any, text: str) -> None:
    for kind, field in ((JsonText[model], "params"), (JsonInfo[model], "info")):
        with pytest.raises(RequestError, match=f"^{field}: ") as caught:
            TypeAdapter(kind).validate_python(text)
        assert caught.value.status == 400
        assert len(str(caught.value)) < 200


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        2**63,
        -(2**64),
        10**400,
        "a\0b",
        "\ud800",
        "\udfff.",
        {"\0": 1},
        {"\ud800": 1},
        nested(40),
    ],
)
def test_what_other_programs_cannot_read_is_no_json(value: object) -> None:
    for wrapped in (value, [value], {"a": [{"b": value}]}):
        with pytest.raises(ValueError):
            check_json(wrapped)  # type: ignore[arg-type]
    refused(JsonObject, {"a": value})
    refused(ScoringParams, {"a": value})


@pytest.mark.parametrize("value", [None, True, 0, -1, 2**63 - 1, 1.5, "", "\U0001f9e0", "a\nb", [], {}, nested(20)])
def test_what_they_can_read_is_json(value: object) -> None:
    assert check_json(value) == value  # type: ignore[arg-type]
