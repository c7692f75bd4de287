"""Settings of a dataset folder: flags over environment variables over one TOML file over defaults.

Tables such as ``[extraction]``, ``[boxes]`` and ``[training]`` hold the fields of the library's own settings classes,
so that a name, its unit and its default are written in one place only.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import difflib
import functools
import logging
import os
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, TypeVar, get_args, get_type_hints
from urllib.parse import urlsplit

import tomlkit
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as UnreadableVariable

from segqc.errors import SegqcError
from segqc.quality.boxes import BoxSettings
from segqc.quality.error_maps import ExtractionSettings
from segqc.quality.pseudo_labels import PseudoLabelRules
from segqc.split import SplitConfig
from segqc.store.intake import FileChecks
from segqc.store.leases import LeaseRules
from segqc.store.records import Role
from segqc.text import TextError, caseless, decode_text, first_problem, nfc
from segqc.training.spec import TrainingSettings
from segqc.types import BackendName, Structure, label_names
from segqc.volumes import NO_STRUCTURES, ReadLimits, atomic_write, scan_id
from segqc.volumes.tags import read_tag

logger = logging.getLogger(__name__)

SETTINGS_FILE = "segqc.toml"
_PREFIX = "SEGQC_"
_HEADING = "Settings of this dataset folder. Environment variables (SEGQC_TRAINING__EPOCHS=50) and flags win over it."
_ALIKE = 0.75  # from 0 to 1, see difflib
_TWICE: Final = re.compile(r"Cannot (overwrite|declare|mutate|redefine) .* \(at line (?P<line>\d+), column \d+\)")

NetworkName: TypeAlias = Literal["segmentation", "segqc"]
_NETWORKS: Final[tuple[NetworkName, ...]] = ("segmentation", "segqc")
Scalar: TypeAlias = bool | int | float | str | None
Value: TypeAlias = Scalar | tuple[Scalar, ...] | list[Scalar]
Table: TypeAlias = dict[str, "Value | dict[str, Value]"]
T = TypeVar("T")


_TABLES: Mapping[str, type] = {
    "extraction": ExtractionSettings,
    "boxes": BoxSettings,
    "annotation": LeaseRules,
    "intake": ReadLimits,
    "pseudo_labels": PseudoLabelRules,
}


class SettingsError(SegqcError):
    """A setting that cannot be used; says which one, where it came from and what is wanted."""


class ServerSettings(BaseModel):
    """The table ``[server]``.

    Attributes:
        host: address to listen on; by default only this machine's own clients are answered.
        port: port to listen on.
        strategy: the default strategy, also asked for under MONAI Label's name "random"; every scoring of the pool also
            makes what it goes by.
        bootstrap: whether first small networks are trained at the start where there are none.
        inference_slots: how many inferences run at once; others wait.
        upload_limit_mb: the largest request that is taken, in megabytes.
        upload_total_mb: the most that is received at once, by all requests together, in megabytes; who comes then is
            told to come again later.
        upload_pause_seconds: for how long a client may send nothing before its request is complete.
        allowed_hosts: names by which clients may ask for this server, beside this machine's own names and addresses:
            those that a proxy passes on, for instance. ``*.example.org`` are all names below it, ``*`` is any name.
        allowed_origins: origins of other pages, such as a hospital's own OHIF, that may read from and submit to this
            server: ``https://ohif.example.org``.
        dicomweb_cache_mb: memory for the images of scans that viewers look at, in megabytes; the last one is kept
            whatever its size.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    strategy: str = "segqc"
    bootstrap: bool = True
    inference_slots: int = Field(default=1, ge=1)
    upload_limit_mb: float = Field(default=2048, gt=0)
    upload_total_mb: float = Field(default=4096, gt=0)
    upload_pause_seconds: float = Field(default=30, gt=0)
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    dicomweb_cache_mb: float = Field(default=512, ge=0)

    @field_validator("allowed_hosts")
    @classmethod
    def _host_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not re.fullmatch(r"\*|(\*\.)?[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+", name):
                raise ValueError(f"{name!r} is no host name or address; give it without http:// and without a port")
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin == "*":
                raise ValueError("'*' would let every page on the web act for whoever has it open; name the origins")
            if not re.fullmatch(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", origin):
                raise ValueError(
                    f"{origin!r} is no origin; give it as browsers do: https:// or http://, the host in small letters, "
                    "and the port if it is not the usual one, without a slash at its end"
                )
        return value


class OidcSettings(BaseModel):
    """The table ``[auth.oidc]``: an OpenID provider that signs users in.

    Attributes:
        issuer: its address, as it names itself, such as ``https://sso.example.org/realms/hospital``.
        client_id: what this server is called there.
        client_secret: the secret that it gave this server; None for a public client.
        scopes: what is asked for beside ``openid``.
        name_claim: the claim that names the user.
        role_claim: the claim with the user's groups or roles, one or many; dots lead into objects.
        roles: which of these groups are which role; the highest one that a user has counts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    issuer: str
    client_id: str = Field(min_length=1)
    client_secret: SecretStr | None = None
    scopes: tuple[str, ...] = ("profile",)
    name_claim: str = Field(default="preferred_username", min_length=1)
    role_claim: str = Field(default="groups", min_length=1)
    roles: dict[str, Role] = Field(default_factory=dict)

    @field_validator("issuer")
    @classmethod
    def _safe_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
            raise ValueError("wanted the provider's address, which begins with https://")
        return value


class AuthSettings(BaseModel):
    """The table ``[auth]``: who may do what.

    Attributes:
        sign_in: whether users sign in; by default they do, except where the server listens on this machine only and
            neither a proxy nor a provider signs anybody in.
        session_hours: for how long a browser stays signed in.
        token_hours: for how long a program's token counts; 3D Slicer fetches the next one by itself.
        download_minutes: for how long a scan that was handed out to a program with a token may be downloaded from the
            same address without one, as 3D Slicer's extension does it; 0 for never.
        trusted_proxies: addresses or networks of proxies in front of the server: what they say of a request's origin
            and of the user counts.
        user_header: the header in which they name the signed-in user.
        header_role: what users whom a proxy names may do, where they are no users here; None for nothing.
        oidc: an OpenID provider.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sign_in: bool | None = None
    session_hours: float = Field(default=12, gt=0, le=24 * 366)
    token_hours: float = Field(default=12, gt=0, le=24 * 366)
    download_minutes: float = Field(default=10, ge=0, le=24 * 60)
    trusted_proxies: tuple[str, ...] = ()
    user_header: str | None = Field(default=None, pattern=r"^[A-Za-z0-9-]+$")
    header_role: Role | None = None
    oidc: OidcSettings | None = None

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            try:
                ip_network(address)
            except ValueError as error:
                raise ValueError(f"{address!r} is neither an address nor a network such as '10.0.0.0/24'") from error
        return value

    @model_validator(mode="after")
    def _header_of_whom(self) -> AuthSettings:
        if self.user_header is not None and not self.trusted_proxies:
            raise ValueError("user_header needs trusted_proxies: the addresses from which it is believed")
        return self

    def demands_sign_in(self, host: str | None) -> bool:
        """Whether users sign in on a server.

        Args:
            host: the address that it listens on; None where that is not known.
        """
        if self.sign_in is not None:
            return self.sign_in
        return self.user_header is not None or self.oidc is not None or host is None or not is_loopback(host)


def is_loopback(host: str) -> bool:
    """Whether an address, or ``localhost``, is of this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class StoreSettings(BaseModel):
    """The table ``[store]``.

    Attributes:
        url: the database, ``postgresql://user@host/name``; by default an SQLite file in the dataset folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str | None = None


class ModelsSettings(BaseModel):
    """The table ``[models]``.

    Attributes:
        keep: of how many bundles the files are kept, beside the one that serves and those that running jobs may need;
            the oldest ones go first.
        drift_level: the probability that audit draws raise a false drift alarm against a bundle's estimates, ever; 0
            for no alarms. An alarm costs a sentence and changes no order, and audits are few, so that it is not tiny.
        tolerated_fall: by how much the mean Dice on the validation scans may surely have fallen, where a new
            segmentation network still serves by itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: int = Field(default=5, ge=0)
    drift_level: float = Field(default=0.05, ge=0, lt=1)
    tolerated_fall: float = Field(default=0.0, ge=0, le=1)


class RoundSettings(BaseModel):
    """The table ``[round]``: when rounds begin by themselves. By default none does.

    Attributes:
        after_corrections: a round begins when that many scans have a final label that neither a round nor both networks
            of a bundle have trained on; 0 for none.
        at: the local time of day at which a round begins if at least one such label waits for it.
        enough_dice: masks are good enough, and no round begins by itself, when the mean true Dice of those that serve
            is at least that on audit draws, by the lower end of its interval.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    after_corrections: int = Field(default=0, ge=0)
    at: dt.time | None = None
    enough_dice: float = Field(default=0.95, ge=0, le=1)

    @field_validator("at", mode="before")
    @classmethod
    def _time_of_day(cls, value: object) -> object:
        if value is None or (isinstance(value, dt.time) and value.tzinfo is None):
            return value
        if isinstance(value, str) and re.fullmatch(r"([01]?\d|2[0-3]):[0-5]\d", value):
            hour, minute = map(int, value.split(":"))
            return dt.time(hour, minute)
        raise ValueError(f'wanted a time of day from "00:00" to "23:59", got {value!r}')

    @property
    def is_automatic(self) -> bool:
        """Whether rounds ever begin by themselves."""
        return self.after_corrections > 0 or self.at is not None


class TrackingSettings(BaseModel):
    """The table ``[tracking]``: trainings as runs of MLflow. By default there are none.

    Attributes:
        uri: an MLflow server, ``https://mlflow.example.org``, or a folder for a database of its own, relative to the
            dataset folder.
        experiment: the experiment that the runs are of.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str | None = Field(default=None, min_length=1)
    experiment: str = Field(default="segqc", min_length=1)

    @field_validator("uri")
    @classmethod
    def _server_or_folder(cls, value: str | None) -> str | None:
        if value is not None and ":" in value and not value.startswith(("http://", "https://")):
            raise ValueError("wanted a server's address, which begins with http:// or https://, or a folder")
        return value


class PacsSettings(BaseModel):
    """The table ``[pacs]``: a DICOMweb server whose series are the scans. By default scans are files of the folder.

    Attributes:
        url: where its DICOMweb begins, such as ``https://pacs.example.org/dicom-web``.
        modality: of the series that are scans; all but reports, segmentations and the like where none is named.
        description: what their SeriesDescription is like, with ``*`` and ``?``.
        patient: what their PatientID is like, with ``*`` and ``?``.
        user: who signs in with a password, which is in the environment variable ``SEGQC_PACS__PASSWORD``.
        password: never in a file.
        token: sent in the place of a password, as ``Authorization: Bearer``; never in a file.
        ca_file: the certificates of authorities that the PACS's own is checked by; by default those of the system.
        client_certificate: a PEM file with this program's own certificate, and its key where `client_key` names none.
        client_key: a PEM file with the key.
        verify: whether the PACS's certificate is checked.
        timeout_seconds: for how long it may send nothing.
        sync_seconds: how often its series are looked through.
        cache_mb: disk for scans that were fetched, in megabytes; those used in the last minutes are kept beyond it.
        store_labels: whether final labels are stored there as DICOM SEG.
        read_segmentations: whether SEGs that others have stored there become labels.
        orthanc_url: the address of Orthanc's own interface, by which SEGs are removed where its DICOMweb cannot.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str | None = None
    modality: tuple[str, ...] = ()
    description: str | None = Field(default=None, min_length=1)
    patient: str | None = Field(default=None, min_length=1)
    user: str | None = Field(default=None, min_length=1)
    password: SecretStr | None = None
    token: SecretStr | None = None
    ca_file: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None
    verify: bool = True
    timeout_seconds: float = Field(default=30, gt=0)
    sync_seconds: float = Field(default=60, gt=0)
    cache_mb: float = Field(default=20_000, ge=0)
    store_labels: bool = True
    read_segmentations: bool = True
    orthanc_url: str | None = None

    @field_validator("url", "orthanc_url")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return None if value is None else pacs_address(value)

    @property
    def problem(self) -> str | None:
        """What does not go together, as the end of a sentence; it shows no password, as a validator's error would."""
        if self.url is None:
            return None
        if self.token is not None and (self.user or self.password):
            return "name a user with a password, or a token, and not both"
        if (self.user is None) != (self.password is None):
            return "user and password belong together: set SEGQC_PACS__USER and SEGQC_PACS__PASSWORD"
        if self.client_key is not None and self.client_certificate is None:
            return "client_key belongs to a client_certificate, which is not named"
        return None


def pacs_address(value: str) -> str:
    """The address of a PACS without a slash at its end.

    Raises:
        ValueError: if it is none, or holds a password or a query.
    """
    try:
        parts = urlsplit(value)
        is_plain = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.query or parts.fragment)
        _ = parts.port
    except ValueError:
        is_plain = False
    if not is_plain:
        raise ValueError(f"{value!r} is no address of a DICOMweb server such as https://pacs.example.org/dicom-web")
    if "@" in parts.netloc:
        raise ValueError("the address holds a user's name or password; name the user as [pacs] user, and the password "
                         "in the environment variable SEGQC_PACS__PASSWORD")  # fmt: skip
    return value.rstrip("/")


