"""A dataset folder: scans, labels in MONAI Label's layout, and what SegQC keeps beside them.

::

    <folder>/<id>.nii.gz                  scans (.nii, .nii.gz, .nrrd)
    <folder>/labels/final/<id>.nii.gz     labels that a person submitted
    <folder>/labels/original/<id>.nii.gz  masks that the segmentation network made
    <folder>/segqc.toml                   settings
    <folder>/segqc/                       the store, every label version, bundles of networks, trainings
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from segqc.loop.errors import DatasetError as DatasetError
from segqc.loop.publishing import Bundles
from segqc.networks.bundle import NetworkBundle
from segqc.networks.model_file import ModelError
from segqc.quality.witnesses import UNLIKENESS, named_witnesses, worst_witness
from segqc.selection.expected_gain import EXPECTED_GAIN
from segqc.settings import PacsSettings, Settings, StoreSettings, load_settings
from segqc.split import PatientSplit
from segqc.store import assessments, bundles, features, findings, labels, pacs, remarks, scans
from segqc.store.database import PATIENCE_SECONDS
from segqc.store.labels import FINAL, ORIGINAL, NewLabel
from segqc.store.records import Actor, FindingRecord, JsonObject, LabelRecord, ScanRecord
from segqc.store.scans import ScanReplaced, UnknownScan
from segqc.store.schema import LABELLED_STATES, OPEN_STATES
from segqc.store.store import Store
from segqc.store.sync import Added, add_scan, is_unchanged, regroup, sync
from segqc.types import Assessment, DriftAlarm, Structure, label_names, structures_of_values, values_in
from segqc.volumes import Volume, VolumeError, read_labels, read_scan, scan_suffix

if TYPE_CHECKING:  # these import PyTorch, and most commands need none
    from segqc.networks.assessor import Assessor
    from segqc.networks.card import NetworkName
    from segqc.networks.segmenter import Segmenter
    from segqc.pacs.publishing import Publisher
    from segqc.pacs.source import PacsScans
    from segqc.quality.metrics import Values
    from segqc.quality.report_card import ReportCard
    from segqc.training.cases import Case


@dataclass(frozen=True, slots=True)
class ScanEntry:
    """A scan of the folder and its current labels, where there are any.

    ``final`` and ``original`` are the kept files of these versions, which nobody changes. ``sha256`` is the scan's
    content: what is made for it is kept for this content only.
    """

    id: str
    image: Path
    final: Path | None
    original: Path | None
    sha256: str | None


@dataclass(frozen=True, slots=True)
class CaseFetcher:
    """Brings a scan's file here when a training reads it, also in a process of its own."""

    folder: Path
    settings: Settings
    scan: str
    sha256: str | None

    def __call__(self) -> Path:
        """The file.

        Raises:
            VolumeError: if the scan is gone, or has another content.
            SourceUnavailable: if it is not to be had now.
        """
        key = (self.folder, self.settings.pacs, self.settings.store)
        if key not in _fetching:
            _fetching[key] = Dataset(self.folder, self.settings, watched=True)
        try:
            return _fetching[key].named_file(self.scan, self.sha256)
        except (UnknownScan, ScanReplaced) as error:  # it is left out, as a file is that cannot be read
            raise VolumeError(str(error)) from error


_fetching: dict[tuple[Path, PacsSettings, StoreSettings], Dataset] = {}  # one for each folder in this process


