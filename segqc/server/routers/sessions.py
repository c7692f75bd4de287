"""Sessions: scans that a client uploads for a while."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, File, Query, UploadFile
from fastapi.responses import FileResponse

from segqc.server.errors import RequestError
from segqc.server.monailabel.facade import current_app
from segqc.server.names import check_file_name, split_suffix
from segqc.server.parameters import MAX_COUNT
from segqc.server.routers.dependencies import check_received, known_session
from segqc.store.records import JsonObject

router = APIRouter()


@router.put("/session/", tags=["Session"], summary="Open a session with a scan")
def create_session(
    files: Annotated[list[UploadFile], File()],
    uncompress: Annotated[bool, Query(description="Refused: archives are not unpacked.")] = False,
    expiry: Annotated[int, Query(ge=0, le=MAX_COUNT, description="Seconds to keep it; 0 for the default.")] = 0,
) -> JsonObject:
    """Keep an uploaded scan for a while: one file, or the files of one DICOM series."""
    if uncompress:
        raise RequestError(400, "archives are not unpacked here; send the files of the series one by one.")
    names = [check_file_name(f.filename) for f in files]
    if len(set(names)) < len(names):
        raise RequestError(400, "each file of a session needs a name of its own.")
    if len(names) == 1:
        names = ["".join(split_suffix(names[0], "the scan"))]
    with tempfile.TemporaryDirectory(prefix="segqc-") as folder:
        series = Path(folder) / "series"
        series.mkdir()
        for name, upload in zip(names, files, strict=True):
            with (series / name).open("wb") as file:
                shutil.copyfileobj(upload.file, file)
        path = series if len(files) > 1 else series / names[0]
        check_received(path, "the scan")
        session, info = current_app().sessions.add_session(str(path), expiry)
    return {"session_id": session, "session_info": info.to_json()}


@router.get("/session/{session_id}", tags=["Session"], summary="What is known of a session")
def get_session(
    session_id: str,
    update_ts: Annotated[bool, Query(description="Whether to keep it for another while.")] = False,
    image: Annotated[bool, Query(description="Whether to send its scan.")] = False,
) -> Any:
    """Tell what is known of a session, or send its scan."""
    info = known_session(session_id, touch=update_ts)
    if not image:
        return info.to_json()
    if not os.path.isfile(info.image):
        raise RequestError(400, "the session holds a series of files; they cannot be sent as one.")
    return FileResponse(info.image, filename=os.path.basename(info.image))


@router.delete("/session/{session_id}", tags=["Session"], summary="End a session")
def remove_session(session_id: str) -> JsonObject:
    """End a session and remove its scan."""
    info = known_session(session_id)
    current_app().sessions.remove_session(session_id)
    return info.to_json()