class InferenceSettings(BaseModel):
    """The table ``[inference]``.

    Attributes:
        backend: what computes the networks; "auto" is the fastest that is installed and right on this machine.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: BackendName = "auto"


class Settings(BaseSettings):
    """All settings of a dataset folder; read with `load_settings`."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True)

    structures: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    patients: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    patient_tag: str | None = Field(default=None, min_length=1)
    patient_pattern: str | None = None
    store: StoreSettings = Field(default_factory=StoreSettings)
    annotation: LeaseRules = Field(default_factory=LeaseRules)
    intake: ReadLimits = Field(default_factory=ReadLimits)
    extraction: ExtractionSettings = Field(default_factory=ExtractionSettings)
    boxes: BoxSettings = Field(default_factory=BoxSettings)
    training: Table = Field(default_factory=dict)
    inference: InferenceSettings = Field(default_factory=InferenceSettings)
    server: ServerSettings = Field(default_factory=ServerSettings)
    auth: AuthSettings = Field(default_factory=AuthSettings)
    models: ModelsSettings = Field(default_factory=ModelsSettings)
    pseudo_labels: PseudoLabelRules = Field(default_factory=PseudoLabelRules)
    round: RoundSettings = Field(default_factory=RoundSettings)
    tracking: TrackingSettings = Field(default_factory=TrackingSettings)
    pacs: PacsSettings = Field(default_factory=PacsSettings)

    _split_config: SplitConfig = PrivateAttr()
    _trainings: dict[NetworkName, TrainingSettings] = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _no_booleans(cls, value: object) -> object:
        if isinstance(value, Mapping):
            for name, found in value.items():
                if name in cls.model_fields:
                    _refuse_booleans(name, found, cls.model_fields[name].annotation)
        return value

    @model_validator(mode="after")
    def _typed_training(self) -> Settings:
        both = {key: value for key, value in self.training.items() if key not in _NETWORKS}
        placed = {name: value for name, value in both.items() if name in _names(SplitConfig)}
        self._split_config = _typed(SplitConfig, placed, "training")
        self._trainings = {network: self._training_of(network, both) for network in _NETWORKS}
        return self

    def _training_of(self, network: NetworkName, both: Mapping[str, object]) -> TrainingSettings:
        own, table = self.training.get(network, {}), f"training.{network}"
        if not isinstance(own, dict):
            raise ValueError(f"[{table}] must be a table of settings")
        _refuse_unknown("training", both, TrainingSettings)
        _refuse_unknown(table, own, TrainingSettings)
        return _typed(TrainingSettings, {**both, **own}, table if own else "training")

    @field_validator("structures", mode="before")
    @classmethod
    def _single_values(cls, value: object) -> object:
        if isinstance(value, Mapping):
            return {name: (v,) if isinstance(v, int) else v for name, v in value.items()}
        return value

    @field_validator("structures")
    @classmethod
    def _label_values(cls, value: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        for name, values in value.items():
            if not values or not all(1 <= v <= 255 for v in values) or len(set(values)) < len(values):
                raise ValueError(f"{name}: wanted one or more different label values from 1 to 255, got {list(values)}")
        # files and clients name structures: whatever the case, and beside segments that are none
        folded = [caseless(name) for name in value]
        for name, key in zip(value, folded, strict=True):
            if not key or not name.isprintable():
                raise ValueError(f"{name!r} is no name of a structure; give it one line of text")
            if key in NO_STRUCTURES:
                raise ValueError(f"{name!r} is what clients call a segment that is no structure; choose another name")
            if folded.count(key) > 1:
                raise ValueError(f"{name!r} is there twice, as names are the same in any case; rename one")
        return value

    @field_validator("extraction", "boxes", "annotation", "intake", "pseudo_labels", mode="before")
    @classmethod
    def _known_keys(cls, value: object, info: object) -> object:
        name = getattr(info, "field_name", "")
        if isinstance(value, Mapping):
            _refuse_unknown(name, value, _TABLES[name])
        return value

    def structure_list(self) -> tuple[Structure, ...]:
        """The named structures, in the file's order; empty where none is named."""
        return tuple(Structure(name, values) for name, values in self.structures.items())

    def label_values(self) -> tuple[int, ...]:
        """All label values of the named structures, ascending."""
        return tuple(sorted({v for values in self.structures.values() for v in values}))

    @field_validator("intake")
    @classmethod
    def _usable_limits(cls, value: ReadLimits) -> ReadLimits:
        if value.max_voxels < 1 or not value.max_seconds > 0:
            raise ValueError("max_voxels and max_seconds must be positive")
        return value

    def intake_checks(self) -> FileChecks:
        """What every file has to pass before the store takes it in."""
        return FileChecks(self.intake, label_names(self.structure_list()))

    @field_validator("patient_pattern")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value and nfc(value)

    def patient_of(self, scan: Path) -> str:
        """The patient that a scan file is of.

        From the table ``[patients]``; else the DICOM tag ``patient_tag`` that came along with the file
        (`tags.read_tag`); else what ``patient_pattern`` finds in the scan's id (its first group, or all that it
        matches); else the scan's own id. Names of patients are of one Unicode form (NFC).

        Raises:
            VolumeError: if the file that should have the tag can't be read.
        """
        name = nfc(scan_id(scan))
        named = self._patients_by_scan.get(name)
        if named is not None:
            return named
        if self.patient_tag is not None:
            tagged = read_tag(scan, self.patient_tag)
            if tagged is not None:
                return nfc(tagged)
            _tell_of_untagged(self.patient_tag)
        found = re.search(self.patient_pattern, name) if self.patient_pattern else None
        if found is None:
            return name
        return (found.group(1) if found.re.groups else found.group()) or name

    def named_patient(self, scan: str) -> str | None:
        """The patient that the table ``[patients]`` names for a scan; None where it names none."""
        return self._patients_by_scan.get(nfc(scan))

    def patient_now(self, scan: Path, patient: str) -> str:
        """The patient that a scan file should be of which was taken in as one of `patient`.

        The table ``[patients]`` counts for every scan, the other rules for those that are their own patients as nothing
        named another one. What became known since, by DICOM tags that came later, stays.

        Raises:
            VolumeError: if the file that should have the tag can't be read.
        """
        name = nfc(scan_id(scan))
        named = self._patients_by_scan.get(name)
        if named is not None or patient != name:
            return named or patient
        return self.patient_of(scan)

    @property
    def names_patients(self) -> bool:
        """Whether any rule says whose scans are."""
        return bool(self.patients or self.patient_tag or self.patient_pattern)

    @functools.cached_property
    def _patients_by_scan(self) -> dict[str, str]:
        return {nfc(scan): nfc(patient) for patient, scans in self.patients.items() for scan in scans}

    def split_config(self) -> SplitConfig:
        """How new patients get their fold and role: by the settings ``[training]``."""
        return self._split_config

    def training_settings(self, network: NetworkName) -> TrainingSettings:
        """The training's settings: ``[training]``, and over it ``[training.segmentation]`` or ``[training.segqc]``."""
        return self._trainings[network]


@functools.cache  # once in a process: there may be thousands
def _tell_of_untagged(tag: str) -> None:
    logger.warning(
        "some scans carry no %s (dcm2niix leaves it out unless it is told '-ba n'): 'patient_pattern' or their own ids "
        "name their patients, see 'segqc scans'",
        tag,
    )


def build(kind: type[T], table: Mapping[str, object], name: str) -> T:
    """Turn a table of settings into the frozen dataclass that the library takes.

    Args:
        kind: the dataclass.
        table: field values, as a TOML file or the environment gives them (numbers may be text).
        name: the table's name, for errors.

    Raises:
        SettingsError: if a key is unknown or a value has the wrong type or range.
    """
    try:
        return _typed(kind, table, name)
    except ValueError as error:
        raise SettingsError(f"settings: {error}") from error


def _typed(kind: type[T], table: Mapping[str, object], name: str) -> T:
    _refuse_unknown(name, table, kind)
    try:
        _refuse_booleans("", table, kind)
    except ValueError as error:
        raise ValueError(f"[{name}]: {error}") from error
    try:
        adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]  # mypy holds no class of T to be hashable
        return adapter.validate_python(dict(table))
    except ValidationError as error:
        raise ValueError(f"[{name}]: {first_problem(error.errors())}") from error


