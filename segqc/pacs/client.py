"""Requests to a PACS by DICOMweb (DICOM PS3.18): series are found, fetched and stored.

Each request has a connection of its own: servers close idle ones just when the next request is sent (Orthanc after a
second). What fails on its way is tried again; all that is asked here may be asked twice.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar
from urllib.parse import quote

import httpx
from pydicom.dataset import Dataset

from segqc.pacs.errors import PacsRefused, PacsUnavailable
from segqc.pacs.multipart import DICOM, boundary_of, message, parts
from segqc.settings import PacsSettings
from segqc.text import printable

logger = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each request

T = TypeVar("T")
Parameters: TypeAlias = Sequence[tuple[str, str]]
JsonItem: TypeAlias = Mapping[str, Any]

UID: Final = re.compile(r"[0-9]+(\.[0-9]+)*")
JSON: Final = "application/dicom+json"
MAX_UID: Final = 64
_PLAIN: Final = re.compile(r"[^A-Za-z0-9._~-]+")
_PAGE: Final = 200
_TRIES: Final = 3
_PAUSE_SECONDS: Final = 0.3
_CONNECT_SECONDS: Final = 10.0
_MAX_CONNECTIONS: Final = 16
_PASSING: Final = (429, 502, 503, 504)  # what may be over in a moment
_NO_IMAGES: Final = frozenset({"SR", "SEG", "PR", "KO", "DOC", "RTSTRUCT", "RTPLAN", "RTDOSE", "REG", "ECG", "PLAN"})
_INCLUDED: Final = ("PatientID", "SeriesDescription", "Modality", "NumberOfSeriesRelatedInstances")


@dataclass(frozen=True, slots=True)
class FoundSeries:
    """A series as a search tells of it; what the PACS does not say is empty.

    Attributes:
        study_uid: StudyInstanceUID.
        series_uid: SeriesInstanceUID.
        patient: PatientID.
        description: SeriesDescription.
        modality: of the scanner, or SEG.
        count: how many instances it has, as text.
    """

    study_uid: str
    series_uid: str
    patient: str
    description: str
    modality: str
    count: str

    @property
    def signature(self) -> str:
        """What tells quickly that the series is as it was."""
        return f"{self.study_uid} {self.count}"

    @property
    def shown(self) -> str:
        """How messages name it."""
        named = f" ({printable(self.description)!r})" if self.description else ""
        return f"series {self.series_uid}{named} of patient {printable(self.patient) or 'unknown'}"


def is_uid(text: str) -> bool:
    """Whether a text is an identifier of DICOM: digits and dots, so that addresses and names can be made of it."""
    return len(text) <= MAX_UID and UID.fullmatch(text) is not None


class PacsClient:
    """A PACS. Threads may share it."""

    def __init__(self, settings: PacsSettings) -> None:
        """Prepare for requests; none is sent yet.

        Raises:
            PacsUnavailable: if a certificate cannot be read.
        """
        self.url = settings.url or ""
        self._settings = settings
        self._client: httpx.Client | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the connections; later requests open others."""
        with self._lock:
            if self._client is not None:
                self._client.close()
            self._client = None

    def _http(self) -> httpx.Client:
        with self._lock:
            if self._client is None:
                self._client = httpx.Client(
                    verify=self._tls(),
                    timeout=httpx.Timeout(self._settings.timeout_seconds, connect=_CONNECT_SECONDS),
                    limits=httpx.Limits(max_connections=_MAX_CONNECTIONS, max_keepalive_connections=0),
                    trust_env=False,  # no proxy, and no password from ~/.netrc
                    follow_redirects=False,  # a password goes to this address only
                    auth=self._auth,
                    headers=self._headers,
                )
            return self._client

    @property
    def _auth(self) -> tuple[str, str] | None:
        user, password = self._settings.user, self._settings.password
        return (user, password.get_secret_value()) if user is not None and password is not None else None

    @property
    def _headers(self) -> dict[str, str]:
        token = self._settings.token
        return {"Authorization": f"Bearer {token.get_secret_value()}"} if token is not None else {}

    def _tls(self) -> ssl.SSLContext:
        settings = self._settings
        try:
            context = ssl.create_default_context(cafile=settings.ca_file)
            if settings.client_certificate is not None:
                context.load_cert_chain(settings.client_certificate, settings.client_key)
        except OSError as error:  # ssl.SSLError is one
            files = filter(None, (settings.ca_file, settings.client_certificate, settings.client_key))
            raise PacsUnavailable(
                f"{' or '.join(map(str, files))}: is no certificate, or key, that can be used "
                f"({error.strerror or error}); mend [pacs] in segqc.toml"
            ) from error
        if not settings.verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context

    # ------------------------------------------------------------------------------------------------------- requests

    def _again(self, work: Callable[[], T]) -> T:
        """Do something that may be done twice, until it works or has failed often enough.

        Raises:
            PacsUnavailable: if the PACS does not answer.
            PacsRefused: if it answers, but not with what was asked for.
        """
        for attempt in range(1, _TRIES + 1):
            try:
                return work()
            except (httpx.TransportError, PacsRefused) as error:
                passes = not isinstance(error, PacsRefused) or error.code in _PASSING
                if attempt < _TRIES and passes:
                    time.sleep(_PAUSE_SECONDS * attempt)
                elif isinstance(error, PacsRefused):
                    raise
                else:
                    raise self._unavailable(error) from error
        raise AssertionError("unreachable")

    def _unavailable(self, error: httpx.TransportError) -> PacsUnavailable:
        reason = (
            "it takes too long" if isinstance(error, httpx.TimeoutException) else str(error) or type(error).__name__
        )
        return PacsUnavailable(f"the PACS at {self.url} does not answer ({reason}); try again later")

    @contextlib.contextmanager
    def stream(
        self, method: str, address: str, *, accept: str, parameters: Parameters = (), content: bytes | None = None,
        content_type: str | None = None,
    ) -> Iterator[httpx.Response]:  # fmt: skip
        """Send one request, and give its answer before its body has come.

        Args:
            method: of HTTP.
            address: the whole address.
            accept: the types of answers that are wanted.
            parameters: of the query.
            content: the request's body.
            content_type: its type.

        Raises:
            PacsRefused: if the answer's status is none of success.
            httpx.TransportError: if the request, or its answer, fails on its way.
        """
        headers = {"Accept": accept, **({"Content-Type": content_type} if content_type else {})}
        with self._http().stream(
            method, f"{address}?{_query(parameters)}" if parameters else address, headers=headers, content=content
        ) as answer:
            if not answer.is_success:
                raise self._refused(answer)
            yield answer

    def _refused(self, answer: httpx.Response) -> PacsRefused:
        code = answer.status_code
        if code in (401, 403):
            return PacsRefused(
                f"the PACS at {self.url} does not let this program in ({code}); check [pacs] user (or "
                "SEGQC_PACS__USER) and the environment variable SEGQC_PACS__PASSWORD, or SEGQC_PACS__TOKEN",
                code,
            )
        what = f"{answer.request.method} {answer.request.url.path}"
        return PacsRefused(f"the PACS at {self.url} answers {code} ({answer.reason_phrase}) to {what}", code)

    def query(self, path: str, parameters: Parameters = ()) -> list[JsonItem]:
        """What the PACS tells of a path below its address, by the DICOM JSON model.

        Raises:
            SourceUnavailable: if it does not answer, or with something else.
        """
        return self._again(lambda: self._ask(path, parameters))

    def _ask(self, path: str, parameters: Parameters) -> list[JsonItem]:
        with self.stream("GET", f"{self.url}{path}", accept=JSON, parameters=parameters) as answer:
            answer.read()
            if answer.status_code == 204 or not answer.content.strip():
                return []
            try:
                found = answer.json()
            except ValueError as error:
                raise PacsRefused(f"the PACS at {self.url} answers no JSON to {path}; is it DICOMweb?") from error
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise PacsRefused(f"the PACS at {self.url} answers no list of data sets to {path}; is it DICOMweb?")
        return found

    def check(self) -> None:
        """Ask once for a series, to see that the address is DICOMweb's and that it lets this program in.

        Raises:
            PacsUnavailable: if it does not answer now.
            PacsRefused: if it answers, and will do so again, but not as DICOMweb or not to this program.
        """
        try:
            self._ask("/series", [("limit", "1")])
        except httpx.TransportError as error:
            raise self._unavailable(error) from error
        except PacsRefused as error:
            if error.code in _PASSING:
                raise PacsUnavailable(str(error)) from error
            if error.code in (None, 401, 403):
                raise
            raise PacsRefused(f"{error.clause}; is this the address of its DICOMweb?", error.code) from error

    def open(self, path: str, accept: str, parameters: Parameters) -> tuple[httpx.Response, Callable[[], None]]:
        """An answer before its body has come, and what ends it.

        Raises:
            SourceUnavailable: if the PACS does not answer, or with no success.
        """

        def send() -> tuple[httpx.Response, Callable[[], None]]:
            stack = contextlib.ExitStack()
            answer = stack.enter_context(self.stream("GET", f"{self.url}{path}", accept=accept, parameters=parameters))
            return answer, stack.close

        return self._again(send)

    # ------------------------------------------------------------------------------------------------------- searches

    def scan_series(self) -> list[FoundSeries]:
        """The series that are scans by the settings.

        Raises:
            SourceUnavailable: if they cannot be found now.
        """
        settings = self._settings
        found: dict[str, FoundSeries] = {}
        for modality in settings.modality or (None,):
            for series in self.search(modality, settings.description, settings.patient):
                if series.modality not in _NO_IMAGES:
                    found[series.series_uid] = series
        return list(found.values())

    def search(
        self, modality: str | None, description: str | None = None, patient: str | None = None
    ) -> Iterator[FoundSeries]:
        """Find series, page by page; each is checked again, as not every PACS knows every filter.

        Of the values only plain characters are asked for, and wildcards for all others: Orthanc does not decode them.
        """
        wanted = {"Modality": modality, "SeriesDescription": description, "PatientID": patient}
        asked = [(name, _PLAIN.sub("*", value)) for name, value in wanted.items() if value is not None]
        asked += [("includefield", name) for name in _INCLUDED]
        seen: set[str] = set()
        while True:
            page = self.query("/series", [*asked, ("limit", str(_PAGE)), ("offset", str(len(seen)))])
            new = {uid: item for item in page if (uid := text_of(item, "0020000E")) not in seen}
            if not new:
                return
            seen |= new.keys()
            for item in new.values():
                series = _found_series(item)
                if series is not None and _matches(series, modality, description, patient):
                    yield series

    def find_series(self, series_uid: str) -> FoundSeries | None:
        """One series; None where the PACS has none of this identifier."""
        asked = [("SeriesInstanceUID", series_uid), *(("includefield", name) for name in _INCLUDED)]
        return next((s for item in self.query("/series", asked) if (s := _found_series(item)) is not None
                     and s.series_uid == series_uid), None)  # fmt: skip

    # ---------------------------------------------------------------------------------------------- fetched and stored

    def fetch_series(self, study_uid: str, series_uid: str, folder: Path, max_bytes: int) -> int:
        """Fetch all instances of a series into an empty folder, a file each; returns how many they are.

        Raises:
            SourceUnavailable: if they cannot be fetched now, or are more than `max_bytes`.
        """

        def fetch() -> int:
            for file in folder.iterdir():
                file.unlink()
            count = size = 0
            address = f"{self.url}/studies/{study_uid}/series/{series_uid}"
            for count, content in enumerate(self._parts(address), start=1):
                size += len(content)
                if size > max_bytes:
                    raise PacsRefused(
                        f"the series {series_uid} holds more than {max_bytes >> 20} MB; it is not fetched"
                    )
                (folder / f"{count:06d}.dcm").write_bytes(content)
            return count

        return self._again(fetch)

    def _parts(self, address: str) -> Iterator[bytes]:
        with self.stream("GET", address, accept=f'multipart/related; type="{DICOM}"') as answer:
            boundary = boundary_of(answer.headers.get("Content-Type", ""))
            if boundary is None:
                raise PacsRefused(f"the PACS at {self.url} sends no DICOM files; is it DICOMweb?")
            try:
                for part in parts(answer.iter_bytes(), boundary):
                    yield part.content
            except ValueError as error:
                raise httpx.RemoteProtocolError(str(error)) from error

    def series_metadata(self, study_uid: str, series_uid: str) -> list[Dataset]:
        """The headers of all instances of a series, without pixels, in no particular order.

        Raises:
            SourceUnavailable: if they cannot be fetched now, or cannot be read.
        """
        found = self.query(f"/studies/{study_uid}/series/{series_uid}/metadata")
        try:
            return [Dataset.from_json(dict(item), bulk_data_uri_handler=_no_bulk_data) for item in found]
        except Exception as error:  # pydicom raises many kinds, none with a common base
            raise PacsRefused(
                f"the PACS at {self.url} sends headers of {series_uid} that cannot be read ({error})"
            ) from error

    def store(self, file: bytes) -> None:
        """Store a DICOM file; one that is there already stays.

        Raises:
            SourceUnavailable: if it cannot be stored now, or is refused.
        """
        content, content_type = message([file])

        def send() -> None:
            with self.stream(
                "POST", f"{self.url}/studies", accept=JSON, content=content, content_type=content_type
            ) as answer:
                answer.read()
                if (reason := _failure(answer)) is not None:
                    raise PacsRefused(f"the PACS at {self.url} does not store the file: {reason}")

        self._again(send)

    def remove_series(self, study_uid: str, series_uid: str) -> None:
        """Remove a series; one that is not there is removed already.

        Raises:
            PacsRefused: with the status 405 if the PACS does not remove series for anyone.
            SourceUnavailable: if it cannot be removed now.
        """
        try:
            self._delete(f"{self.url}/studies/{study_uid}/series/{series_uid}")
        except PacsRefused as error:
            if error.code == 404 and self.find_series(series_uid) is None:
                return
            orthanc = self._settings.orthanc_url
            if orthanc is None or error.code not in (400, 404, 405, 501):
                raise
            for number in self._lookup(orthanc, series_uid):
                self._delete(f"{orthanc}/series/{number}")

    def _delete(self, address: str) -> None:
        def delete() -> None:
            with self.stream("DELETE", address, accept="*/*") as answer:
                answer.read()

        self._again(delete)

    def _lookup(self, orthanc: str, series_uid: str) -> list[str]:
        """The numbers of a series in Orthanc's own interface; none where it is not there."""

        def ask() -> list[str]:
            with self.stream(
                "POST", f"{orthanc}/tools/lookup", accept="application/json", content=series_uid.encode(),
                content_type="text/plain",
            ) as answer:  # fmt: skip
                answer.read()
                found = answer.json()
            return [str(item["ID"]) for item in found if item.get("Type") == "Series"]

        return self._again(ask)


