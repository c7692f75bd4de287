"""The bundles of a dataset folder: publish one, let one serve, and remove old ones.

A bundle is complete on the disk before a row speaks of it, and the transaction that adds the row lets it serve. Folders
change with the store's write lock held, so that whatever a process that died has left can be told from what another one
is writing.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from segqc.errors import SegqcError
from segqc.loop.requests import enqueue_scoring
from segqc.networks.bundle import (
    FOLDS,
    LAST_NUMBER,
    NETWORKS,
    Manifest,
    NetworkBundle,
    NetworkSource,
    StructuresDiffer,
    bundle_folders,
    check_pair,
    last_number,
    leftovers,
    model_name,
    set_aside,
    source_of,
    write_bundle,
)
from segqc.networks.card import NetworkName
from segqc.networks.model_file import ModelError, model_status
from segqc.quality.report_card import BY_ESTIMATE, ReportCard, is_worse
from segqc.quality.stopping import fall_of_few, worse_masks
from segqc.settings import Settings
from segqc.store import bundles, events, jobs
from segqc.store.bundles import NewBundle
from segqc.store.database import StoreUnavailable, Transaction
from segqc.store.events import FOLDER, SERVER
from segqc.store.maintenance import Finding
from segqc.store.records import Actor, Begun, PublishedBundle
from segqc.store.store import MODELS_FOLDER, Store
from segqc.volumes import remove

if TYPE_CHECKING:
    from segqc.networks.assessor import AssessmentSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """A bundle that serves as soon as its transaction is committed, unless it is held."""

    transaction: Transaction
    manifest: Manifest
    number: int
    parent: int | None  # the bundle that served before
    held_because: str | None  # why it does not serve by itself; None where it does


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleStatus:
    """A bundle as the store and the folder know it; at least one of both does."""

    number: int
    published: PublishedBundle | None  # None where a process died before it was recorded
    files: NetworkBundle | None  # None where its files were removed, or its manifest is damaged
    is_removed: bool  # it has no folder any more
    problem: str | None  # why it cannot serve; None where it can


class Bundles:
    """The bundles of one dataset folder: folders in ``segqc/models/``, and the store's rows."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.folder = store.own / MODELS_FOLDER
        self._settings = settings
        self._lock = threading.Lock()
        self._loaded: NetworkBundle | None = None

    def serving(self) -> NetworkBundle | None:
        """The bundle that serves; None before the first training. Its networks are loaded once.

        A folder whose store knows no bundle, as its database is new, adopts the newest intact bundle that lies in it,
        and a held one only where there is no other.

        Raises:
            ModelError: if its files are missing, or its manifest is damaged.
        """
        with self.store.read() as transaction:
            number = bundles.serving_number(transaction)
        if number is None:
            number = self._adopt()
        if number is None:
            return None
        with self._lock:
            if self._loaded is None or self._loaded.number != number:
                self._loaded = self.open(number)
            return self._loaded

    def open(self, number: int) -> NetworkBundle:
        """A bundle by its number, serving or not.

        Raises:
            StoreError: if there is no such bundle.
            ModelError: if its files are missing, or its manifest is damaged.
        """
        with self.store.read() as transaction:
            return self._open(bundles.get(transaction, number))

    def _open(self, published: PublishedBundle) -> NetworkBundle:
        folder = self.folder / str(published.bundle.id)
        return NetworkBundle.open(
            folder,
            self._assessment_settings,
            backend=self._settings.inference.backend,
            sha256=published.manifest_sha256,
        )

    def _assessment_settings(self) -> AssessmentSettings:
        from segqc.networks.assessor import AssessmentSettings

        return AssessmentSettings(extraction=self._settings.extraction, boxes=self._settings.boxes)

    # -------------------------------------------------------------------------------------------------------- publish

    @contextlib.contextmanager
    def publishing(
        self,
        files: Mapping[NetworkName, Path],
        actor: Actor,
        reason: str,
        *,
        only_as_pair: bool = False,
        even_if_worse: bool = False,
        begun: Begun | None = None,
    ) -> Iterator[Publication]:
        """Publish networks: with the other network of the bundle that serves, they make a new one, which serves then.

        A bundle whose masks of the validation scans, or whose report card, are worse than those of the bundle that
        serves is kept, and does not serve by itself. Neither does one of a training or a round during which somebody
        has let the bundle that serves do so by hand: the later choice of a person counts.

        The other network is left out, with a warning, where it knows other structures: it cannot assess the masks, or
        make the masks, of a network that was trained after [structures] had changed.

        What the block does in the transaction is done with it, or not at all.

        Args:
            files: the model files; they are left where they are.
            actor: who publishes.
            reason: why, such as "training of segqc".
            only_as_pair: whether to refuse a network rather than to leave the other one out.
            even_if_worse: whether the new bundle serves even if its masks or estimates are worse.
            begun: when the work on the networks began; None of networks of which nobody knows it.

        Raises:
            ModelError: if a file is no model of its network, or no number is left for a bundle.
            StructuresDiffer: if the files know different structures; or one and the network that serves, where they
                are to be a pair.
            OSError: if the disk is full or read-only. Nothing has changed then.
        """
        sources = {network: source_of(path, network) for network, path in files.items()}
        check_pair(sources)
        try:
            self._adopt_newest()  # its other network is carried over
        except ModelError as error:
            logger.warning("%s", error)
        written: int | None = None
        held: str | None = None
        try:
            with self.store.write() as transaction:
                self._sweep()
                parent = bundles.serving(transaction)
                sources = self._with_carried(parent, sources, only_as_pair=only_as_pair)
                number = self._next_number(transaction)
                report = sources["segqc"].read_card().report if "segqc" in sources else None
                held = _chosen_meanwhile(transaction, parent, begun)
                if held is None and not even_if_worse:
                    held = self._is_worse({n: sources[n] for n in files if n in sources}, parent)
                manifest = Manifest(
                    number=number,
                    made_at=transaction.now,
                    made_by=actor.name,
                    reason=reason,
                    parent=parent.bundle.id if parent is not None else None,
                    networks={network: source.entry for network, source in sources.items()},
                    report=report,
                    held_because=held,
                )
                sha256 = write_bundle(self.folder, manifest, sources)
                written = number
                known = _trained_labels(transaction, manifest, files, parent, begun)
                new = _new(manifest, sha256)
                new = replace(new, segmenter_newest_label=known[0], assessor_newest_label=known[1])
                bundles.add(transaction, new, actor)
                if held is None:
                    self._let_serve(transaction, number, actor)
                else:
                    bundles.hold(transaction, number, held, actor)
                yield Publication(
                    transaction=transaction,
                    manifest=manifest,
                    number=number,
                    parent=manifest.parent,
                    held_because=held,
                )
        except BaseException:
            if written is not None:
                self._remove_unrecorded(written)
            raise
        if held is not None:
            logger.warning(
                "bundle %d is held, and the one before serves on: %s; 'segqc models serve %s %d' lets it serve",
                *(written, held, self.store.dataset, written),
            )
        try:
            self.prune()
        except (SegqcError, OSError) as error:  # the new bundle serves: old ones go the next time
            logger.warning("old bundles could not be removed: %s", error)

    def _is_worse(self, new: Mapping[NetworkName, NetworkSource], parent: PublishedBundle | None) -> str | None:
        """Why new networks' masks or estimates are worse than those that serve; None where not, or nobody can tell."""
        if parent is None:
            return None
        try:
            served = self._open(parent)
            segmentation = served.card("segmentation") if served.holds("segmentation") else None
        except ModelError:
            return None  # a damaged bundle is no reason to keep on serving it
        card = new["segmentation"].read_card() if "segmentation" in new else None
        if card is not None and segmentation is not None and card.structures == segmentation.structures:
            tolerated = self._settings.models.tolerated_fall
            worse = worse_masks(card.validation, segmentation.validation, tolerated=tolerated)
            if worse is not None:
                return worse
            if (fall := fall_of_few(card.validation, segmentation.validation)) is not None:
                logger.warning(
                    "%s; 'segqc models serve %s %d' lets the one before serve again",
                    *(fall, self.store.dataset, parent.bundle.id),
                )
        report = new["segqc"].read_card().report if "segqc" in new else None
        known = served.manifest.report
        return is_worse(report, known) if report is not None and known is not None else None

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder for model files that are about to be published, on the same disk; it is gone afterwards."""
        incoming = self.store.own / "incoming"  # what is left there is found by 'segqc db check'
        incoming.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="model-", dir=incoming) as folder:
            yield Path(folder)

    def publish(self, files: Mapping[NetworkName, Path], actor: Actor, reason: str) -> int:
        """Publish networks as `publishing` does; returns the new bundle's number."""
        with self.publishing(files, actor, reason) as publication:
            return publication.number

    def _remove_unrecorded(self, number: int) -> None:
        """Remove a bundle whose transaction failed; where the database is away, 'segqc db check' finds it later."""
        with contextlib.suppress(StoreUnavailable), self.store.read() as transaction:
            if number not in {published.bundle.id for published in bundles.listing(transaction)}:
                remove(self.folder / str(number))

    def _next_number(self, transaction: Transaction) -> int:
        number = max(bundles.last_number(transaction), last_number(self.folder)) + 1
        if number > LAST_NUMBER:
            last = self.folder / str(LAST_NUMBER)
            raise ModelError(f"{last}: no bundle can have a larger number; rename this folder or remove it")
        return number

    def _with_carried(
        self, parent: PublishedBundle | None, new: dict[NetworkName, NetworkSource], *, only_as_pair: bool
    ) -> dict[NetworkName, NetworkSource]:
        """New networks with those of the bundle before that stay; a damaged one does not, with a warning."""
        if parent is None:
            return new
        try:
            bundle = self._open(parent)
        except ModelError as error:
            logger.warning("%s", error)
            return new
        pair = new
        for network in bundle.manifest.networks.keys() - new.keys():
            try:
                pair = {network: bundle.verify(network), **new}
                check_pair(pair)
            except StructuresDiffer as error:
                if only_as_pair:
                    raise
                logger.warning("%s: the new bundle is without %s: %s", bundle.folder, network, error)
                pair = new
            except ModelError as error:
                logger.warning("%s", error)
                pair = new
        return pair

    def _let_serve(self, transaction: Transaction, number: int, actor: Actor) -> bool:
        """Let a bundle serve, and have the pool scored by it: no other job can be relied on to come to its end."""
        changed = bundles.serve(transaction, number, actor)
        pair = bundles.get(transaction, number).bundle
        if changed and pair.segmenter_version is not None and pair.assessor_version is not None:
            enqueue_scoring(transaction)
        return changed

    # ---------------------------------------------------------------------------------------------------------- serve

    def serve(self, number: int, actor: Actor) -> bool:
        """Let an intact bundle serve, as somebody chooses it by hand; returns whether it did not before.

        Trainings and rounds that run meanwhile do not undo it: the bundles that come of them are held.

        Raises:
            StoreError: if there is no such bundle.
            ModelError: if its files are missing or damaged.
        """
        folder = bundle_folders(self.folder).get(number)
        if folder is not None:  # before the write lock is taken: this may take seconds
            NetworkBundle.open(folder).verify_all()
        with self.store.write() as transaction:
            if folder is not None:
                self._record_found(transaction, [folder])
            self._open(bundles.get(transaction, number))  # still there, and the one that was published
            bundles.choose(transaction, number, actor)
            return self._let_serve(transaction, number, actor)

    def _record_found(self, transaction: Transaction, folders: Iterable[Path]) -> None:
        """Record the bundles of which only the folder is known; damaged ones are left out, held ones held."""
        known = {published.bundle.id for published in bundles.listing(transaction)}
        found = []
        for folder in folders:
            if int(folder.name) in known:
                continue
            try:
                found.append(NetworkBundle.open(folder))
            except ModelError as error:
                logger.warning("%s", error)
        held = _held([bundle.manifest for bundle in found])
        for bundle in found:
            new = _new(bundle.manifest, bundle.sha256)
            reason = f"{new.reason}, by {bundle.manifest.made_by}"
            parent = new.parent if new.parent in known else None
            bundles.add(
                transaction, replace(new, parent=parent, reason=reason, published_at=bundle.manifest.made_at), FOLDER
            )
            if bundle.number in held:
                bundles.hold(transaction, bundle.number, held[bundle.number], FOLDER)
            known.add(bundle.number)

    def _adopt(self) -> int | None:
        """Let the newest intact bundle of the folder serve, where the store knows of none; returns its number.

        A held one serves only where no other is intact. Model files that somebody put into ``segqc/models/`` become a
        bundle where there is none.

        Raises:
            ModelError: if there are bundles or model files, but no intact ones.
        """
        loose = {network: self.folder / model_name(network) for network in NETWORKS}
        if not self.store.is_writable:
            return None
        adopted = self._adopt_newest()
        found = {network: path for network, path in loose.items() if model_status(path) is not None}
        if adopted is not None or not found:
            return adopted
        number = self.publish(found, FOLDER, "model files found in the folder")
        for path in (*found.values(), self.folder / FOLDS):
            path.unlink(missing_ok=True)
        return number

    def _adopt_newest(self) -> int | None:
        """The part of `_adopt` that concerns bundles; returns the number of the one that serves then.

        Raises:
            ModelError: if there are bundles, but no intact ones.
        """
        with self.store.read() as transaction:
            if (serving := bundles.serving_number(transaction)) is not None:
                return serving
        folders, problem = bundle_folders(self.folder), None
        for folder in _adoptable(list(folders.values())):
            try:
                NetworkBundle.open(folder).verify_all()
            except ModelError as error:
                problem = problem or error
                continue
            with self.store.write() as transaction:
                if (serving := bundles.serving_number(transaction)) is not None:
                    return serving  # another process was faster
                number = int(folder.name)
                self._record_found(transaction, folders.values())
                self._let_serve(transaction, number, FOLDER)
            logger.info("%s: serves from now on, as the newest intact bundle of a folder with a new store", folder)
            return number
        if problem is not None:
            raise problem
        return None

    # ----------------------------------------------------------------------------------------------------- old bundles

    def prune(self) -> list[int]:
        """Remove the files of old bundles; returns their numbers. Rows and events stay.

        Kept are the bundle that serves, those that have served since the oldest running job began, and the newest
        others, as many as the setting ``[models] keep`` says.
        """
        removed, hidden = [], []
        with self.store.write() as transaction:
            self._sweep()
            since = jobs.running_since(transaction)
            needed = bundles.served_since(transaction, since) if since is not None else set()
            if (serving := bundles.serving_number(transaction)) is not None:
                needed.add(serving)
            others = [number for number in bundle_folders(self.folder) if number not in needed]
            for number in others[: max(0, len(others) - self._settings.models.keep)]:
                events.record(transaction, SERVER, "files removed", "bundle", number)
                hidden.append(set_aside(self.folder / str(number)))
                removed.append(number)
        for path in hidden:
            remove(path)
        return removed

    def sweep(self) -> list[Path]:
        """Remove what processes that died have left of bundles that were being written or removed."""
        with self.store.write():
            return self._sweep()

    def _sweep(self) -> list[Path]:
        """The same, by whoever holds the write lock."""
        found = leftovers(self.folder)
        for path in found:
            remove(path)
        return found

    def listing(self) -> list[BundleStatus]:
        """All bundles, oldest first; every file is read and hashed."""
        with self.store.read() as transaction:
            known = {published.bundle.id: published for published in bundles.listing(transaction)}
        folders = bundle_folders(self.folder)
        return [self._status(number, known.get(number)) for number in sorted(known.keys() | folders.keys())]

    def findings(self) -> list[Finding]:
        """What is wrong with the bundles: see `maintenance.check`."""
        found = []
        for status in self.listing():
            serves = status.published is not None and status.published.is_serving
            if status.problem is not None and (serves or not status.is_removed):
                found.append(Finding(status.problem.removesuffix("."), "or copy its folder from a backup"))
            elif status.published is None:
                what = f"{self.folder / str(status.number)}: the store does not know this bundle"
                remedy = f"'segqc models serve FOLDER {status.number}' lets it serve, or remove it"
                found.append(Finding(what, remedy, is_damage=False))
        what = "left over from a process that died while it published or removed a bundle"
        found += [
            Finding(f"{path}: {what}", "'segqc db check --repair' cleans it up", is_damage=False)
            for path in leftovers(self.folder)
        ]
        return found

    def _status(self, number: int, published: PublishedBundle | None) -> BundleStatus:
        files = problem = None
        try:
            sha256 = published.manifest_sha256 if published is not None else None
            files = NetworkBundle.open(self.folder / str(number), sha256=sha256)
            files.verify_all()
        except ModelError as error:
            problem = str(error)
        is_removed = number not in bundle_folders(self.folder)
        return BundleStatus(number=number, published=published, files=files, is_removed=is_removed, problem=problem)