@functools.cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    """Made once: that takes longer than to read a table by it."""
    return TypeAdapter(kind)


def _refuse_booleans(place: str, value: object, hint: object) -> None:
    """Refuse true and false where numbers are wanted, as Python takes them for 1 and 0.

    Raises:
        ValueError: with the place.
    """
    if isinstance(value, bool):
        if bool not in (wanted := _scalars(hint)) and wanted & {int, float}:
            raise ValueError(f"{place}: wanted a number, got {str(value).lower()}")
    elif isinstance(value, Mapping):
        fields = get_type_hints(hint) if isinstance(hint, type) else {}
        for name, item in value.items():
            _refuse_booleans(f"{place}.{name}" if place else str(name), item, fields.get(name, hint))
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_booleans(place, item, hint)


def _scalars(hint: object) -> set[object]:
    """The types of which a hint is made: str and int of ``dict[str, tuple[int, ...]]``."""
    parts = get_args(hint)
    return set().union(*map(_scalars, parts)) if parts else {hint}


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _refuse_unknown(name: str, table: Mapping[str, object], kind: type) -> None:
    known = _names(kind)
    unknown = [key for key in table if key not in known]
    if unknown:
        raise ValueError(_unknown(unknown[0], name, known))


def _no_setting(name: str, table: str) -> str:
    kind = Settings.model_fields[table].annotation if table else Settings
    known = list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []
    return _unknown(name, table, known)


