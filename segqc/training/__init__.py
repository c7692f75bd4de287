"""Training of both networks: scan-mask pairs, folds, checkpoints that resume."""

from segqc.progress import LineProgress, NoProgress, Progress
from segqc.training.assessor import train_assessor, train_on_masks
from segqc.training.cases import Case, CaseError, TooFewCases
from segqc.training.segmentation import train_segmentation
from segqc.training.spec import TrainingSettings

__all__ = [
    "Case",
    "CaseError",
    "LineProgress",
    "NoProgress",
    "Progress",
    "TooFewCases",
    "TrainingSettings",
    "train_assessor",
    "train_on_masks",
    "train_segmentation",
]
