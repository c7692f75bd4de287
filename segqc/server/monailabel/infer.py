"""MONAI Label's inference tasks: the mask of a scan, and the likely errors of a mask with its assessment."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nrrd
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from segqc.loop.scoring import BY_A_NETWORK, MaskOrigin, assess, origin_of
from segqc.networks.segmenter import Prediction
from segqc.server.client_labels import client_names, to_client
from segqc.server.context import LIKELY_ERROR, LIKELY_ERROR_VALUE, AppContext
from segqc.server.monailabel.strategy import unlike_training
from segqc.settings import NetworkName
from segqc.store.records import LabelRecord
from segqc.types import bounds, label_names
from segqc.volumes import Volume, read_labels, read_scan, write_labels


class NetworkTask(InferTask):
    """Inference by one of the folder's networks; listed before it is trained: clients see what there will be."""

    def __init__(self, context: AppContext, network: NetworkName, labels: Mapping[str, int], description: str) -> None:
        super().__init__(
            type=InferType.SEGMENTATION,  # the only type that both 3D Slicer and OHIF list
            labels=dict(labels),
            dimension=3,
            description=description,
        )
        self.context = context
        self.network = network

    def info(self) -> dict[str, Any]:
        """What clients see."""
        return {**super().info(), "trained": self.context.has(self.network)}

    def is_valid(self) -> bool:
        """Always listed; without a model the call itself says what to do."""
        return True

    def get_path(self, validate: bool = True) -> str | None:
        """The model file, or None where there is none."""
        path = self.context.model_file(self.network)
        return str(path) if path is not None else None


class Segmentation(NetworkTask):
    """The mask of a scan, by the current segmentation network."""

    def __init__(self, context: AppContext) -> None:
        names = client_names(context.labels())
        super().__init__(context, "segmentation", names, "Segments a scan with the current segmentation network")

    def info(self) -> dict[str, Any]:
        """What clients see; the labels are those of now."""
        self.labels = client_names(self.context.labels())
        return super().info()

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Segment the scan at ``request["image"]``."""
        bundle = self.context.bundle("segmentation")
        segmenter = bundle.segmenter()
        labels = segmenter.predict(read_scan(Path(request["image"]), limits=self.context.settings.intake)).labels
        names = label_names(segmenter.structures)
        return write_result(to_client(labels, names), request), {
            "label_names": client_names(names),
            "model_version": segmenter.version,
            "bundle": bundle.number,
        }


class LikelyErrors(NetworkTask):
    """SegQC-Net on the scan's current mask or that with the wanted tag; on a new mask where the scan has none.

    The answer says which one: ``assessed`` is "label" or "segmentation" (a new mask); of a stored label,
    ``label_tag``, ``label_version`` and ``label_sha256`` are named.
    """

    def __init__(self, context: AppContext) -> None:
        description = "Shows where a scan's mask is likely to be wrong, and estimates how good it is"
        super().__init__(context, "segqc", {LIKELY_ERROR: LIKELY_ERROR_VALUE}, description)

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Assess a label map of the scan at ``request["image"]``.

        It is the label version ``request["label_record"]``; without one that at ``request["label"]``, which a network
        made, for all that is known; without either a new one.
        """
        bundle = self.context.bundle("segqc")
        assessor = bundle.assessor()
        limits = self.context.settings.intake
        scan = read_scan(Path(request["image"]), limits=limits)
        version: LabelRecord | None = request.get("label_record")
        origin = BY_A_NETWORK if version is None else origin_of(self.context.dataset, version, scan)
        prediction: Prediction | None = None
        if version is not None:
            labels = self.context.dataset.store.read_label(version, scan=scan, values=assessor.values)
            assessed = "label"
        elif request.get("label"):
            labels = read_labels(Path(request["label"]), scan=scan, values=assessor.values, limits=limits)
            assessed = "label"
        else:
            prediction = bundle.segmenter().predict(scan)
            labels, assessed = prediction.labels, "segmentation"
            origin = MaskOrigin("network", bundle.segmenter().version)
        name = str(request.get("image_id") or "scan")
        result = assess(bundle, scan, labels, prediction, scan_id=name, origin=origin)
        return write_result(assessor.likely_errors(result, scan), request), {
            "label_names": {LIKELY_ERROR: LIKELY_ERROR_VALUE},
            "model_version": assessor.version,
            "bundle": bundle.number,
            "assessed": assessed,
            "label_tag": None,
            "label_version": None,
            "label_sha256": None,
            "estimated_dice": result.assessment.dice,
            "estimated_dice_interval": bounds(result.assessment.dice_interval),
            "unlike_training": unlike_training(result.assessment),
            "worst_slices": list(result.assessment.worst_slices()),
            "assessment": json.loads(result.assessment.to_json()),
        }


def write_result(labels: Volume, request: Mapping[str, Any]) -> str:
    """Write a label map in the format that the client asked for; the server removes the file when it is sent."""
    suffix = request.get("result_extension") or ".nii.gz"
    handle, name = tempfile.mkstemp(prefix="segqc-", suffix=suffix)
    os.close(handle)
    write_labels(labels, Path(name))
    if suffix == ".nrrd" and request.get("result_compress") is False:
        # OHIF's reader takes raw voxels only
        voxels, header = nrrd.read(name)
        header["encoding"] = "raw"
        nrrd.write(name, voxels, header)
    return name
