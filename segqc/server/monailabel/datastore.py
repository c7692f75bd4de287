"""MONAI Label's datastore interface, over the project's store."""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException

from segqc.loop.dataset import Dataset
from segqc.loop.review import review
from segqc.server.actors import current_actor
from segqc.server.client_labels import client_names, same_values, to_client
from segqc.server.errors import RequestError
from segqc.server.names import check_image_id, check_tag, usable_image_id
from segqc.store import labels, scans
from segqc.store.labels import FINAL, IGNORED, LIKELY_ERRORS_TAG, ORIGINAL, NewLabel
from segqc.store.records import Actor, FindingRecord, LabelRecord, ScanRecord, ScanState
from segqc.store.scans import UnknownScan
from segqc.store.schema import OPEN_STATES
from segqc.store.sync import ScanExists
from segqc.text import nfc
from segqc.types import label_names
from segqc.volumes import VolumeError, read_scan, scan_id, scan_suffix, temporary_labels

Info: TypeAlias = dict[str, Any]  # MONAI Label's own form: whatever JSON a client sent

REVIEW_FIELDS: Final = ("status", "level", "approvedBy", "comment", "editTime")
SHOWN_STATES: Final[tuple[ScanState, ...]] = ("unlabelled", "rejected", "submitted", "approved")


def scan_info(scan: ScanRecord) -> Info:
    """What is noted of a scan."""
    noted = {"ts": int(scan.added_at.timestamp()), "name": Path(scan.file).name}
    # as MONAI Label's clients compute it, to tell whether the copy that they have is of this content
    checksum = {"checksum": f"SHA256:{scan.sha256}"} if scan.sha256 else {}
    return {
        **noted,
        **scan.info,
        **checksum,
        "state": scan.state,
        **({"reason": scan.reason} if scan.reason else {}),
    }


def decision_in(info: Info) -> tuple[Literal["approved", "flagged"] | None, str]:
    """What MONAI Label's Reviewer decided in what is noted of a label, and its comment."""
    meta = info.get("segmentationMeta")
    status = meta.get("status") if isinstance(meta, dict) else None
    if not isinstance(meta, dict) or (status != "approved" and status != "flagged"):
        return None, ""
    return status, str(meta.get("comment") or "").strip()


