"""The MONAI Label app: names the inference tasks, the trainings and the strategies that a dataset folder is served by.

They are in `segqc.server.monailabel`. MONAI Label starts the class in this file that is derived from its own.
"""

from __future__ import annotations

from monailabel.interfaces.app import MONAILabelApp

import strategies
from segqc.server.monailabel import app, infer, strategy, train


class SegqcApp(app.DatasetApp, MONAILabelApp):
    """Segmentation, its quality estimate, and the next scan to correct."""

    def init_infers(self) -> dict[str, infer.NetworkTask]:
        """The mask first: clients run the first model that shares a label."""
        return {"segmentation": infer.Segmentation(self.context), "segqc": infer.LikelyErrors(self.context)}

    def init_trainers(self) -> dict[str, train.NetworkTraining]:
        """Both networks."""
        return {
            "segmentation": train.NetworkTraining(self.context, "segmentation"),
            "segqc": train.NetworkTraining(self.context, "segqc"),
        }

    def init_strategies(self) -> dict[str, strategy.Sampling]:
        """What chooses the next scan."""
        return strategies.sampling(self.context)

    def init_scoring_methods(self) -> dict[str, strategy.PoolScoring]:
        """What scores the scans that wait."""
        return strategies.scoring(self.context)
