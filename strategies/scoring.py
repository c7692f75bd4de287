"""Scoring of the pool: masks and estimates for all scans without a final label."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod

from segqc.loop.dataset import Dataset
from segqc.loop.scoring import score
from segqc.selection import score_of
from segqc.training import LineProgress


class PoolScoring(ScoringMethod):  # type: ignore[misc]  # MONAI Label has no types
    """One method over all scans that wait for a label; what the current models have scored is left as it is."""

    def __init__(self, method: str, dataset: Dataset) -> None:
        super().__init__(score_of(method).description)
        self.method = method
        self.dataset = dataset

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, object]:
        """Score at once; the server's routes leave it to a worker."""
        summary = score(self.dataset, self.method, LineProgress(), force=bool(request.get("force", False)))
        return {"method": self.method, **dataclasses.asdict(summary)}