class StoreDatastore(Datastore):
    """A dataset folder as MONAI Label sees it: scans by id, and a current label under each tag.

    What people put into the folder is seen after `refresh`, which the server calls every few seconds. A removed scan
    is excluded, its file stays; a removed label stays in the history.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._store = dataset.store
        self._findings: list[FindingRecord] = []
        self._remarks: list[str] = []
        self._name = dataset.folder.name
        self._description = "Scans of a dataset folder"

    def name(self) -> str:
        """The folder's name."""
        return self._name

    def set_name(self, name: str) -> None:
        """Call it otherwise, for as long as the server runs."""
        self._name = name

    def description(self) -> str:
        """What it is."""
        return self._description

    def set_description(self, description: str) -> None:
        """Describe it otherwise, for as long as the server runs."""
        self._description = description

    # ---------------------------------------------------------------------------------------------------------- lists

    def list_images(self) -> list[str]:
        """Ids of all scans that are not excluded."""
        with self._store.read() as transaction:
            return sorted(scans.names(transaction, states=SHOWN_STATES))

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Ids of the scans with a label under a tag, by default with one that a person submitted."""
        return sorted(self._labelled(label_tag))

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Ids of the scans without one."""
        if label_tag in (None, "", FINAL):
            with self._store.read() as transaction:
                return sorted(scans.names(transaction, states=OPEN_STATES))
        labelled = self._labelled(label_tag)
        return [name for name in self.list_images() if name not in labelled]

    def _labelled(self, label_tag: str | None) -> dict[str, LabelRecord]:
        with self._store.read() as transaction:
            shown = set(scans.names(transaction, states=SHOWN_STATES))
            current = labels.current_of_all(transaction, _tag(label_tag))
        return {name: label for name, label in current.items() if name in shown}

    def datalist(self) -> list[dict[str, Any]]:
        """Paths of the labelled scans and of their final labels."""
        store = self._store
        return [
            # what was read from a file of another form is handed out as everybody reads it
            {
                "image": str(image),
                "label": str((store.label_file if final.submitted_sha256 else store.view_file)(final)),
            }
            for image, final in self._final_labels()
        ]

    def _final_labels(self) -> Iterator[tuple[Path, LabelRecord]]:
        """Files and final labels of the labelled scans, in the order of their names; each file holds its scan now."""
        with self._store.read() as transaction:
            found = {s.name: s for s in scans.listing(transaction, states=("submitted", "approved"))}
        for name, label in sorted(self._labelled(None).items()):
            if name not in found:
                continue
            try:
                scan = self._dataset.verify(found[name])
            except UnknownScan:
                continue  # its file is gone since the last look
            if scan.id == found[name].id:
                yield self._dataset.scan_file(scan), label

    def has_image(self, image_id: str) -> bool:
        """Whether there is such a scan, and it is not excluded."""
        try:
            self.scan(image_id)
        except ImageNotFoundException:
            return False
        return True

    # ---------------------------------------------------------------------------------------------------------- scans

    def scan(self, image_id: str) -> ScanRecord:
        """The scan that a client calls so.

        Raises:
            ImageNotFoundException: if there is none, or it is excluded.
        """
        # a client may go on calling a scan as it did when it uploaded it
        for name in dict.fromkeys([image_id, usable_image_id(image_id)]):
            try:
                with self._store.read() as transaction:
                    scan = scans.get(transaction, name)
                if scan.missing_since is not None and (self._dataset.folder / scan.file).is_file():
                    scan = self._dataset.verify(scan)  # it came back since the last look
            except UnknownScan:
                continue
            if scan.state != "excluded" and scan.missing_since is None:
                return scan
            break
        raise ImageNotFoundException(f"there is no image {image_id!r}.")

    def get_image_uri(self, image_id: str) -> str:
        """The path of a scan's file."""
        return str(self._dataset.scan_file(self.scan(image_id)))

    def get_image(self, image_id: str, params: object = None) -> io.BytesIO:
        """A scan's file."""
        return io.BytesIO(Path(self.get_image_uri(image_id)).read_bytes())

    def get_image_info(self, image_id: str) -> Info:
        """What is noted of a scan."""
        return scan_info(self.scan(image_id))

    def update_image_info(self, image_id: str, info: Info) -> None:
        """Add to what is noted of a scan."""
        with self._store.write() as transaction:
            try:
                scans.update_info(transaction, image_id, info)
            except UnknownScan as error:
                raise ImageNotFoundException(f"there is no image {image_id!r}.") from error

    def add_image(self, image_id: str, image_filename: str, image_info: Info | None) -> str:
        """Put a scan into the folder under an id; a file that is there is never replaced.

        Raises:
            RequestError: 400 if the id is no plain name, 409 if it is another scan's.
            VolumeError: if the file is no scan that can be used.
        """
        scan_file = Path(image_filename)
        name = check_image_id(image_id or scan_id(scan_file))
        try:
            added = self._dataset.add_scan(scan_file, name)
        except ScanExists as error:
            if self._is_same_scan(error.name, name, scan_file):
                return error.name
            raise RequestError(409, str(error), image=error.name) from error
        if image_info:
            self.update_image_info(added.name, image_info)
        return added.name

    def _is_same_scan(self, there: str, name: str, scan_file: Path) -> bool:
        """Whether a scan that is there has the voxels and the grid of an uploaded one, in whatever format."""
        if nfc(there) != nfc(name):
            return False
        try:
            kept = self._dataset.verify_scan(there)
            if kept.state == "excluded":
                return False
            limits = self._dataset.settings.intake
            one, other = (read_scan(path, limits=limits) for path in (self._dataset.scan_file(kept), scan_file))
        except (VolumeError, UnknownScan):
            return False
        same_grid = one.shape == other.shape and np.allclose(one.affine, other.affine, rtol=0, atol=1e-3)
        return bool(same_grid and np.array_equal(one.array, other.array))

    def remove_image(self, image_id: str) -> None:
        """Exclude a scan: it is not listed any more, its file and its history stay."""
        review(self._dataset, self.scan(image_id).name, "excluded", current_actor(), "removed through MONAI Label")

    # --------------------------------------------------------------------------------------------------------- labels

    def _label(self, label_id: str, label_tag: str) -> LabelRecord | None:
        with self._store.read() as transaction:
            return labels.current(transaction, label_id, _tag(label_tag))

    def _known_label(self, label_id: str, label_tag: str) -> LabelRecord:
        label = self._label(label_id, label_tag)
        if label is None:
            raise LabelNotFoundException(f"the image {label_id!r} has no label with the tag {_tag(label_tag)!r}.")
        return label

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]:
        """The current labels of a scan: their ids (the scan's own) by tag."""
        name = self.scan(image_id).name
        with self._store.read() as transaction:
            return {tag: name for tag in labels.tags(transaction, name)}

    def get_label_by_image_id(self, image_id: str, tag: str) -> str:
        """The id of a scan's label under a tag; empty where there is none."""
        name = self.scan(image_id).name
        return name if self._label(name, tag) is not None else ""

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """The path of a current label's kept content, which nobody edits; empty where there is none."""
        label = self._label(label_id, label_tag)
        return str(self._store.label_file(label)) if label is not None else ""

    def get_label(self, label_id: str, label_tag: str, params: object = None) -> io.BytesIO:
        """The file of a current label."""
        return io.BytesIO(self._store.kept_file(self._known_label(label_id, label_tag)).read_bytes())

    def get_label_info(self, label_id: str, label_tag: str) -> Info:
        """What is noted of a label, and which version it is."""
        label = self._label(label_id, label_tag)
        if label is None:
            return {}
        with self._store.read() as transaction:
            noted = labels.info(transaction, label.id)
        return self._label_info(label, noted)

    def _label_info(self, label: LabelRecord, noted: Info) -> Info:
        made = {
            "ts": int(label.made_at.timestamp()),
            "name": self._store.view_file(label).name,
            "client_id": label.actor.name,
        }
        body = {**made, **noted, "version": label.id, "source": label.source, "actor": label.actor.name}
        if label.tag not in (LIKELY_ERRORS_TAG, IGNORED) and self._dataset.settings.structures:
            # 3D Slicer names the values of a mask by these, in their order
            names = self._client_names
            params = body.get("params")
            body["params"] = {**(params if isinstance(params, dict) else {}), "label_names": names}
            body.setdefault("label_info", [{"name": name, "idx": value} for name, value in names.items()])
        meta = body.get("segmentationMeta")
        if isinstance(meta, dict):  # the Reviewer wants every field
            body["segmentationMeta"] = {**dict.fromkeys(REVIEW_FIELDS, ""), **meta}
        elif meta is not None:
            del body["segmentationMeta"]
        return body

    @functools.cached_property
    def _client_names(self) -> Mapping[str, int]:
        return client_names(label_names(self._dataset.settings.structure_list()))

    def review_label(self, image_id: str, label_tag: str, info: Info, actor: Actor) -> None:
        """Make the Reviewer's decision on a label (``segmentationMeta``) the scan's review; twice is once.

        An approved version becomes the final label first, where the settings say so.
        """
        decision, comment = decision_in(info)
        label = self._label(image_id, label_tag)
        if decision is None or label is None:
            return
        state = self.scan(image_id).state
        if decision == "flagged":
            if label_tag == FINAL and state in ("submitted", "approved"):
                review(self._dataset, image_id, "rejected", actor, comment or "flagged in the Reviewer")
            return
        final = self._label(image_id, FINAL)
        if label_tag.startswith("version_") and self._dataset.settings.annotation.approved_version_is_final:
            if final is None or final.sha256 != label.sha256:
                self._store.restore_label(label.id, actor, FINAL)
            state = self.scan(image_id).state
        elif label_tag != FINAL:
            return
        if state == "submitted":
            review(self._dataset, image_id, "approved", actor)

    def update_label_info(self, label_id: str, label_tag: str, info: Info) -> None:
        """Add to what is noted of a label."""
        label = self._known_label(label_id, label_tag)
        with self._store.write() as transaction:
            labels.update_info(transaction, label.id, info)

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: Info | None) -> str:
        """Keep a label map of a scan as the current one under a tag.

        Raises:
            RequestError: 400 if the tag is no plain name.
            VolumeError: if the file is no label map of the scan.
        """
        scan = self.scan(image_id)
        tag = check_tag(_tag(label_tag))
        actor = current_actor()
        source = "annotator" if actor.kind == "person" else "import"
        label = NewLabel(scan.name, tag, source, actor, info=label_info, scan_sha256=scan.sha256)  # type: ignore[arg-type]
        scan_file = Path(label_filename)
        content = self._store.intake.labels(scan_file, self._dataset.scan_file(scan), "the label map")
        with temporary_labels(content.labels) as read:
            kept = scan_file if content.is_plain and scan_suffix(scan_file.name) is not None else read
            self._store.save_label(label, kept)
        return scan.name

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Take a label away; it stays in the history."""
        self._known_label(label_id, label_tag)
        self._store.remove_label(label_id, _tag(label_tag), current_actor())

    # ---------------------------------------------------------------------------------------------------------- others

    def refresh(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Take in what has changed in the folder."""
        self._dataset.sync(stop=stop)
        self._findings, self._remarks = self._dataset.findings(), self._dataset.remarks()

    def findings(self) -> list[FindingRecord]:
        """What was not taken in, as of the last `refresh`; does not wait for the database."""
        return self._findings

    def remarks(self) -> list[str]:
        """What a user should know of scans that were taken in, as of the last `refresh`."""
        return self._remarks

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """Pack scans with final labels into a ZIP file; the caller removes it.

        Args:
            limit_cases: at most so many scans.
        """
        structures = self._dataset.settings.structure_list()
        names = label_names(structures) if structures else None
        handle, path = tempfile.mkstemp(prefix="segqc-", suffix=".zip")
        os.close(handle)
        try:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
                for image, final in itertools.islice(self._final_labels(), limit_cases):
                    archive.write(image, image.name)
                    if names is None or same_values(names):
                        archive.write(self._store.kept_file(final), f"labels/final/{final.scan}{final.suffix}")
                        continue
                    with temporary_labels(to_client(self._store.read_label(final), names)) as delivered:
                        archive.write(delivered, f"labels/final/{final.scan}.nii.gz")
        except BaseException:
            os.unlink(path)
            raise
        return path

    def status(self) -> dict[str, Any]:
        """Numbers of scans, as MONAI Label's clients show them."""
        with self._store.read() as transaction:
            counts, tags = scans.counts(transaction), labels.counts(transaction)
        shown = sum(counts.get(state, 0) for state in SHOWN_STATES)
        completed = counts.get("submitted", 0) + counts.get("approved", 0)
        return {"total": shown, "completed": completed, "label_tags": tags, "train": completed,
                "states": dict(counts), "ts": int(time.time())}  # fmt: skip

    def json(self) -> Mapping[str, Any]:
        """All scans and current labels in the form of MONAI Label's LocalDatastore."""
        with self._store.read() as transaction:
            records = [s for s in scans.listing(transaction, states=SHOWN_STATES) if s.missing_since is None]
            current = {tag: labels.current_of_all(transaction, tag) for tag in labels.all_tags(transaction)}
            noted = labels.infos(transaction)
        found = {
            s.name: {
                "image": {"info": scan_info(s), "ext": s.suffix},
                "labels": {
                    label.tag: {"info": self._label_info(label, noted.get(label.id, {})), "ext": label.suffix}
                    for label in _in_order(by_scan[s.name] for by_scan in current.values() if s.name in by_scan)
                },
            }
            for s in records
        }
        return json.loads(json.dumps({"name": self._name, "description": self._description, "objects": found}))  # type: ignore[no-any-return]


def _in_order(found: Iterable[LabelRecord]) -> list[LabelRecord]:
    """The network's mask, other labels by their time, the final one, and the Reviewer's versions by their number.

    The Reviewer counts on from the last tag, and begins with ``version_1`` after ``final``.
    """

    def place(label: LabelRecord) -> tuple[int, int]:
        number = re.fullmatch(r"version_(\d{1,9})", label.tag)
        if number is not None:
            return 3, int(number.group(1))
        return {ORIGINAL: 0, FINAL: 2}.get(label.tag, 1), label.id

    return sorted(found, key=place)


def _tag(tag: str | DefaultLabelTag | None) -> str:
    """A tag's name; MONAI Label also hands members of its enumeration around."""
    if isinstance(tag, DefaultLabelTag):
        return str(tag.value)
    return tag or FINAL
