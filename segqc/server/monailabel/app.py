"""MONAI Label's app on a dataset folder: what it answers; `apps/segqc_al` names its tasks and strategies."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore

import segqc
from segqc.loop.due import rounds_info
from segqc.loop.requests import KINDS, TrainRequest, mask_tag_problem, request_of
from segqc.quality.drift import to_json as alarm_to_json
from segqc.quality.report_card import to_json
from segqc.server.client_labels import from_client
from segqc.server.context import AppContext
from segqc.server.errors import RequestError
from segqc.server.job_answers import summary
from segqc.server.monailabel.datastore import StoreDatastore
from segqc.server.names import known
from segqc.server.uploads import Uploads
from segqc.settings import RoundSettings, SettingsError, load_settings
from segqc.store import jobs, labels
from segqc.store.database import StoreUnavailable
from segqc.store.labels import LIKELY_ERRORS_TAG, NewLabel
from segqc.store.records import Actor, JsonObject, LabelRecord
from segqc.types import label_names
from segqc.volumes import read_labels, temporary_labels

_MAX_FINDINGS = 100


class DatasetApp(MONAILabelApp):
    """An app that serves a dataset folder; a subclass says by which inference tasks, trainings and strategies."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.context = AppContext(Path(studies))
        self.uploads = Uploads()
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="SegQC",
            description="Segments scans, estimates how good each mask is, and asks for the right correction next",
            version=segqc.__version__,
        )
        # MONAI Label would queue all methods at each request for a sample; here a training queues what follows it
        self._auto_update_scoring = False
        self._last_info: dict[str, Any] = {
            **{"name": self.name, "description": self.description, "version": self.version, "labels": []},
            **{part: {} for part in ("models", "trainers", "strategies", "scoring", "train_stats", "datastore")},
        }

    def init_datastore(self) -> Datastore:
        """The dataset folder's store; other kinds of datastore are not served."""
        if self.studies.startswith(("http://", "https://")):
            raise ValueError(f"{self.studies}: is an address; this app serves a folder of scans.")
        return StoreDatastore(self.context.dataset)

    def info(self) -> dict[str, Any]:
        """What clients see; ``labels`` is a list, as MONAI Label's OHIF panel wants it.

        ``findings`` are the files of the folder that were not accepted, ``remarks`` what is to know of those that were;
        of many, the first ones. ``report_card`` says what the estimates are worth, ``drift_alarm`` that audit draws
        speak against them; ``rounds`` says when rounds begin by themselves, by the settings of now, and whether more
        are worth it; ``jobs`` are those that run or wait. While the database is away, clients get the last answer
        again, and ``problem`` says so; it also says where the settings can't be read any more.
        """
        try:
            self._last_info = self._info()
        except StoreUnavailable as error:
            return {**self._last_info, "problem": f"{error.clause}; this answer may be out of date"}
        return self._last_info

    def _info(self) -> dict[str, Any]:
        aside = [{"file": f.file, "message": f.sentence} for f in self.datastore().findings()[:_MAX_FINDINGS]]
        body = super().info()
        running, stats = self._running(), body["train_stats"]
        # 3D Slicer and OHIF show the first one only
        body["train_stats"] = {name: stats[name] for name in sorted(stats, key=lambda name: name != running)}
        remarks = self.datastore().remarks()[:_MAX_FINDINGS]
        card, alarm = self.context.dataset.report_card(), self.context.dataset.drift_alarm()
        settings, problem = self._round_settings()
        with self.context.dataset.store.read() as transaction:
            rounds = rounds_info(transaction, settings)
            going = [job for kind in KINDS for job in jobs.open_jobs(transaction, kind)]
        return {
            **body,
            "labels": list(self.context.labels()),
            "findings": aside,
            "remarks": remarks,
            "report_card": None if card is None else to_json(card),
            "drift_alarm": None if alarm is None else alarm_to_json(alarm),
            "rounds": dataclasses.asdict(rounds),
            "jobs": [summary(job) for job in going],
            **({} if problem is None else {"problem": problem}),
        }

    def _round_settings(self) -> tuple[RoundSettings, str | None]:
        """When rounds begin by themselves, as a worker reads it; and what is wrong with the settings now."""
        try:
            return load_settings(self.context.dataset.folder).round, None
        except SettingsError as error:
            return self.context.settings.round, f"{error.clause}; these are the settings of the server's start"

    def _running(self) -> str | None:
        """The network that is trained now, or first of those that wait; None where there is none."""
        with self.context.dataset.store.read() as transaction:
            waiting = jobs.open_jobs(transaction, "train")
        first = min(waiting, key=lambda job: job.state != "running", default=None)
        request = request_of(first) if first is not None else None
        return request.model if isinstance(request, TrainRequest) else None

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Run an inference task on a scan of the datastore, or on a file that the server itself has put down.

        Args:
            request: ``model``; ``image``, a scan's id, or ``image_file``, a path; ``label`` (a path), ``label_tag``,
                ``save_label`` and the task's own parameters.
            datastore: where scans are; the app's own by default.
        """
        store = datastore if datastore is not None else self.datastore()
        name = known("model", request.get("model", ""), self._infers)
        task = self._infers[name]
        task_request = copy.deepcopy(request)
        assessed: LabelRecord | None = None
        if "image_file" in request:
            task_request["image"] = request["image_file"]
        else:
            image = known("image", request.get("image", ""), store.list_images())
            content = self.context.dataset.verify_scan(image).sha256
            task_request.update(image=store.get_image_uri(image), image_id=image)
            if name == "segqc" and not request.get("label"):
                assessed = self._mask_to_assess(image, request.get("label_tag"))
        task_request["label_record"] = assessed  # whatever the client says
        path, params = task(task_request)
        if assessed is not None:
            params.update(label_tag=assessed.tag, label_version=assessed.id, label_sha256=assessed.sha256)
        saved: str | None = None
        if request.get("save_label") and "image_file" not in request:
            tag = LIKELY_ERRORS_TAG if name == "segqc" else request.get("label_tag") or "original"
            if name == "segmentation" and (problem := mask_tag_problem(tag)) is not None:
                raise RequestError(400, problem)
            saved = self._save(image, Path(path), tag, name, params, assessed, content)
        return {"label": saved or path, "tag": "original", "file": path, "params": params}

    def _mask_to_assess(self, image: str, tag: str | None) -> LabelRecord | None:
        """The mask with the wanted tag; else the scan's current one: final, or what an annotator would start from.

        Raises:
            RequestError: 404 if there is no label with the wanted tag.
        """
        with self.context.dataset.store.read() as transaction:
            found = labels.tags(transaction, image)
        if tag is None:
            return next((found[own] for own in (labels.FINAL, labels.RETURNED, labels.ORIGINAL) if own in found), None)
        if tag not in found:
            raise RequestError(
                404, f"the scan {image!r} has no label with the tag {tag!r}; it has: {', '.join(found) or 'none'}."
            )
        return found[tag]

    def _save(
        self,
        image: str,
        path: Path,
        tag: str,
        name: str,
        params: dict[str, Any],
        parent: LabelRecord | None,
        content: str | None,
    ) -> str:
        """Keep a network's label map of a scan's content; it is the network's, not that of whoever asked for it."""
        version = params["model_version"]
        source = Actor(kind="network", name=version, identified_by="program")
        info: JsonObject = {"model": name, "params": params}
        above = parent.id if parent is not None else None
        label = NewLabel(
            image, tag, "network", source, parent=above, bundle=params["bundle"], info=info, scan_sha256=content
        )
        kept = read_labels(path)
        if name == "segmentation":
            kept = from_client(kept, label_names(self.context.segmenter().structures))
        with temporary_labels(kept) as stored:
            self.context.dataset.store.save_label(label, stored)
        return image
