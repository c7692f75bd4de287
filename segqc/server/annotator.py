"""A simulated annotator: asks a running server for the next scan, fetches its mask, and submits the truth instead.

Where it is asked for some slices, the truth takes the mask's place in these only. It talks to the server as 3D Slicer
does, through MONAI Label's own client.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from segqc.errors import SegqcError
from segqc.loop.agreement import dice_by_structure, find_labels, worst_dice
from segqc.server.client_labels import from_client
from segqc.server.monailabel.client import MONAILabelClient, MONAILabelClientException
from segqc.types import PredictionInterval, Structure, label_names, segment_names
from segqc.volumes import Volume, VolumeError, read_labels, temporary_labels, through_plane_axis
from segqc.volumes.slices import all_but

logger = logging.getLogger(__name__)


class AnnotatorError(SegqcError):
    """The simulated annotator can't go on; says what the server answered or which truth is missing."""


@dataclass(frozen=True, slots=True)
class Correction:
    """One scan handed out and submitted: the estimate that came with it, and the true Dice of the mask shown.

    ``strategy`` is who chose the scan. Both numbers are the worst structure's. ``unlike``: the scan is unlike the
    training's, so that it came without an interval. ``slices`` are those that were corrected; None for all.
    """

    scan: str
    strategy: str
    estimated_dice: float | None
    true_dice: float
    worst_slices: tuple[int, ...]
    interval: PredictionInterval | None = None
    unlike: bool = False
    slices: tuple[int, ...] | None = None


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
    slices: tuple[int, ...] | None = None


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
        names = label_names(structures)
        mask = from_client(read_labels(_mask(client, scan)), names)
        true = read_labels(truth, scan=mask, names=segment_names(structures))
        dice = dice_by_structure(mask.array, true.array, structures)
        params = {"simulated": True, "label_names": names}
        if sample.slices is None:
            client.save_label(scan, str(truth), tag="final", params=params)
        else:
            with temporary_labels(_corrected(mask, true, sample.slices)) as path:
                client.save_label(scan, str(path), tag="final", params=params)
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
        sample.slices,
    )


def _corrected(mask: Volume, truth: Volume, slices: Collection[int]) -> Volume:
    """A mask with some slices of the truth in the place of its own."""
    axis = through_plane_axis(mask)
    untouched = all_but(mask.shape, slices, axis) > 0
    return Volume(np.where(untouched, mask.array, truth.array), mask.affine, mask.acquisition_axis)


def _mask(client: MONAILabelClient, scan: str) -> Path:
    """The stored mask of the scan, or its label that was sent back; where there is none yet, a new one."""
    for tag in ("returned", "original"):
        with contextlib.suppress(MONAILabelClientException):
            return Path(client.download_label(scan, tag))
    file, _ = client.infer("segmentation", scan, {"result_extension": ".nii.gz"})
    if file is None:
        raise AnnotatorError(f"{scan}: the server returned no mask")
    return Path(shutil.copy(file, Path(file).with_name(f"{scan}-mask.nii.gz")))
