"""Training task `segmentation`."""

from __future__ import annotations

from lib.trainers.network import NetworkTraining
from segqc.networks import ModelCard
from segqc.segmenter import Segmenter
from segqc.server.models import Desk, ModelShelf


class SegmentationTraining(NetworkTraining):
    """The segmentation network; its accuracy is the mean Dice on the cases that validate."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk, "segmentation", "Trains the segmentation network on all final labels")

    @property
    def shelf(self) -> ModelShelf[Segmenter]:
        """Where the trained network lies."""
        return self.desk.segmenters

    def accuracy(self, card: ModelCard) -> float | None:
        """The mean Dice over the structures."""
        return card.scores.get("dice")
