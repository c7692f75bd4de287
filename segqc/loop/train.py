"""Train one of the two networks on a studies folder and publish it there."""

from __future__ import annotations

from segqc.assessor import Assessor
from segqc.loop.studies import Studies
from segqc.networks import Kind, ModelCard
from segqc.pictures import draw_curve
from segqc.segmenter import Segmenter
from segqc.store import labels
from segqc.training import Progress, TrainingSettings, train_assessor, train_segmentation


def train(studies: Studies, network: Kind, progress: Progress, settings: TrainingSettings | None = None) -> ModelCard:
    """Train a network on all final labels of a studies folder, draw its learning curve, publish the model.

    The file of the model is replaced in one step when the training is done; until then the old model serves.

    Args:
        studies: the folder.
        network: "segmentation" or "segqc".
        progress: told after each step.
        settings: how to train; by default what the folder's settings say.

    Raises:
        TooFewCases: if too few scans are labelled.
        StudiesError: if nothing says what the structures are.
        VolumeError: if a scan or a label file can't be used.
    """
    settings = settings or studies.settings.training_settings(network)
    folder = studies.training_folder(network)
    placements = dict(studies.placements())
    learn = train_segmentation if network == "segmentation" else train_assessor
    trained: Segmenter | Assessor = learn(studies.cases(), studies.structures, placements, settings, folder, progress)
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
