"""Train one of the two networks on a studies folder and publish it there."""

from __future__ import annotations

import logging

from segqc.assessor import Assessor
from segqc.loop.studies import Studies
from segqc.networks import Kind, ModelCard
from segqc.pictures import draw_curve
from segqc.segmenter import Segmenter
from segqc.store import labels
from segqc.training import (
    CaseError,
    Progress,
    TooFewCases,
    TrainingSettings,
    train_assessor,
    train_segmentation,
)

logger = logging.getLogger(__name__)


def train(studies: Studies, network: Kind, progress: Progress, settings: TrainingSettings | None = None) -> ModelCard:
    """Train a network on all final labels of a studies folder, draw its learning curve, publish the model.

    A scan that can't be used, or whose label can't, is left out with a warning.

    The file of the model is replaced in one step when the training is done; until then the old model serves.

    Args:
        studies: the folder.
        network: "segmentation" or "segqc".
        progress: told after each step.
        settings: how to train; by default what the folder's settings say.

    Raises:
        TooFewCases: if too few scans are labelled.
        StudiesError: if nothing says what the structures are.
    """
    settings = settings or studies.settings.training_settings(network)
    folder = studies.training_folder(network)
    placements = dict(studies.placements())
    learn = train_segmentation if network == "segmentation" else train_assessor
    cases, structures = studies.cases(), studies.structures
    left_out: list[str] = []
    while True:
        try:
            trained: Segmenter | Assessor = learn(cases, structures, placements, settings, folder, progress)
            break
        except CaseError as error:
            logger.warning("left out of the training: %s", error)
            left_out.append(str(error))
            cases = [case for case in cases if case.id != error.case]
        except TooFewCases as error:
            if not left_out:
                raise
            raise TooFewCases(f"{error}; left out: {'; '.join(left_out)}") from error
    if (folder / "curve.json").is_file():
        draw_curve(folder / "curve.json", folder / "curve.png")
    path = studies.model_path(network)
    path.parent.mkdir(parents=True, exist_ok=True)
    trained.save(path)
    publish(studies)
    return trained.card


def publish(studies: Studies) -> int:
    """Note which pair of networks serves from now on (an estimate always belongs to the pair); returns its number."""
    segmenter, assessor = studies.segmenter(), studies.assessor()
    with studies.store.write() as transaction:
        pair = labels.bundle(
            transaction,
            segmenter.version if segmenter is not None else "",
            assessor.version if assessor is not None else None,
        )
    return pair.id
