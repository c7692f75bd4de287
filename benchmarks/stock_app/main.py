"""MONAI Label's own app, as small as can be: its model answers with the mask that lies beside it, of the same series.

``masks`` (``--conf masks FOLDER``) is a folder with a file ``<SeriesInstanceUID>.nrrd`` for each series.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.tasks.activelearning.random import Random


class StoredMask(InferTask):
    """A model that needs no time."""

    def __init__(self, masks: Path) -> None:
        super().__init__(InferType.SEGMENTATION, ["liver"], 3, "The mask that is there")
        self._masks = masks

    def is_valid(self) -> bool:
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, object]]:
        """Give a copy, which the server removes when it is sent."""
        with tempfile.NamedTemporaryFile(suffix=".nrrd", delete=False) as copy:
            shutil.copy(self._masks / f"{request['series']}.nrrd", copy.name)
        return copy.name, {}


class StockApp(MONAILabelApp):
    """One model, and the strategy that the panel asks for."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self._masks = Path(conf["masks"])
        super().__init__(app_dir, studies, conf, name="Stock", labels=["liver"])

    def init_infers(self) -> dict[str, InferTask]:
        return {"liver": StoredMask(self._masks)}

    def infer(self, request: Mapping[str, Any], datastore: object = None) -> Any:
        """Run a model, which is told of the series, too: the image may be a file of any name."""
        return super().infer({**request, "series": request["image"]}, datastore)

    def init_strategies(self) -> dict[str, Random]:
        return {"random": Random()}