def _chosen_meanwhile(transaction: Transaction, parent: PublishedBundle | None, begun: Begun | None) -> str | None:
    """That somebody has let the bundle that serves do so by hand, since the work on new networks began."""
    if parent is None or begun is None or not bundles.is_chosen_since(transaction, parent.bundle.id, begun.event):
        return None
    return f"bundle {parent.bundle.id} was chosen by hand while the networks of this one were trained"


def _trained_labels(
    transaction: Transaction,
    manifest: Manifest,
    files: Mapping[NetworkName, Path],
    parent: PublishedBundle | None,
    begun: Begun | None,
) -> tuple[int | None, int | None]:
    """What `bundles.newest_labels` shall say of a new bundle: a network of the bundle before is as old as it was."""

    def newest(network: NetworkName, version: str | None, known: int | None) -> int | None:
        if network in files and begun is not None:
            return begun.label
        entry = manifest.networks.get(network)
        return known if entry is not None and entry.version == version else None

    if parent is None:
        return newest("segmentation", None, None), newest("segqc", None, None)
    segmenter, assessor = bundles.newest_labels(transaction, parent.bundle.id)
    return (
        newest("segmentation", parent.bundle.segmenter_version, segmenter),
        newest("segqc", parent.bundle.assessor_version, assessor),
    )


