"""Keeping a store well: copies of it, findings where rows and files disagree, and the repair of what is safe to repair.

Label content never changes, so that it is copied and hashed while others work; what could be a change that is just
being made is looked at again with the write lock in hand before it counts as a finding.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import func, select, text

from segqc.progress import NO_PROGRESS, Progress
from segqc.store import bundles, findings, labels, pacs
from segqc.store.database import DATABASE_FILE, REVISION, Database, StoreDamaged, StoreError, Transaction, sqlite_url
from segqc.store.files import LabelFiles, appearing, copy_with_sha256, sha256_of, state_of
from segqc.store.schema import LABELLED_STATES, OPEN_STATES, Base, LabelVersion, LabelView, Scan
from segqc.store.store import MODELS_FOLDER, OWN_FOLDER, Store
from segqc.text import nfc
from segqc.volumes import atomic_write, is_scan_path, label_id, label_suffix

_ASIDE: Final = "until then it is not used"
_ROWS: Final = 1000  # of a table are in memory at once
_TAKE_IN: Final = "any command that opens the folder takes it in, 'segqc rank' for one"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a store: what, and what to do about it.

    ``is_damage`` is false for what harms nothing: files that are not taken in, or not yet, and leftovers.
    """

    what: str
    remedy: str
    is_damage: bool = True


@dataclass(frozen=True, slots=True)
class Restored:
    """What `rebuild_views` did: how many files it wrote, and which it left as they differ by somebody's edit."""

    written: int
    edited: tuple[Path, ...]


# ------------------------------------------------------------------------------------------------------------ backup


def backup(store: Store, target: Path, *, also: Sequence[str] = (), progress: Progress = NO_PROGRESS) -> int:
    """Copy a store's database, label contents, and the bundle that serves, while others work on it.

    The copy holds ``segqc/`` as it is in a dataset folder; `restore.restore` brings it back.

    Args:
        store: the store, on SQLite.
        target: the folder to make.
        also: names of files of the dataset folder to copy along, where they exist (its settings).
        progress: called for each copied file.

    Returns:
        The number of copied label contents.

    Raises:
        StoreError: if the target exists, the database is on PostgreSQL or damaged, or a content is missing or
            damaged. Nothing is left at the target then.
    """
    if target.exists():
        raise StoreError(f"{target}: exists already; name a new folder for the backup")
    with atomic_write(target) as temporary:
        own = temporary / OWN_FOLDER
        own.mkdir(parents=True)
        store.database.backup(own / DATABASE_FILE)
        copy = Database(sqlite_url(own / DATABASE_FILE), shown=store.database.shown)
        try:
            with copy.read() as transaction:
                if damage := next(damages(transaction), None):
                    raise StoreDamaged(
                        f"{store.database.shown}: the database is damaged ({damage}); stop segqc and restore an "
                        "earlier backup (segqc db restore BACKUP FOLDER)"
                    )
                contents = sorted(labels.contents(transaction))
                serving = bundles.serving_number(transaction)
        finally:
            copy.close()
        copy_contents(store.files, contents, LabelFiles(temporary, own), progress)
        bundle = store.own / MODELS_FOLDER / str(serving)
        if bundle.is_dir():  # where it is lost, 'segqc db check' says so: the labels are worth a copy all the same
            shutil.copytree(bundle, own / MODELS_FOLDER / bundle.name)
        for name in also:
            if (store.dataset / name).is_file():
                shutil.copy2(store.dataset / name, temporary / name)
    return len(contents)


def copy_contents(
    source: LabelFiles, contents: Sequence[tuple[str, str]], target: LabelFiles, progress: Progress = NO_PROGRESS
) -> None:
    """Copy label contents, given as address and suffix, where the target does not have them yet.

    Raises:
        StoreError: if one is missing or damaged.
    """
    for done, (sha256, suffix) in enumerate(contents, 1):
        kept, wanted = source.object_path(sha256, suffix), target.object_path(sha256, suffix)
        if not (wanted.is_file() and sha256_of(wanted) == sha256):
            with atomic_write(wanted) as temporary:
                _copy_checked(kept, sha256, temporary)
                temporary.chmod(0o444)
        progress.step(done, len(contents), "label contents", unit="files")


def _copy_checked(kept: Path, sha256: str, target: Path) -> None:
    if not kept.is_file():  # nor a pipe, which would be waited for
        raise StoreError(f"{kept}: this label content is missing; copy it from a backup")
    found = copy_with_sha256(kept, target)
    if found != sha256:
        raise StoreError(f"{kept}: this label content is damaged; replace it by the one of a backup")