def _unknown(name: str, table: str, known: Sequence[str]) -> str:
    where = f"[{table}] has no setting" if table else "there is no setting or table"
    if close := difflib.get_close_matches(name, known, 1, _ALIKE):
        return f"{where} {name!r}; did you mean {close[0]!r}?"
    return f"{where} {name!r}; {'it has' if table else 'there are'} {', '.join(known)}"


# a variable of its own for each thread and task, so that the class is built once: that takes longer than all reading
_file_table: ContextVar[Mapping[str, object]] = ContextVar("_file_table")
_variables: ContextVar[Collection[str] | None] = ContextVar(
    "_variables", default=None
)  # those that count; None for all


class _FromFile(Settings):
    """Settings that read the table in `_file_table`, too."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        only = _variables.get()
        if only is not None and isinstance(env_settings, EnvSettingsSource):
            wanted = {name.lower() for name in only}
            env_settings.env_vars = {n: text for n, text in env_settings.env_vars.items() if n.lower() in wanted}
        return (init_settings, env_settings, InitSettingsSource(settings_cls, dict(_file_table.get())))


def load_settings(
    dataset: Path | None = None, config: Path | None = None, overrides: Mapping[str, object] | None = None
) -> Settings:
    """Read the settings.

    Args:
        dataset: a dataset folder, whose ``segqc.toml`` is read where it exists.
        config: a TOML file to read instead.
        overrides: what was given as flags: ``{"structures": {"cord": (3,)}, "server": {"port": 8010}}``.

    Raises:
        SettingsError: if a file is missing or not TOML, or a setting is unknown or cannot be used.
    """
    path = config or (dataset / SETTINGS_FILE if dataset is not None else None)
    if config is not None and not config.is_file():
        raise SettingsError(f"{config}: no such settings file")
    table = _read_toml(path) if path is not None and os.path.lexists(path) else {}
    flags = dict(overrides or {})
    _refuse_secrets(path, table)
    try:
        settings = _settings_of(table, flags)
    except (ValidationError, UnreadableVariable) as error:
        raise SettingsError(_blame(error, path, table, flags)) from error
    if (problem := settings.pacs.problem) is not None:
        raise SettingsError(f"{path or 'settings'}: pacs: {problem}")
    return settings


def _refuse_secrets(path: Path | None, table: Mapping[str, object]) -> None:
    """Refuse a file that holds a password: it is copied, backed up and shown."""
    pacs = table.get("pacs")
    for name in ("password", "token"):
        if isinstance(pacs, Mapping) and name in pacs:
            raise SettingsError(
                f"{path}: pacs.{name}: is not read from a file; set the environment variable "
                f"{_PREFIX}PACS__{name.upper()}, and remove it here"
            )


def _settings_of(
    table: Mapping[str, object], flags: Mapping[str, object], variables: Collection[str] | None = None
) -> Settings:
    """The settings by a file's table, flags, and the environment's variables: all, or those given."""
    tokens = _file_table.set(table), _variables.set(variables)
    try:
        return _FromFile(**flags)  # type: ignore[arg-type]
    finally:
        _file_table.reset(tokens[0])
        _variables.reset(tokens[1])


def _blame(
    error: ValidationError | UnreadableVariable,
    path: Path | None,
    table: Mapping[str, object],
    flags: Mapping[str, object],
) -> str:
    """What is wrong, and where: in the file, or in the first variable that cannot be used with it."""
    file = str(path) if path is not None and path.is_file() else "settings"
    variables = sorted(name for name in os.environ if name.upper().startswith(_PREFIX))
    for origin, only in ((file, ()), *((f"the environment variable {name}", (name,)) for name in variables)):
        try:
            _settings_of(table, flags, only)
        except (ValidationError, UnreadableVariable) as found:
            return _sentence(found, origin)
    return _sentence(error, " and ".join([file, *variables]))


def _read_toml(path: Path) -> dict[str, object]:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise SettingsError(f"{path}: cannot be read (it is no file)")
    try:
        text = decode_text(path.read_bytes())
        text = text.replace("\r\n", "\n").replace("\r", "\n")  # TOML knows no lone carriage returns
        return tomllib.loads(f"{text}\n")  # of the last line it would tell no number without an end
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise SettingsError(f"{path}: not a TOML file: it is nested too deep") from error
    except (TextError, ValueError) as error:  # no text, no TOML, or an integer of thousands of digits
        if (twice := _TWICE.fullmatch(str(error))) is not None:
            line = text.splitlines()[int(twice["line"]) - 1].strip()
            raise SettingsError(
                f"{path}: line {twice['line']}, {line!r}: this table or setting is there already; remove one of the two"
            ) from error
        raise SettingsError(f"{path}: not a TOML file: {error}") from error


def ignored_variables() -> list[str]:
    """A sentence for each environment variable that looks like a setting's, but is none."""
    found = {
        name: _meant(name.upper().removeprefix(_PREFIX)) for name in os.environ if name.upper().startswith(_PREFIX)
    }
    return [
        f"the environment variable {name} is no setting and changes nothing; "
        f"{f'was {_PREFIX}{meant} meant?' if meant else 'docs/settings.md lists all settings'}"
        for name, meant in sorted(found.items())
        if meant is not None
    ]


