from __future__ import annotations

import logging

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from segqc.cli import main as command
from segqc.cli.common import CommandError
from segqc.errors import SegqcError, sentence
from segqc.loop.dataset import DatasetError
from segqc.loop.submission import OpenedError
from segqc.networks.device import DeviceMemoryError
from segqc.networks.model import ModelError
from segqc.server.app import _add_error_handlers
from segqc.server.errors import RequestError
from segqc.settings import SettingsError
from segqc.store.database import StoreDamaged, StoreError, StoreUnavailable
from segqc.store.scans import UnknownScan
from segqc.training.cases import TooFewCases
from segqc.volumes import VolumeError

STATUSES = [
    (VolumeError, 422),
    (OpenedError, 400),
    (UnknownScan, 404),
    (StoreError, 409),
    (ModelError, 409),
    (DatasetError, 409),
    (SettingsError, 409),
    (TooFewCases, 409),
    (StoreUnavailable, 503),
    (StoreDamaged, 503),
    (DeviceMemoryError, 503),
]


@pytest.mark.parametrize("text", ["it is away", "it is away.", "is it away?", "it is away. \n"])
def test_a_message_has_one_full_stop(text: str) -> None:
    told = str(SegqcError(text))
    assert told == sentence(told) == sentence(text)
    assert told[-1] in ".?" and not told.endswith("..")
    assert not SegqcError(text).clause.endswith(".")


@pytest.mark.parametrize(("kind", "status"), STATUSES)
@pytest.mark.parametrize("text", ["the scan is away", "the scan is away."])
def test_http_shell_and_text_are_made_from_the_error(
    kind: type[SegqcError],
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise kind(text)

    app = FastAPI()
    _add_error_handlers(app)
    app.add_api_route("/fails", fail)
    answer = TestClient(app).get("/fails")
    assert (answer.status_code, answer.json()) == (status, {"detail": "the scan is away."})

    monkeypatch.setattr(command, "app", fail)
    monkeypatch.setattr(command, "_set_up_text", lambda: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == kind.exit_code == 1
    assert capsys.readouterr().err == "segqc: the scan is away.\n"


def test_a_refused_request_has_its_own_status_and_names_the_scan() -> None:
    app = FastAPI()
    _add_error_handlers(app)

    def fail() -> None:
        raise RequestError(418, "choose another id", image="b")

    app.add_api_route("/fails", fail)
    answer = TestClient(app).get("/fails")
    assert (answer.status_code, answer.json()) == (418, {"detail": "choose another id.", "image": "b"})


def test_a_mistake_of_ours_is_no_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("ours")

    monkeypatch.setattr(command, "app", fail)
    monkeypatch.setattr(command, "_set_up_text", lambda: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    with pytest.raises(ValueError, match="ours"):
        command.main()
    assert issubclass(CommandError, SegqcError) and not issubclass(ValueError, SegqcError)
