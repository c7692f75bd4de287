"""Training task `segmentation`."""

from __future__ import annotations

from lib.trainers.network import NetworkTraining
from segqc.networks.card import ModelCard
from segqc.server.context import AppContext


class SegmentationTraining(NetworkTraining):
    """The segmentation network; its accuracy is the mean Dice on the cases that validate."""

    def __init__(self, context: AppContext) -> None:
        super().__init__(context, "segmentation", "Trains the segmentation network on all final labels")

    def accuracy(self, card: ModelCard) -> float | None:
        """The mean Dice over the structures."""
        return card.scores.get("dice")
