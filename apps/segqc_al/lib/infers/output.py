"""How inference hands a label map back: as a temporary file of the requested format."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nrrd

from segqc.server.errors import RequestError
from segqc.volumes import SCAN_SUFFIXES, Volume, write_labels

REQUEST_KEYS = ("result_extension", "result_dtype", "result_compress")


def write_result(labels: Volume, request: Mapping[str, Any]) -> str:
    """Write a label map for the client that asked; the server removes the file when it is sent.

    Raises:
        RequestError: 400 for a format that cannot be written.
    """
    suffix = str(request.get("result_extension") or ".nii.gz")
    if suffix not in SCAN_SUFFIXES:
        raise RequestError(400, f"result_extension {suffix!r} is not one of {', '.join(SCAN_SUFFIXES)}.")
    handle, name = tempfile.mkstemp(prefix="segqc-", suffix=suffix)
    os.close(handle)
    write_labels(labels, Path(name))
    if suffix == ".nrrd" and request.get("result_compress") is False:
        # OHIF's reader takes raw voxels only
        voxels, header = nrrd.read(name)
        header["encoding"] = "raw"
        nrrd.write(name, voxels, header)
    return name