def upgrade(store: Store) -> tuple[str | None, str]:
    """Bring the tables of a store that is not open to this program's revision; returns the one before and the new one.

    Raises:
        StoreError: if the tables are of a later revision.
    """
    store.own.mkdir(parents=True, exist_ok=True)
    before = store.revision()
    if before is not None and before > REVISION:
        raise StoreError(
            f"{store.database.shown}: the store's tables are of revision {before}, later than {REVISION}; "
            "use the newer version of segqc"
        )
    store.database.upgrade()
    return before, REVISION


# ------------------------------------------------------------------------------------------------------------- check


def check(store: Store, progress: Progress = NO_PROGRESS) -> list[Finding]:
    """Look for what is wrong in a store: in the database itself, in its files, and between both.

    Every content is hashed, which takes about as long as reading all label files twice. Nothing is changed.
    """
    found = list(_database_findings(store))
    if unreadable := list(_cell_findings(store)):
        return found + unreadable  # what is left of the rows says nothing about files
    found += _content_findings(store, progress)
    found += _view_findings(store, progress)
    found += _scan_findings(store)
    found += [
        Finding(
            f"{path}: left over from a label change whose process died",
            "'segqc db check --repair' cleans it up",
            is_damage=False,
        )
        for path in store.files.stale()
    ]
    return found


def repair(store: Store, progress: Progress = NO_PROGRESS) -> Restored:
    """Repair what can be repaired without loss: leftovers of dead processes, and views that are missing or damaged."""
    store.recover()
    for path in store.files.stale():
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return rebuild_views(store, progress=progress)


def damages(transaction: Transaction) -> Iterator[str]:
    """What SQLite finds wrong in the pages and indices of its own file."""
    return (line for (line,) in transaction.execute(text("PRAGMA integrity_check")) if line != "ok")


def _settled(store: Store) -> contextlib.AbstractContextManager[Transaction]:
    """A transaction to look again in: whoever was just saving has done so."""
    return store.write() if store.is_writable else store.read()


def _database_findings(store: Store) -> Iterator[Finding]:
    remedy = "stop all of segqc, then restore a backup: segqc db restore BACKUP FOLDER"
    with store.read() as transaction:
        if store.database.is_sqlite:
            for line in damages(transaction):
                yield Finding(f"{store.database.shown}: the database is damaged: {line}", remedy)
            for table, row, parent, _ in transaction.execute(text("PRAGMA foreign_key_check")):
                what = f"the row {row} of {table} refers to a row of {parent} that is not there"
                yield Finding(f"{store.database.shown}: {what}", remedy)
        finals = set(
            transaction.scalars(
                select(LabelVersion.scan_id).where(LabelVersion.id.in_(labels.current_versions((labels.FINAL,))))
            )
        )
        for scan, name, state in transaction.execute(select(Scan.id, Scan.name, Scan.state)):
            if state in LABELLED_STATES and scan not in finals:
                yield Finding(
                    f"the scan {name!r} is {state}, but has no final label", "save a label of it, or reopen it"
                )
            if state in OPEN_STATES and scan in finals:
                yield Finding(f"the scan {name!r} is {state}, but has a final label", "save its label once more")


def _cell_findings(store: Store) -> Iterator[Finding]:
    """What whoever reads the rows will meet: a table that is gone, a cell that cannot be read."""
    try:
        with store.read() as transaction:
            for table in Base.metadata.sorted_tables:
                for _ in transaction.execute(select(table)).yield_per(_ROWS):
                    pass
    except StoreDamaged as error:
        yield Finding(error.clause, "no other repair helps")


def _content_findings(store: Store, progress: Progress) -> Iterator[Finding]:
    with store.read() as transaction:
        contents = sorted(labels.contents(transaction))
    for done, (sha256, suffix) in enumerate(contents, 1):
        path = store.files.object_path(sha256, suffix)
        if (finding := _content_finding(path, sha256)) is not None:
            yield finding
        progress.step(done, len(contents), "label contents", unit="files")
    known = {store.files.object_path(*content) for content in contents}
    untracked = [path for path in store.files.all_objects() if path not in known]
    if not untracked:
        return
    with _settled(store) as transaction:
        known = {store.files.object_path(*content) for content in labels.contents(transaction)}
        untracked = [path for path in untracked if path.exists() and path not in known]
    for path in untracked:
        yield Finding(f"{path}: no label version speaks of this file", "it may be removed", is_damage=False)


