"""What jobs are asked for: what is written into the store is read again, and nothing else."""

from __future__ import annotations

import pytest

from segqc.loop.dataset import DatasetError
from segqc.loop.requests import (
    KINDS,
    AuditRequest,
    BatchRequest,
    JobRequest,
    RoundRequest,
    ScoringRequest,
    TrainRequest,
    parse_request,
    request_to_json,
    title,
)

REQUESTS: list[JobRequest] = [
    TrainRequest(model="segqc"),
    TrainRequest(model="segmentation", settings={"epochs": 3, "gammas": [0.7]}),
    ScoringRequest(method="segqc"),
    ScoringRequest(method="entropy", force=True),
    BatchRequest(model="segqc", images="unlabeled", label_tag="first", max_batch_size=5),
    RoundRequest(),
    RoundRequest(segqc={"epochs": 2}),
    AuditRequest(force=True),
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_is_read_as_it_was_written(request_: JobRequest) -> None:
    assert parse_request(request_.kind, request_to_json(request_)) == request_
    assert title(request_).startswith("the ")


def test_there_is_a_request_of_every_kind() -> None:
    assert {request.kind for request in REQUESTS} == set(KINDS)


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("train", {}, "model"),
        ("train", {"model": "unet"}, "'segmentation' or 'segqc'"),
        ("train", {"model": "segqc", "epochs": 3}, "epochs"),
        ("train", {"model": "segqc", "settings": 3}, "settings"),
        ("scoring", {"method": "segqc", "force": "perhaps"}, "force"),
        ("batch_infer", {"model": "segqc", "images": "some"}, "images"),
        ("batch_infer", {"model": "segqc", "max_batch_size": -1}, "max_batch_size"),
        ("round", {"unet": {}}, "unet"),
        ("party", {}, "'party'"),
    ],
)
def test_what_no_job_can_do_is_refused_by_name(kind: str, fields: dict[str, object], said: str) -> None:
    with pytest.raises(DatasetError) as caught:
        parse_request(kind, fields)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "value", [-1, 10**10, 1.5, None, "", "-1", "1.5", "many", "1e3", [1], {}, "9" * 5000, float("inf")]
)
def test_the_number_of_scans_is_an_integer_within_its_bounds(value: object) -> None:
    with pytest.raises(DatasetError, match="batch_infer request: max_batch_size: ") as caught:
        parse_request("batch_infer", {"model": "segqc", "max_batch_size": value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [0, 7, "7", 1_000_000_000])
def test_the_number_of_scans_may_come_as_text(value: object) -> None:
    request = parse_request("batch_infer", {"model": "segqc", "max_batch_size": value})
    assert isinstance(request, BatchRequest) and request.max_batch_size == int(str(value))
