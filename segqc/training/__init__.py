"""Training of both networks: scan-mask pairs, folds, checkpoints that resume."""

from segqc.placement import Placement
from segqc.training.assessor import train_assessor, train_on_masks
from segqc.training.cases import Case, CaseError, TooFewCases
from segqc.training.progress import LineProgress, NoProgress, Progress
from segqc.training.segmentation import train_segmentation
from segqc.training.settings import TrainingSettings

__all__ = [
    "Case",
    "CaseError",
    "LineProgress",
    "NoProgress",
    "Placement",
    "Progress",
    "TooFewCases",
    "TrainingSettings",
    "train_assessor",
    "train_on_masks",
    "train_segmentation",
]
