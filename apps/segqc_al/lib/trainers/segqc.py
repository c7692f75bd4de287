"""Training task `segqc`."""

from __future__ import annotations

from lib.trainers.network import CHOICES, NetworkTraining
from segqc.networks.card import ModelCard
from segqc.server.context import AppContext


class SegqcTraining(NetworkTraining):
    """SegQC-Net; its accuracy is one minus the mean error of the estimated Dice on the cases that validate."""

    def __init__(self, context: AppContext) -> None:
        description = "Trains SegQC-Net on cross-fitted masks of all scans with a final label"
        super().__init__(context, "segqc", description, (*CHOICES, "fold_epochs"))

    def accuracy(self, card: ModelCard) -> float | None:
        """One minus the structures' mean error."""
        errors = [value for name, value in card.scores.items() if name.startswith("dice error")]
        return 1.0 - sum(errors) / len(errors) if errors else None