def _query(parameters: Parameters) -> str:
    """A query with its wildcards as they are, which Orthanc would not know again otherwise."""
    return "&".join(f"{quote(name, safe='')}={quote(value, safe='*?,')}" for name, value in parameters)


def text_of(item: JsonItem, tag: str) -> str:
    """The first value of an attribute of a data set by the DICOM JSON model, as text; empty where there is none."""
    element = item.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    first = values[0] if isinstance(values, list) and values else None
    return str(first).strip() if isinstance(first, str | int) else ""


def _found_series(item: JsonItem) -> FoundSeries | None:
    """What a search tells of a series; None where its identifiers are none."""
    study, series = text_of(item, "0020000D"), text_of(item, "0020000E")
    if not (is_uid(study) and is_uid(series)):
        _tell_of_bad_uid(series or study)
        return None
    rest = (text_of(item, tag) for tag in ("00100020", "0008103E", "00080060", "00201209"))
    return FoundSeries(study, series, *rest)


@functools.lru_cache(maxsize=1000)  # once: searches come again
def _tell_of_bad_uid(uid: str) -> None:
    logger.warning("the PACS has a series with an identifier that is none, %r; it is left out", uid)


def _matches(series: FoundSeries, modality: str | None, description: str | None, patient: str | None) -> bool:
    return (
        (modality is None or series.modality == modality)
        and (description is None or _is_like(series.description.lower(), description.lower()))
        and (patient is None or _is_like(series.patient, patient))
    )


def _is_like(text: str, pattern: str) -> bool:
    """Whether a text fits a pattern with DICOM's two wildcards."""
    expression = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return re.fullmatch(expression, text, re.DOTALL) is not None


def _failure(answer: httpx.Response) -> str | None:
    """Why an instance was not stored, by the answer (PS3.18, 10.5.3); None where it was."""
    if not answer.content.strip():
        return None
    try:
        failed = answer.json().get("00081198", {}).get("Value") or []
        return f"failure reason {text_of(failed[0], '00081197') or 'not given'}" if failed else None
    except (ValueError, AttributeError):
        return None  # another form of answer, with a status of success


def _no_bulk_data(tag: str, vr: str, uri: str) -> None:
    """Leave out what headers only point to."""