def _content_finding(path: Path, sha256: str) -> Finding | None:
    if not path.is_file():
        return Finding(f"{path}: this label content is missing", "copy it from a backup")
    try:
        if sha256_of(path) == sha256:
            return None
    except OSError as error:
        return _unreadable(path, error)
    return Finding(f"{path}: this label content is damaged", "replace it by the one of a backup")


def _scan_findings(store: Store) -> Iterator[Finding]:
    with os.scandir(store.dataset) as entries:
        files = {e.name for e in entries if e.is_file() and is_scan_path(Path(e.path))}
    with store.read() as transaction:
        missing = dict(transaction.execute(select(Scan.file, Scan.missing_since.is_not(None))).all())
        for file in pacs.series(transaction):  # comes from elsewhere
            missing.pop(file, None)
            files.discard(file)
        kept_aside = {finding.file: finding.sentence.rstrip(".") for finding in findings.listing(transaction)}
    for file in sorted(missing.keys() | files):
        path = store.dataset / file
        if file in kept_aside:
            yield Finding(kept_aside[file].removesuffix("."), _ASIDE, is_damage=False)
        elif file not in missing:
            yield Finding(f"{path}: this scan is not in the store yet", _TAKE_IN, is_damage=False)
        elif not missing[file] and file not in files:
            yield Finding(f"{path}: this scan's file is gone", "put it back; its labels and their history are kept")
        elif missing[file] and file in files:
            yield Finding(f"{path}: this scan's file has come back", _TAKE_IN, is_damage=False)


# ------------------------------------------------------------------------------------------------------------- views


@dataclass(frozen=True, slots=True)
class _Current:
    """The current version of a scan's label under a tag; address and suffix are of the file that shows it."""

    scan_id: int
    scan: str
    tag: str
    version: int
    sha256: str
    suffix: str


@dataclass(frozen=True, slots=True)
class _View:
    """How a view was left."""

    version: int
    file: str
    size: int
    modified_ns: int


def _currents(transaction: Transaction) -> list[_Current]:
    last = select(func.max(LabelVersion.id)).where(labels.IS_LABEL).group_by(LabelVersion.scan_id, LabelVersion.tag)
    query = (
        select(
            Scan.id,
            Scan.name,
            LabelVersion.tag,
            LabelVersion.id,
            func.coalesce(LabelVersion.submitted_sha256, LabelVersion.sha256),
            func.coalesce(LabelVersion.submitted_suffix, LabelVersion.suffix),
        )
        .join(Scan, LabelVersion.scan_id == Scan.id)
        .where(LabelVersion.id.in_(last), LabelVersion.sha256.is_not(None), Scan.former_name.is_(None))
        .order_by(LabelVersion.tag, LabelVersion.id)
    )
    rows = transaction.execute(query)
    return [_Current(i, scan, tag, n, sha256 or "", suffix or "") for i, scan, tag, n, sha256, suffix in rows]


def _views(transaction: Transaction) -> dict[tuple[int, str], _View]:
    return {
        (row.scan_id, row.tag): _View(row.label_version_id, row.file, row.size, row.modified_ns)
        for row in transaction.scalars(select(LabelView))
    }


def _view_findings(store: Store, progress: Progress) -> Iterator[Finding]:
    with store.read() as transaction:
        currents, views = _currents(transaction), _views(transaction)
    suspects = set()
    for done, current in enumerate(currents, 1):
        if _view_finding(store, current, views.get((current.scan_id, current.tag))) is not None:
            suspects.add((current.scan_id, current.tag))
        progress.step(done, len(currents), "label files", unit="files")
    untracked = _files_without_row(store, views.values())
    if not suspects and not untracked and len(views) == len(currents):
        return
    with _settled(store) as transaction:
        currents, views = _currents(transaction), _views(transaction)
        found = [
            finding
            for current in currents
            if (current.scan_id, current.tag) in suspects
            and (finding := _view_finding(store, current, views.get((current.scan_id, current.tag)))) is not None
        ]
        gone = views.keys() - {(current.scan_id, current.tag) for current in currents}
        found += [
            Finding(f"{store.files.views / views[key].file}: noted as shown, but its label was removed", _RESTORE)
            for key in sorted(gone)
        ]
        untracked &= _files_without_row(store, views.values())
        names = set(map(nfc, transaction.scalars(select(Scan.name))))
        kept_aside = {finding.file: finding.sentence.rstrip(".") for finding in findings.listing(transaction)}
    yield from found
    for path in sorted(untracked):
        if (file := str(path.relative_to(store.dataset))) in kept_aside:
            yield Finding(kept_aside[file].removesuffix("."), _ASIDE, is_damage=False)
        elif label_suffix(path.name) is not None and nfc(label_id(path)) in names:
            yield Finding(f"{path}: this label is not in the store yet", _TAKE_IN, is_damage=False)
        else:
            yield Finding(
                f"{path}: no scan of the folder has this label", "add its scan, or remove it", is_damage=False
            )


