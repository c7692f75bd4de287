"""This project's app with one more inference task: it takes as long as it is told."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from segqc.server.serve import default_app_dir


def load_app() -> Any:
    folder = default_app_dir()
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("segqc_al_main", folder / "main.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(folder))
    return module


app_module = load_app()


class Slow(InferTask):
    params = frozenset({"seconds"})

    def __init__(self) -> None:
        super().__init__(type=InferType.OTHERS, labels=[], dimension=3, description="Takes its time")

    def is_valid(self) -> bool:
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        time.sleep(float(request["seconds"]))
        handle, path = tempfile.mkstemp(suffix=".nii.gz")
        os.close(handle)
        return path, {"slept": request["seconds"]}


class SlowApp(app_module.SegqcApp, MONAILabelApp):
    def init_infers(self) -> dict[str, InferTask]:
        return {**super().init_infers(), "slow": Slow()}