class Dataset:
    """One dataset folder. Holds its path, its settings and its store: what is on disk is the state."""

    def __init__(
        self,
        folder: Path,
        settings: Settings | None = None,
        *,
        watched: bool = False,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """Open a folder.

        Args:
            folder: the folder.
            settings: its settings; by default those of its ``segqc.toml``.
            watched: whether somebody else calls `sync` all the time: then nothing else does, and scans and labels
                are those that were taken in so far.
            patience_seconds: how long to wait for a database that is locked.

        Raises:
            DatasetError: if it is no folder.
            SettingsError: if its ``segqc.toml`` can't be used.
        """
        if not folder.is_dir():
            raise DatasetError(f"{folder}: no such folder; name a folder of scans (.nii, .nii.gz or .nrrd)")
        self.folder = folder.resolve()
        self.settings = settings or load_settings(self.folder)
        self._patience_seconds = patience_seconds
        self.watched = watched
        self._misplaced: list[str] = []

    @property
    def own(self) -> Path:
        """The folder of what SegQC keeps."""
        return self.folder / "segqc"

    @functools.cached_property
    def store(self) -> Store:
        """The store of the folder, with all in it that lies in the folder now.

        Raises:
            StoreError: if its database can't be reached, or is of another version of this program.
        """
        intake = self.settings.intake_checks()
        store = Store.open(
            self.folder,
            self.settings.store.url,
            intake=intake,
            patience_seconds=self._patience_seconds,
            source=self.pacs,
        )
        if not self.watched:
            sync(store, self.settings.patient_of, self.settings.split_config())
        if self.settings.names_patients and self.pacs is None:
            self._misplaced = regroup(store, self.settings.patient_now, self.settings.split_config())
        return store

    @functools.cached_property
    def pacs(self) -> PacsScans | None:
        """The PACS that scans come from; None where they are files of the folder."""
        if self.settings.pacs.url is None:
            return None
        try:
            from segqc.pacs.source import PacsScans
        except ModuleNotFoundError as error:
            raise DatasetError("what talks to a PACS is not installed; pip install 'segqc[server]'") from error
        return PacsScans(self.settings, self.own)

    @functools.cached_property
    def publisher(self) -> Publisher | None:
        """What brings final labels to the PACS; None where there is none, or the settings do not want it."""
        if self.pacs is None or not self.settings.pacs.store_labels:
            return None
        from segqc.pacs.publishing import Publisher

        return Publisher(self.store, self.pacs, self.settings)

    def scan_file(self, scan: ScanRecord) -> Path:
        """The file of a scan, which is fetched where it is not here; see `Store.scan_file`."""
        return self.store.scan_file(scan)

    def image_file(self, entry: ScanEntry) -> Path:
        """The same for an entry of `scans`, whose content it must have.

        Raises:
            ScanReplaced: if another content has taken its place.
        """
        return self.named_file(entry.id, entry.sha256)

    def named_file(self, name: str, content: str | None) -> Path:
        """The same by a scan's name and the SHA-256 of its content; None for any."""
        with self.store.read() as transaction:
            scan = scans.expect(transaction, name, content)
        return self.scan_file(scan)

    def sync(self, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Take in what has been put into the folder, changed in it, or taken out of it.

        Args:
            stop: asked from time to time whether to leave the rest for the next time.
        """
        sync(self.store, self.settings.patient_of, self.settings.split_config(), stop=stop)

    def refresh(self) -> None:
        """Take in what has changed in the folder meanwhile, unless somebody else does so."""
        if not self.watched:
            self.sync()

    def findings(self) -> list[FindingRecord]:
        """The files of the folder that were not taken in, each with a sentence that says why."""
        with self.store.read() as transaction:
            return findings.listing(transaction)

    def remarks(self) -> list[str]:
        """What a user should know of scans that were taken in, a sentence each."""
        with self.store.read() as transaction:
            of_pacs = [*self.pacs.remarks, *pacs.left(transaction)] if self.pacs is not None else []
            return [*self._misplaced, *of_pacs, *remarks.listing(transaction)]

    def is_unchanged(self, scan: ScanRecord) -> bool:
        """Whether a scan's file is as it was when it was read; if not, it was taken in by this call."""
        return is_unchanged(self.store, scan, self.settings.patient_of, self.settings.split_config())

    def verify_scan(self, name: str) -> ScanRecord:
        """A scan, whose file was just seen to hold its content; a file that was changed is taken in first.

        Raises:
            UnknownScan: if there is none of this name, or its file is gone.
        """
        with self.store.read() as transaction:
            scan = scans.get(transaction, name)
        return self.verify(scan)

    def verify(self, scan: ScanRecord) -> ScanRecord:
        """The same for a scan that was just looked up."""
        if not self.is_unchanged(scan):
            with self.store.read() as transaction:
                scan = scans.get(transaction, scan.name)
        if scan.missing_since is not None:
            raise UnknownScan(
                f"the file of the scan {scan.name!r} is gone, or holds no scan any more; see 'segqc scans'"
            )
        return scan

    def add_scan(self, path: Path, name: str) -> Added:
        """Put a new scan into the folder; a file that is there is never replaced.

        Args:
            path: the scan's file; it is copied.
            name: the name that it should have.

        Returns:
            Its name, and whether it is new: the same content under the same name is not.

        Raises:
            ScanExists: if there is another scan of this name, or a file that would be one.
            VolumeError: if the file is no scan that can be used.
        """
        if self.pacs is not None:
            raise DatasetError(f"the scans of this folder come from {self.settings.pacs.url}; store the series there")
        suffix = scan_suffix(path.name) or path.suffix
        return add_scan(self.store, path, name, suffix, self.settings.patient_of, self.settings.split_config())

    def read_scan(self, entry: ScanEntry) -> Volume:
        """Read a scan's file, which must hold the entry's content.

        Raises:
            VolumeError: if it can't be used.
            ScanReplaced: if it holds another content by now.
        """
        scan = self._read(entry)
        try:
            now = self.verify_scan(entry.id)
        except UnknownScan as error:
            raise ScanReplaced(str(error)) from error
        if entry.sha256 is not None and now.sha256 != entry.sha256:
            raise ScanReplaced(f"{entry.image.name}: another scan has taken its place meanwhile; do this again")
        return scan

    def _read(self, entry: ScanEntry) -> Volume:
        path = self.image_file(entry)
        try:
            return read_scan(path, limits=self.settings.intake)
        except VolumeError:
            if self.pacs is None or path.exists():
                raise
            return read_scan(self.image_file(entry), limits=self.settings.intake)  # it was removed this moment

    def scans(self) -> list[ScanEntry]:
        """All scans whose files are there, in the order of their names."""
        self.refresh()
        with self.store.read() as transaction:
            records = [s for s in scans.listing(transaction) if s.missing_since is None]
            finals = labels.current_of_all(transaction, FINAL)
            originals = labels.current_of_all(transaction, ORIGINAL)
        return [self._entry(s, finals.get(s.name), originals.get(s.name)) for s in records]

    def waiting(self) -> list[ScanEntry]:
        """The scans that wait for a person's label, in the order of their names."""
        self.refresh()
        with self.store.read() as transaction:
            records = [s for s in scans.listing(transaction, states=OPEN_STATES) if s.missing_since is None]
            originals = labels.current_of_all(transaction, ORIGINAL)
        return [self._entry(s, None, originals.get(s.name)) for s in records]

    def scan(self, name: str) -> ScanEntry:
        """One scan.

        Raises:
            DatasetError: if the folder has no scan of this name.
        """
        self.refresh()
        with self.store.read() as transaction:
            try:
                record = scans.get(transaction, name)
            except UnknownScan as error:
                raise DatasetError(f"{self.folder}: no scan named {name}") from error
            tags = labels.tags(transaction, name)
        return self._entry(record, tags.get(FINAL), tags.get(ORIGINAL))

    def _entry(self, scan: ScanRecord, final: LabelRecord | None, original: LabelRecord | None) -> ScanEntry:
        return ScanEntry(
            scan.name,
            self.folder / scan.file,
            self.store.label_file(final) if final is not None else None,
            self.store.label_file(original) if original is not None else None,
            scan.sha256,
        )

    @functools.cached_property
    def structures(self) -> tuple[Structure, ...]:
        """The structures: those of the settings, else one per value found in the final labels.

        Raises:
            DatasetError: if there are neither.
        """
        if named := self.settings.structure_list():
            return named
        values: set[int] = set()
        for entry in self.scans():
            if entry.final is not None:
                values |= values_in(read_labels(entry.final).array)
        if not values:
            raise DatasetError(
                f"{self.folder}: no structures are named in segqc.toml and no final label shows any; "
                "write a table such as [structures] liver = [1]"
            )
        return structures_of_values(values)

    def cases(self) -> list[Case]:
        """The scans with a final label that nobody rejected, ready to train on; of some only a part was checked."""
        from segqc.training.cases import Case

        self.refresh()
        with self.store.read() as transaction:
            records = scans.listing(transaction, states=LABELLED_STATES)
            finals = labels.current_of_all(transaction, FINAL)
        found = []
        for scan in records:
            final, path = finals.get(scan.name), self.folder / scan.file
            if final is None or scan.missing_since is not None:
                continue
            shown = str(self.store.view_file(final).relative_to(self.folder))
            limits = self.settings.intake
            found.append(
                Case(
                    scan.name,
                    scan.patient,
                    path,
                    self.store.label_file(final),
                    shown,
                    scan.sha256,
                    limits,
                    slices=final.checked_slices,
                    fetch=self.fetcher(scan),
                )
            )
        return found

    def fetcher(self, scan: ScanRecord) -> Callable[[], Path] | None:
        """What brings a scan's file here when it is read; None where it lies in the folder."""
        return None if self.pacs is None else CaseFetcher(self.folder, self.settings, scan.name, scan.sha256)

    def patient_splits(self) -> Mapping[str, PatientSplit]:
        """Fold and role of each patient, given once and stored."""
        with self.store.read() as transaction:
            return {s.patient: PatientSplit(s.fold, s.split) for s in scans.listing(transaction)}

    @functools.cached_property
    def bundles(self) -> Bundles:
        """The folder's bundles: pairs of networks that were published together."""
        return Bundles(self.store, self.settings)

    def bundle(self) -> NetworkBundle | None:
        """The bundle that serves; None before the first training.

        Raises:
            ModelError: if its files are missing, or its manifest is damaged.
        """
        return self.bundles.serving()

    def model_path(self, network: NetworkName) -> Path | None:
        """The model file of a network that serves; None before its first training.

        Raises:
            ModelError: as for `bundle`.
        """
        bundle = self.bundle()
        return bundle.path(network) if bundle is not None else None

    def training_folder(self, network: NetworkName) -> Path:
        """Where checkpoints and learning curve of a network lie."""
        return self.own / "training" / network

    def segmenter(self) -> Segmenter | None:
        """The segmentation network that serves; None before the first training.

        Raises:
            ModelError: if its files are missing or damaged.
        """
        bundle = self.bundle()
        return bundle.segmenter() if bundle is not None and bundle.holds("segmentation") else None

    def assessor(self) -> Assessor | None:
        """The SegQC-Net that serves, with this folder's settings; None before the first training.

        Raises:
            ModelError: if its files are missing or damaged.
        """
        bundle = self.bundle()
        return bundle.assessor() if bundle is not None and bundle.holds("segqc") else None

    def report_card(self) -> ReportCard | None:
        """What the estimates of the bundle that serves are worth; None where they were not checked.

        None, too, where the bundle's files are missing or damaged: whatever needs them says so.
        """
        try:
            bundle = self.bundle()
        except ModelError:
            return None
        return bundle.manifest.report if bundle is not None else None

    def drift_alarm(self) -> DriftAlarm | None:
        """What audit draws say against the estimates of the bundle that serves.

        None where they say nothing, and where the settings want no alarms.
        """
        if not self.settings.models.drift_level:
            return None
        with self.store.read() as transaction:
            return bundles.drift_alarm(transaction)

    def assessment(self, name: str) -> Assessment | None:
        """The current assessment of the mask that an annotator would start from, if there is one."""
        with self.store.read() as transaction:
            found = assessments.latest(transaction, name)
        return found[1] if found is not None else None

    def assessments(self) -> dict[str, Assessment]:
        """The current assessments of all scans that have one."""
        self.refresh()
        with self.store.read() as transaction:
            there = scans.names(transaction)
            found = assessments.latest_of_all(transaction)
        return {name: found[name] for name in there if name in found}

    def write_assessment(
        self, assessment: Assessment, mask: LabelRecord, bundle: int, *, content: str | None = None
    ) -> None:
        """Keep a bundle's assessment of a stored mask.

        Raises:
            ScanReplaced: if the scan has another content by now than the one that was assessed.
        """
        with self.store.write() as transaction:
            scans.expect(transaction, assessment.scan, content)
            assessments.write(transaction, assessment, mask.id, bundle)
            if not assessments.is_shown(transaction, assessment.scan, mask.id, bundle):
                return
            ranked_by = bundles.ranked_by(transaction)
            said = [named_witnesses(quality.witnesses) for quality in assessment.structures]
            value = worst_witness(ranked_by, said) if ranked_by is not None else None
            if ranked_by is not None and value is not None:  # the scan is ranked by it, not by the estimate
                version = assessment.segmenter_version or assessment.assessor_version
                assessments.write_score(transaction, assessment.scan, ranked_by, value, version, bundle=bundle)
            of_scan = {EXPECTED_GAIN: -assessment.error_volume_ml}
            if assessment.unlikeness is not None:
                of_scan[UNLIKENESS] = -assessment.unlikeness.score
            version = assessment.assessor_version
            for method, score in of_scan.items():
                assessments.write_score(transaction, assessment.scan, method, score, version, bundle=bundle)

    def mask(self, name: str) -> LabelRecord | None:
        """The current mask of a scan: what a network made, or a person put there as such."""
        with self.store.read() as transaction:
            return labels.current(transaction, name, ORIGINAL)

    def save_mask(
        self, name: str, source: Path, bundle: NetworkBundle, *, tag: str = ORIGINAL, content: str | None = None
    ) -> LabelRecord:
        """Keep a mask of a scan that a bundle's segmentation network made.

        Args:
            name: the scan's name.
            source: the mask's file.
            bundle: the bundle.
            tag: the label's tag.
            content: the scan's content (sha256) that the mask was made of; None where nobody knows.

        Raises:
            ScanReplaced: if the scan has another content by now.
        """
        segmenter = bundle.segmenter()
        # what clients of MONAI Label look for: which value is which structure
        info: JsonObject = {
            "model": "segmentation",
            "params": {"label_names": dict(label_names(segmenter.structures)), "model_version": segmenter.version},
        }
        network = Actor(kind="network", name=segmenter.version, identified_by="program")
        label = NewLabel(name, tag, "network", network, bundle=bundle.number, info=info, scan_sha256=content)
        return self.store.save_label(label, source)

    def score_versions(self, method: str) -> dict[str, str]:
        """The version of the network that a score speaks of, of all scans that have one of the serving bundle."""
        with self.store.read() as transaction:
            return {name: version for name, (_, version) in assessments.scores(transaction, method).items()}

    def scores(self, method: str) -> dict[str, float]:
        """The scores of all scans that have one of the serving bundle; the lowest is the worst."""
        with self.store.read() as transaction:
            return {name: value for name, (value, _) in assessments.scores(transaction, method).items()}

    def write_score(
        self,
        method: str,
        name: str,
        value: float,
        version: str,
        content: str | None = None,
        *,
        bundle: int | None = None,
        by_structure: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Keep a baseline's score of a scan, and perhaps its scores of structures.

        Args:
            method: the strategy that the score belongs to.
            name: the scan's name.
            value: the score.
            version: of what made it.
            content: the scan's content (sha256) that the score is of; None where nobody knows.
            bundle: the one that it ends with; None where it ends with the segmentation network of this version.
            by_structure: the scores of structures by their names.

        Raises:
            ScanReplaced: if the scan has another content by now.
        """
        with self.store.write() as transaction:
            scans.expect(transaction, name, content)
            assessments.structure_ids(transaction, list(by_structure))  # where orders find the names
            of_structures = {assessments.structure_score(method, s): score for s, score in by_structure.items()}
            for kept, score in {method: value, **of_structures}.items():
                assessments.write_score(transaction, name, kept, score, version, bundle=bundle)

    def feature_versions(self) -> dict[str, str]:
        """The version of the segmentation network that each scan has features of."""
        with self.store.read() as transaction:
            return features.versions(transaction, "segmenter")

    def write_features(self, name: str, version: str, values: Values, content: str | None = None) -> None:
        """Keep what a segmentation network's encoders make of a scan, (networks, features).

        Raises:
            ScanReplaced: if the scan has another content by now than the one that the features are of.
        """
        with self.store.write() as transaction:
            scan = scans.expect(transaction, name, content)
            features.write(transaction, scan.id, "segmenter", version, values.ravel())
