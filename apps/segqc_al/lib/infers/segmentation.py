"""Inference task `segmentation`: the mask of a scan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from lib.infers.output import REQUEST_KEYS, write_result
from segqc.server.client_labels import client_names, to_client
from segqc.server.context import AppContext
from segqc.types import label_names
from segqc.volumes import read_scan


class Segmentation(InferTask):
    """The current segmentation network; listed before one is trained, so that clients see what will be there."""

    params = frozenset(REQUEST_KEYS)

    def __init__(self, context: AppContext) -> None:
        super().__init__(
            type=InferType.SEGMENTATION,
            labels=client_names(context.labels()),
            dimension=3,
            description="Segments a scan with the current segmentation network",
        )
        self.context = context

    def info(self) -> dict[str, Any]:
        """What clients are told; the labels are those of now."""
        self.labels = client_names(self.context.labels())
        return {**super().info(), "trained": self.context.has("segmentation")}

    def is_valid(self) -> bool:
        """Always listed; without a model the call itself says what to do."""
        return True

    def get_path(self, validate: bool = True) -> str | None:
        """The model file, or None where there is none."""
        path = self.context.model_file("segmentation")
        return str(path) if path is not None else None

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