_RESTORE: Final = "'segqc db restore-views' shows the kept label again"


def _view_finding(store: Store, current: _Current, view: _View | None) -> Finding | None:
    path = store.files.views / store.files.view_name(current.scan, current.tag, current.suffix)
    if view is None or view.version != current.version:
        return Finding(f"{path}: the store did not note which version it shows", _RESTORE)
    if not path.is_file():
        return Finding(f"{path}: this label file is missing", _RESTORE)
    try:
        if sha256_of(path) == current.sha256:
            return None
    except OSError as error:
        return _unreadable(path, error)
    if _is_as_left(path, view):
        return Finding(f"{path}: this label file is damaged", _RESTORE)
    return Finding(f"{path}: was changed after the store wrote it", f"{_TAKE_IN}, as a new version", is_damage=False)


def _unreadable(path: Path, error: OSError) -> Finding:
    return Finding(f"{path}: cannot be read ({error.strerror})", "give this user the right to, or repair the disk")


def _is_as_left(path: Path, view: _View) -> bool:
    state = state_of(path)
    return (state.size, state.modified_ns) == (view.size, view.modified_ns)


def _files_without_row(store: Store, views: Iterable[_View]) -> set[Path]:
    if not store.files.views.is_dir():
        return set()
    noted = {store.files.views / view.file for view in views}
    tags = [tag for tag in store.files.views.iterdir() if tag.is_dir() and not tag.name.startswith(".")]
    files = (path for tag in tags for path in tag.iterdir() if path.is_file() and not path.name.startswith("."))
    return {path for path in files if path not in noted}


def rebuild_views(store: Store, *, overwrite: bool = False, progress: Progress = NO_PROGRESS) -> Restored:
    """Show every current label below ``labels/`` again where its file is missing or damaged.

    A file that somebody edited is left as it is unless ``overwrite``.

    Raises:
        StoreError: if a content is missing or damaged.
    """
    with store.read() as transaction:
        currents, views = _currents(transaction), _views(transaction)
    wrong = []
    for done, current in enumerate(currents, 1):
        if _view_finding(store, current, views.get((current.scan_id, current.tag))) is not None:
            wrong.append(current)
        progress.step(done, len(currents), "label files", unit="files")
    edited: list[Path] = []
    with store.write() as transaction:
        latest, views = set(_currents(transaction)), _views(transaction)
        for tag, group in itertools.groupby((c for c in wrong if c in latest), key=lambda current: current.tag):
            with appearing(store.files.views / tag) as folder:
                for current in group:
                    view = views.get((current.scan_id, tag))
                    path = folder / f"{current.scan}{current.suffix}"
                    if overwrite or not _is_edited(path, current, view):
                        _restore(transaction, store, current, view, path)
                    else:
                        edited.append(store.files.views / tag / path.name)
        for key in views.keys() - {(current.scan_id, current.tag) for current in latest}:
            transaction.delete(transaction.get_one(LabelView, key))
    return Restored(len(wrong) - len(edited), tuple(edited))


def _is_edited(path: Path, current: _Current, view: _View | None) -> bool:
    if not path.is_file() or (view is not None and _is_as_left(path, view)):
        return False
    return sha256_of(path) != current.sha256


def _restore(transaction: Transaction, store: Store, current: _Current, view: _View | None, path: Path) -> None:
    kept = store.files.object_path(current.sha256, current.suffix)
    with atomic_write(path) as temporary:
        _copy_checked(kept, current.sha256, temporary)
        if view is not None and view.version == current.version:
            os.utime(temporary, ns=(view.modified_ns, view.modified_ns))  # the row stays true as it is
    state = state_of(path)
    name = store.files.view_name(current.scan, current.tag, current.suffix)
    transaction.merge(LabelView(
        scan_id=current.scan_id, tag=current.tag, label_version_id=current.version, file=name,
        size=state.size, modified_ns=state.modified_ns,
    ))  # fmt: skip
