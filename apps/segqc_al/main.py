"""The MONAI Label app: wires a studies folder, its networks and the strategies."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.infers.segmentation import Segmentation
from lib.infers.segqc import LikelyErrors
from lib.trainers.segmentation import SegmentationTraining
from lib.trainers.segqc import SegqcTraining
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask

import segqc
from segqc.server.checks import known
from segqc.server.datastore import FolderDatastore
from segqc.server.errors import RequestError
from segqc.server.models import Desk
from segqc.volumes import VolumeError
from strategies import ForegroundRandom, PoolScoring, Sequential, UniformRandom, WorstEstimateFirst

logger = logging.getLogger(__name__)

LIKELY_ERRORS_TAG = "likely-errors"


class SegqcApp(MONAILabelApp):
    """Segmentation, its quality estimate, and the next scan to correct."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.desk = Desk(Path(studies))
        self.seed = int(conf.get("seed", 0)) if conf else 0
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

    def init_datastore(self) -> Datastore:
        """The studies folder; other kinds of datastore are not served."""
        if self.studies.startswith(("http://", "https://")):
            raise ValueError(f"{self.studies}: is an address; this app serves a folder of scans.")
        return FolderDatastore(
            Path(self.studies),
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def init_infers(self) -> dict[str, InferTask]:
        """The mask first: clients run the first model that shares a label."""
        return {"segmentation": Segmentation(self.desk), "segqc": LikelyErrors(self.desk)}

    def init_trainers(self) -> dict[str, TrainTask]:
        """Both networks."""
        return {"segmentation": SegmentationTraining(self.desk), "segqc": SegqcTraining(self.desk)}

    def init_strategies(self) -> dict[str, Strategy]:
        """The default first. MONAI Label's OHIF panel always asks for "random": that name is the default, too."""
        studies, seed = self.desk.studies, self.seed
        makers: dict[str, Callable[[str], Strategy]] = {
            "segqc": lambda name: WorstEstimateFirst(name, studies, seed=seed),
            "tta": lambda name: WorstEstimateFirst(name, studies, method="tta", seed=seed),
            "foreground-random": lambda name: ForegroundRandom(name, studies, seed=seed),
            "sequential": lambda name: Sequential(name, studies),
            "uniform-random": lambda name: UniformRandom(name, studies, seed=seed),
        }
        default = known("strategy", self.desk.settings.server.strategy, makers)
        ordered = {default: makers[default], **makers}
        made = {name: make(name) for name, make in ordered.items()}
        return {**made, "random": made[default]}

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """SegQC's and the baselines'."""
        return {method: PoolScoring(method, self.desk.studies) for method in ("segqc", "tta", "entropy")}

    def info(self) -> dict[str, Any]:
        """What clients are told; ``labels`` is a list, as MONAI Label's OHIF panel wants it."""
        return {**super().info(), "labels": list(self.desk.labels())}

    def batch_infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Run inference on many scans; one that cannot be read does not keep the others waiting."""

        def infer_if_readable(one: dict[str, Any], store: Datastore) -> dict[str, Any]:
            try:
                return self.infer(one, store)
            except VolumeError as error:
                logger.warning("%s is left out: %s", one["image"], error)
                return {"error": str(error)}

        return self._batch_infer(request, datastore if datastore is not None else self.datastore(), infer_if_readable)

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
        if "image_file" in request:
            task_request["image"] = request["image_file"]
        else:
            image = known("image", request.get("image", ""), store.list_images())
            task_request.update(image=store.get_image_uri(image), image_id=image)
            if name == "segqc" and not request.get("label"):
                task_request["label_tag"] = request.get("label_tag") or "original"
                task_request["label"] = store.get_label_uri(image, task_request["label_tag"])
        path, params = task(task_request)
        saved: str | None = None
        if request.get("save_label") and "image_file" not in request:
            tag = LIKELY_ERRORS_TAG if name == "segqc" else request.get("label_tag") or "original"
            if tag == "final":
                raise RequestError(400, "a network's mask is never final: final labels are what annotators submit.")
            saved = store.save_label(image, path, tag, {"model": name, "params": params})
        return {"label": saved or path, "tag": "original", "file": path, "params": params}
