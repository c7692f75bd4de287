"""Submitted labels beside what others do at the same time, on both databases."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from segqc.loop.dataset import Dataset
from segqc.loop.submission import ApprovedError, submit_label
from segqc.store import labels, scans
from segqc.store.store import LabelTransaction, Store
from tests.server_kit import CONFIG, draw_case, make_dataset
from tests.store_kit import ANNA, BERT


@pytest.fixture
def dataset(tmp_path: Path, url: str | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    config = CONFIG if url is None else f'{CONFIG}\n[store]\nurl = "{url}"\n'
    # a file of this moment is looked at again with each use, and that is written down
    monkeypatch.setattr("segqc.store.files._CLOCK_TICK_NS", -1)
    made = Dataset(make_dataset(tmp_path / "scans", scans=1, finals=0, config=config))
    yield made
    made.store.close()


def finals(dataset: Dataset) -> list[int]:
    with dataset.store.read() as transaction:
        return [label.id for label in labels.history(transaction, "scan_0") if label.tag == "final"]


@pytest.mark.parametrize("is_reviewer", [False, True])
def test_an_approval_while_a_label_is_on_its_way_is_not_overtaken(
    dataset: Dataset, is_reviewer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit_label(dataset, "scan_0", draw_case(0)[1], "final", ANNA)
    begins, change_labels = threading.Event(), Store.change_labels

    @contextmanager
    def telling(*args: Any) -> Iterator[LabelTransaction]:
        begins.set()  # all checks but those of the transaction itself are done
        with change_labels(*args) as change:
            yield change

    with ThreadPoolExecutor(1) as pool:
        with dataset.store.write() as transaction:
            monkeypatch.setattr(Store, "change_labels", telling)
            other = draw_case(1)[1]
            sent = pool.submit(submit_label, dataset, "scan_0", other, "final", ANNA, may_replace_approved=is_reviewer)
            assert begins.wait(60)
            scans.review(transaction, "scan_0", "approved", BERT)
        if is_reviewer:
            assert sent.result().label.id == finals(dataset)[-1]
            return
        with pytest.raises(ApprovedError, match="only a reviewer may reopen it or give it another final label"):
            sent.result()
    with dataset.store.read() as transaction:
        assert scans.get(transaction, "scan_0").state == "approved"
    assert len(finals(dataset)) == 1
    assert not any((dataset.own / "incoming").iterdir()), "nothing is left of what was refused"


def test_of_an_approved_scan_other_tags_may_be_submitted(dataset: Dataset) -> None:
    submit_label(dataset, "scan_0", draw_case(0)[1], "final", ANNA)
    dataset.store.review("scan_0", "approved", BERT)
    with pytest.raises(ApprovedError):
        submit_label(dataset, "scan_0", draw_case(1)[1], "final", ANNA, may_replace_approved=False)
    beside = submit_label(dataset, "scan_0", draw_case(1)[1], "version_1", ANNA, may_replace_approved=False)
    assert beside.label.tag == "version_1"
    assert submit_label(dataset, "scan_0", draw_case(1)[1], "final", BERT).label.tag == "final"
