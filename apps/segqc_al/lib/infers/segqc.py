"""Inference task `segqc`: the likely errors of a scan's mask, and its assessment."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from lib.infers.output import REQUEST_KEYS, write_result
from segqc.server.context import LIKELY_ERROR, LIKELY_ERROR_VALUE, AppContext
from segqc.volumes import read_labels, read_scan


class LikelyErrors(InferTask):
    """SegQC-Net on the scan's current mask or that with the wanted tag; on a new mask where the scan has none.

    The answer says which one: ``assessed`` is "label" or "segmentation" (a new mask); of a stored label,
    ``label_tag``, ``label_version`` and ``label_sha256`` are told.
    """

    params = frozenset((*REQUEST_KEYS, "label_tag"))

    def __init__(self, context: AppContext) -> None:
        super().__init__(
            type=InferType.SEGMENTATION,  # the only type that both 3D Slicer and OHIF list
            labels={LIKELY_ERROR: LIKELY_ERROR_VALUE},
            dimension=3,
            description="Shows where a scan's mask is likely to be wrong, and estimates how good it is",
        )
        self.context = context

    def info(self) -> dict[str, Any]:
        """What clients are told."""
        return {**super().info(), "trained": self.context.has("segqc")}

    def is_valid(self) -> bool:
        """Always listed; without a model the call itself says what to do."""
        return True

    def get_path(self, validate: bool = True) -> str | None:
        """The model file, or None where there is none."""
        path = self.context.model_file("segqc")
        return str(path) if path is not None else None

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Assess the label map at ``request["label"]``, or a new one, of the scan at ``request["image"]``."""
        bundle = self.context.bundle("segqc")
        assessor = bundle.assessor()
        limits = self.context.settings.intake
        scan = read_scan(Path(request["image"]), limits=limits)
        made_by: str | None = None
        if request.get("label"):
            labels = read_labels(Path(request["label"]), scan=scan, values=assessor.values, limits=limits)
            assessed = "label"
        else:
            segmenter = bundle.segmenter()
            labels, made_by, assessed = segmenter.predict(scan).labels, segmenter.version, "segmentation"
        name = str(request.get("image_id") or "scan")
        result = assessor.assess(scan, labels, scan_id=name, segmenter_version=made_by)
        interval = result.assessment.dice_interval
        return write_result(assessor.likely_errors(result, scan), request), {
            "label_names": {LIKELY_ERROR: LIKELY_ERROR_VALUE},
            "model_version": assessor.version,
            "bundle": bundle.number,
            "assessed": assessed,
            "label_tag": None,
            "label_version": None,
            "label_sha256": None,
            "estimated_dice": result.assessment.dice,
            "estimated_dice_interval": dataclasses.asdict(interval) if interval is not None else None,
            "worst_slices": list(result.assessment.worst_slices()),
            "assessment": json.loads(result.assessment.to_json()),
        }