def _meant(name: str) -> str | None:
    """The setting that a variable, without its prefix, is probably meant to be.

    None where it is one, or looks like none; empty where nobody can tell which.
    """
    known = [field.upper() for field in Settings.model_fields]
    table, _, rest = name.partition("__")
    if table in known:
        return None
    if close := difflib.get_close_matches(table, known, 1, _ALIKE):
        return f"{close[0]}__{rest}" if rest else close[0]
    if rest:
        return ""
    first, _, rest = name.partition("_")  # one underscore for two
    close = difflib.get_close_matches(first, known, 1, _ALIKE)
    if close and rest:
        return f"{close[0]}__{rest}"
    tables: dict[str, Iterable[str]] = {
        **{table: _names(kind) for table, kind in _TABLES.items()},
        "inference": InferenceSettings.model_fields,
        "pacs": PacsSettings.model_fields,
        "round": RoundSettings.model_fields,
        "server": ServerSettings.model_fields,
        "store": StoreSettings.model_fields,
        "tracking": TrackingSettings.model_fields,
        "training": _names(TrainingSettings),
    }
    return next((f"{table.upper()}__{name}" for table, fields in tables.items() if name.lower() in fields), None)


def _sentence(error: ValidationError | UnreadableVariable, origin: str) -> str:
    if isinstance(error, UnreadableVariable):
        return f"{origin}: is no JSON; docs/settings.md shows how tables and lists are written"
    first, *others = error.errors()
    if first["type"] == "extra_forbidden":
        *tables, name = map(str, first["loc"])
        first["loc"], first["msg"], first["input"] = (), _no_setting(name, tables[0] if tables else ""), None
    return f"{origin}: {first_problem([first, *others])}"


