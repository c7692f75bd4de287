"""A simulated annotator: asks a running server for the next scan, fetches its mask, and submits the truth instead.

It talks to the server as 3D Slicer does, through MONAI Label's own client.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from segqc.errors import SegqcError
from segqc.loop.agreement import dice_by_structure, find_labels, worst_dice
from segqc.server.client_labels import from_client
from segqc.server.monailabel.client import MONAILabelClient, MONAILabelClientException
from segqc.types import PredictionInterval, Structure, label_names, segment_names
from segqc.volumes import VolumeError, read_labels

logger = logging.getLogger(__name__)


class AnnotatorError(SegqcError):
    """The simulated annotator can't go on; says what the server answered or which truth is missing."""


@dataclass(frozen=True, slots=True)
class Correction:
    """One scan handed out and submitted: the estimate that came with it, and the true Dice of the mask shown.

    ``strategy`` is who chose the scan. Both numbers are the worst structure's. ``unlike``: the scan is unlike the
    training's, so that it came without an interval.
    """

    scan: str
    strategy: str
    estimated_dice: float | None
    true_dice: float
    worst_slices: tuple[int, ...]
    interval: PredictionInterval | None = None
    unlike: bool = False


class _UnlikeTraining(BaseModel):
    model_config = ConfigDict(extra="ignore")

    message: str | None = None


class _NextSample(BaseModel):
    model_config = ConfigDict(extra="ignore")

    id: str | None = None
    strategy: str = ""
    estimated_dice: float | None = None
    estimated_dice_interval: PredictionInterval | None = None
    unlike_training: _UnlikeTraining | None = None
    worst_slices: tuple[int, ...] = ()


def annotate(
    url: str, truth: Path, structures: tuple[Structure, ...], *, count: int, strategy: str = "segqc"
) -> Iterator[Correction]:
    """Correct scans one after the other; ends early where the server has no scan left.

    Args:
        url: the server, such as http://127.0.0.1:8000.
        truth: a folder of true label files, named as the scans.
        structures: what the true Dice is measured on.
        count: number of scans.
        strategy: the strategy to ask.

    Raises:
        AnnotatorError: if the server does not answer or refuses, or a scan's truth is missing.
    """
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            client = MONAILabelClient(url, tmpdir=folder, client_id="simulated-annotator")
            sample = _next(client, strategy)
            if sample.id is None:
                logger.info("the server has no open scan left")
                return
            path = find_labels(truth, sample.id)
            if path is None:
                raise AnnotatorError(f"{truth}: no true labels of the scan {sample.id}, so it cannot be corrected")
            yield _correct(client, sample, sample.id, path, structures)


def _next(client: MONAILabelClient, strategy: str) -> _NextSample:
    try:
        return _NextSample.model_validate(client.next_sample(strategy, {}))
    except OSError as error:
        raise AnnotatorError(f"{client.get_server_url()}: no answer ({error}); is the server running?") from error
    except MONAILabelClientException as error:
        raise AnnotatorError(f"{client.get_server_url()}: no next sample: {error.msg}") from error
    except ValidationError as error:
        raise AnnotatorError(f"{client.get_server_url()}: not a SegQC server: {error}") from error


def _correct(
    client: MONAILabelClient, sample: _NextSample, scan: str, truth: Path, structures: tuple[Structure, ...]
) -> Correction:
    try:
        shown = _mask(client, scan)
        true = read_labels(truth, names=segment_names(structures))
        names = label_names(structures)
        dice = dice_by_structure(from_client(read_labels(shown), names).array, true.array, structures)
        client.save_label(scan, str(truth), tag="final", params={"simulated": True, "label_names": names})
    except (MONAILabelClientException, OSError, VolumeError) as error:
        raise AnnotatorError(f"{scan}: {getattr(error, 'msg', error)}") from error
    return Correction(
        scan,
        sample.strategy,
        sample.estimated_dice,
        worst_dice(dice),
        sample.worst_slices,
        sample.estimated_dice_interval,
        sample.unlike_training is not None and sample.unlike_training.message is not None,
    )


def _mask(client: MONAILabelClient, scan: str) -> Path:
    """The stored mask of the scan; where there is none yet, a new one."""
    try:
        return Path(client.download_label(scan, "original"))
    except MONAILabelClientException:
        file, _ = client.infer("segmentation", scan, {"result_extension": ".nii.gz"})
        if file is None:
            raise AnnotatorError(f"{scan}: the server returned no mask") from None
        return Path(shutil.copy(file, Path(file).with_name(f"{scan}-mask.nii.gz")))