def _held(manifests: Iterable[Manifest]) -> dict[int, str]:
    """Of bundles without a store: why those are held that are, by number.

    A manifest never changes, and `Bundles.serve` may have let a held bundle serve; then later bundles name it as their
    parent.
    """
    listed = list(manifests)
    parents = {manifest.parent for manifest in listed}
    return {m.number: m.held_because for m in listed if m.held_because is not None and m.number not in parents}


def _adoptable(folders: Sequence[Path]) -> list[Path]:
    """The folders of bundles in the order in which they are tried: newest first, held ones after all others."""
    manifests = []
    for folder in folders:
        with contextlib.suppress(ModelError):  # whoever tries to verify it says why
            manifests.append(NetworkBundle.open(folder).manifest)
    held = _held(manifests)
    return sorted(reversed(folders), key=lambda folder: int(folder.name) in held)


def _new(manifest: Manifest, sha256: str) -> NewBundle:
    """The row of a bundle with this manifest."""
    versions = {network: entry.version for network, entry in manifest.networks.items()}
    return NewBundle(
        id=manifest.number,
        segmenter_version=versions.get("segmentation"),
        assessor_version=versions.get("segqc"),
        manifest_sha256=sha256,
        parent=manifest.parent,
        reason=manifest.reason,
        ranked_by=_ranked_by(manifest.report),
    )


def _ranked_by(report: ReportCard | None) -> str | None:
    return None if report is None or report.ranked_by == BY_ESTIMATE else report.ranked_by
