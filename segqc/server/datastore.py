"""MONAI Label's local datastore, made safe for threads, for several processes and for sudden ends.

The stock class rewrites its one JSON file in place, from its own memory: a kill in between leaves half a file, and a
scoring process overwrites what the server saved meanwhile. Here every change is a transaction: lock, read what others
wrote, change, write beside, rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore, LocalDatastoreModel
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException

from segqc.server.checks import check_image_id, check_tag
from segqc.volumes import FILE_SUFFIXES, atomic_write

_CLOCK_TICK_NS = 50_000_000

F = TypeVar("F", bound=Callable[..., Any])
Info = dict[str, Any]  # MONAI Label's own form: whatever JSON a client sent


class IndexFileError(ValueError):
    """The datastore's own file is damaged."""


def _locked(method: F) -> F:
    """Run a method of the stock class on the folder as it is, while no other thread changes what it reads."""

    @wraps(method)
    def run(self: FolderDatastore, *args: Any, **kwargs: Any) -> Any:
        with self._thread_lock:
            self._look()
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


class FolderDatastore(LocalDatastore):
    """A folder of scans, its labels below ``labels/<tag>/``, and ``datastore_v2.json`` about both."""

    def __init__(self, folder: Path, *, auto_reload: bool = True, read_only: bool = False) -> None:
        self._thread_lock = threading.RLock()
        self._process_lock = FileLock(folder / ".lock", thread_local=False)
        self._depth = 0
        self._signature: tuple[int, int, int] | None = None
        self._content: LocalDatastoreModel | None = None
        self._auto = auto_reload
        self._seen: tuple[int, ...] | None = None
        # the stock watcher follows every file below the folder, and each training writes many there: see `_look`
        extensions = [f"*{suffix}" for suffix in FILE_SUFFIXES]
        super().__init__(str(folder), extensions=extensions, auto_reload=False, read_only=read_only)

    # The stock class reads and sets `_datastore` everywhere: as a property it is always what the file says.
    @property
    def _datastore(self) -> LocalDatastoreModel:
        with self._thread_lock:
            if self._depth == 0:
                self._reload()
            if self._content is None:
                raise RuntimeError("the datastore is not initialised")
            return self._content

    @_datastore.setter
    def _datastore(self, content: LocalDatastoreModel) -> None:
        self._content = content

    def _reload(self) -> None:
        """Read the file if it is another one than last time; a rename gives it a new inode."""
        try:
            status = os.stat(self._datastore_config_path)
        except FileNotFoundError:
            return
        signature = (status.st_ino, status.st_mtime_ns, status.st_size)
        if signature == self._signature:
            return
        try:
            content = LocalDatastoreModel.model_validate_json(Path(self._datastore_config_path).read_bytes())
        except ValueError as error:
            raise IndexFileError(
                f"{self._datastore_config_path}: not a readable list of scans; move it away, and the next start "
                "rebuilds it from the files in the folder"
            ) from error
        content.base_path = self._datastore_path
        self._content, self._signature = content, signature

    def _look(self) -> None:
        """Take in scans and labels that were put into the folder, or taken out, by others."""
        if not self._auto or self._depth > 0:
            return
        labels = Path(self._datastore.label_path(None))
        folders = (Path(self._datastore_path), labels, labels / "final", labels / "original")
        try:
            changed = tuple(folder.stat().st_mtime_ns for folder in folders)
        except FileNotFoundError:
            changed = ()
        if changed and changed == self._seen:
            return
        # a folder changed just now may change again within the clock's tick, unseen: look once more next time
        settled = bool(changed) and time.time_ns() - max(changed) > _CLOCK_TICK_NS
        self._seen = changed if settled else None
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        self._reconcile_datastore()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Hold threads and processes off; nested calls join the outer one."""
        with self._thread_lock:
            if self._depth == 0:
                self._process_lock.acquire()
                self._reload()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._process_lock.release()

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        with self._transaction():
            pass

    def _update_datastore_file(self, lock: bool = True) -> None:
        with self._transaction():
            text = json.dumps(self._datastore.model_dump(exclude={"base_path"}), indent=2, default=str)
            with atomic_write(self._datastore_config_path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            status = os.stat(self._datastore_config_path)
            self._signature = (status.st_ino, status.st_mtime_ns, status.st_size)

    def _reconcile_datastore(self) -> None:
        with self._transaction():
            super()._reconcile_datastore()

    def _to_id(self, file: str) -> tuple[str, str]:
        for suffix in FILE_SUFFIXES:  # the longest first: .nii.gz before .nii
            if file.endswith(suffix):
                return file.removesuffix(suffix), suffix
        path = Path(file)
        return path.stem, path.suffix

    def add_image(self, image_id: str, image_filename: str, image_info: Info | None) -> str:
        """Store a scan under an id; see the stock class.

        Raises:
            RequestError: 400 if the id is no plain name.
        """
        own_id, suffix = self._to_id(os.path.basename(image_filename))
        image_id = check_image_id(image_id or own_id)
        with self._transaction():
            target = Path(self._datastore.image_path()) / f"{image_id}{suffix}"
            _copy(Path(image_filename), target)
            info = {**(image_info or {}), "ts": int(time.time()), "name": target.name}
            self._datastore.objects[image_id] = ImageLabelModel(image=DataModel(info=info, ext=suffix))
            self._update_datastore_file()
        return image_id

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: Info | None) -> str:
        """Store a scan's label map under a tag; see the stock class.

        Raises:
            ImageNotFoundException: if there is no such scan.
            RequestError: 400 if the tag is no plain name.
        """
        tag = check_tag(label_tag.value if isinstance(label_tag, DefaultLabelTag) else label_tag)
        _, suffix = self._to_id(os.path.basename(label_filename))
        with self._transaction():
            entry = self._datastore.objects.get(image_id)
            if entry is None:
                raise ImageNotFoundException(f"Image {image_id} not found")
            folder = Path(self._datastore.label_path(tag))
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / f"{image_id}{suffix}"
            _copy(Path(label_filename), target)
            for other in FILE_SUFFIXES:  # one label map a tag: an older one in another format would be the wrong one
                if other != suffix:
                    (folder / f"{image_id}{other}").unlink(missing_ok=True)
            info = {**(label_info or {}), "ts": int(time.time()), "name": target.name}
            entry.labels[tag] = DataModel(info=info, ext=suffix)
            self._update_datastore_file()
        return image_id

    def update_image_info(self, image_id: str, info: Info) -> None:
        """Add to what is known of a scan.

        Raises:
            ImageNotFoundException: if there is no such scan.
        """
        with self._transaction():
            entry = self._datastore.objects.get(image_id)
            if entry is None:
                raise ImageNotFoundException(f"Image {image_id} not found")
            entry.image.info.update(info)
            self._update_datastore_file()

    def update_label_info(self, label_id: str, label_tag: str, info: Info) -> None:
        """Add to what is known of a label map.

        Raises:
            LabelNotFoundException: if there is no such label map.
        """
        with self._transaction():
            label = self._datastore.label(label_id, label_tag)
            if label is None:
                raise LabelNotFoundException(f"Label {label_id} with tag {label_tag} not found")
            label.info.update(info)
            self._update_datastore_file()

    def remove_image(self, image_id: str) -> None:
        """Remove a scan and its label maps.

        Raises:
            ImageNotFoundException: if there is no such scan.
        """
        with self._transaction():
            super().remove_image(image_id)

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Remove a label map.

        Raises:
            LabelNotFoundException: if there is no such label map.
        """
        with self._transaction():
            if self._datastore.label(label_id, label_tag) is None:
                raise LabelNotFoundException(f"Label {label_id} with tag {label_tag} not found")
            super().remove_label(label_id, label_tag)

    datalist = _locked(LocalDatastore.datalist)
    get_image_uri = _locked(LocalDatastore.get_image_uri)
    get_image_info = _locked(LocalDatastore.get_image_info)
    get_label_uri = _locked(LocalDatastore.get_label_uri)
    get_label_info = _locked(LocalDatastore.get_label_info)
    get_labels_by_image_id = _locked(LocalDatastore.get_labels_by_image_id)
    get_labeled_images = _locked(LocalDatastore.get_labeled_images)
    get_unlabeled_images = _locked(LocalDatastore.get_unlabeled_images)
    list_images = _locked(LocalDatastore.list_images)
    status = _locked(LocalDatastore.status)
    json = _locked(LocalDatastore.json)

    def has_image(self, image_id: str) -> bool:
        """Whether there is such a scan."""
        with self._thread_lock:
            self._look()
            return image_id in self._datastore.objects


def _copy(source: Path, target: Path) -> None:
    """Copy a file so that its name never stands for half of it."""
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)