def remember_pacs(folder: Path, url: str, check: Callable[[PacsSettings], None]) -> None:
    """Write into a folder's ``segqc.toml`` from which PACS its scans come; all else in it stays.

    Args:
        folder: the folder; it is made where there is none.
        url: the address of the PACS.
        check: gets the settings of a PACS that is new to the folder; if it raises, nothing is written.

    Raises:
        SettingsError: if the folder's scans come from another PACS, or the file cannot be used.
    """
    path = folder / SETTINGS_FILE
    try:
        url = pacs_address(url)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    known = load_settings(folder).pacs.url
    if known == url:
        return
    if known is not None:
        raise SettingsError(f"{path}: the scans of this folder come from {known}; name another folder for {url}")
    check(load_settings(folder, None, {"pacs": {"url": url}}).pacs)
    document = tomlkit.parse(decode_text(path.read_bytes())) if path.is_file() else tomlkit.document()
    if not document:
        document.add(tomlkit.comment(_HEADING))
    table = document.setdefault("pacs", tomlkit.table())
    table["url"] = url
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(tomlkit.dumps(document), encoding="utf-8")


def write_settings(
    folder: Path,
    structures: Mapping[str, tuple[int, ...]],
    patients: Mapping[str, tuple[str, ...]] | None = None,
    *,
    patient_tag: str | None = None,
) -> Path:
    """Write a dataset folder's ``segqc.toml``.

    Args:
        folder: the dataset folder.
        structures: names and the label values that belong to them.
        patients: names and their scans, where a patient has several scans.
        patient_tag: the DICOM tag that names the patients.

    Returns:
        The file's path.
    """
    document = tomlkit.document()
    document.add(tomlkit.comment(_HEADING))
    if patient_tag:
        document.add(tomlkit.nl())
        document.add("patient_tag", tomlkit.item(patient_tag).comment("the DICOM tag that names a scan's patient"))
    tables = (
        ("structures", structures, "name = the label values that belong to it"),
        ("patients", patients or {}, "patient = the scans of this patient: training and evaluation keep them together"),
    )
    for name, entries, meaning in tables:
        if entries:
            table = tomlkit.table()
            table.comment(meaning)
            table.update({key: list(values) for key, values in entries.items()})
            document.add(tomlkit.nl())
            document.add(name, table)
    path = folder / SETTINGS_FILE
    with atomic_write(path) as temporary:
        temporary.write_text(tomlkit.dumps(document), encoding="utf-8")
    return path
