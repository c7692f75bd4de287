"""The model files of the bundle that serves."""

from __future__ import annotations

import shutil

from fastapi import APIRouter, UploadFile

from segqc.loop.requests import NETWORKS
from segqc.networks.bundle import StructuresDiffer, model_name
from segqc.networks.model_file import ModelError
from segqc.server.errors import RequestError
from segqc.server.monailabel.facade import current_app
from segqc.server.names import known
from segqc.server.routers.dependencies import AskingUser
from segqc.store import bundles as chosen
from segqc.store.records import JsonObject

router = APIRouter()


@router.put("/model/{model}", tags=["Model"], summary="Publish a model file")
def update_model(model: str, file: UploadFile, user: AskingUser) -> JsonObject:
    """Publish an uploaded model, if it can be loaded and is of the same kind: a new bundle, which serves at once.

    The bundle's other network is that of the bundle before; it has to know the same structures. The scans that wait
    are scored by the new bundle.
    """
    network = known("model", model, NETWORKS)
    bundles = current_app().context.dataset.bundles
    with bundles.workspace() as folder:
        path = folder / model_name(network)
        with path.open("wb") as target:
            shutil.copyfileobj(file.file, target)
        try:
            published = bundles.publishing(
                {network: path}, user.actor(), "upload", only_as_pair=True, even_if_worse=True
            )
            with published as publication:
                manifest = publication.manifest
                chosen.choose(publication.transaction, publication.number, user.actor())
        except StructuresDiffer:
            raise
        except ModelError as error:
            message = error.clause.removeprefix(str(path)).removeprefix(": ")
            raise RequestError(422, f"the uploaded file is no {model} model: {message}") from error
    return {
        "checksum": f"SHA256:{manifest.networks[network].model_sha256}",
        "modified_time": int(manifest.made_at.timestamp()),
        "bundle": manifest.number,
    }


@router.delete("/model/{model}", tags=["Model"], summary="Refused: bundles never change")
def delete_model(model: str) -> None:
    """Refuse to remove a model: the bundle that it is part of could not serve any more."""
    known("model", model, NETWORKS)
    raise RequestError(
        409, "a published model is not removed; upload another one, or let another bundle serve (segqc models serve)."
    )
