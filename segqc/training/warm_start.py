"""Where a training begins: at first weights that are drawn anew, or at those of the last finished training.

A network that begins at another one's weights has seen what that one has. So a training may begin only at the network
of its own role: it lies in its own folder, as a fold's network does. Nobody relies on that alone: each network is kept
with the patients that it has seen, and one that has seen a patient that this training must not see is not begun at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from segqc.networks.plan import NetworkPlan
from segqc.networks.unet import Weights

_TOLERATED: Final = 0.1  # of a spacing: weights still mean the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What a training has to know of the one before it, to begin where that ended.

    Attributes:
        outputs: what the network's outputs mean, in words that are the same for the same meaning.
        seen: the patients whose labels this training sees, by itself.
        unseen: those whose labels the network must never have seen, nor one that it began at.
    """

    outputs: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The network that a training begins at.

    Attributes:
        weights: its weights.
        seen: the patients whose labels it has seen, or one that it was begun at.
        snapshots: its weights after early epochs, of the first training of all: no later one is ever so bad again.
    """

    weights: Weights
    seen: tuple[str, ...]
    snapshots: Mapping[int, Weights]

    @property
    def digest(self) -> str:
        """A hash of the weights and the snapshots."""
        digest = hashlib.sha256()
        for weights in (self.weights, *(self.snapshots[epoch] for epoch in sorted(self.snapshots))):
            for name, tensor in sorted(weights.items()):
                digest.update(name.encode() + np.ascontiguousarray(tensor.numpy()).tobytes())
        return digest.hexdigest()

    def content(self) -> dict[str, Any]:
        """As checkpoints hold it."""
        return {"weights": self.weights, "seen": list(self.seen), "snapshots": dict(self.snapshots)}

    @classmethod
    def of_content(cls, content: Mapping[str, Any] | None) -> Start | None:
        """What `content` has made; None where it is None."""
        if content is None:
            return None
        return cls(weights=content["weights"], seen=tuple(content["seen"]), snapshots=content["snapshots"])


class NoStartError(Exception):
    """A training begins anew; says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a checkpoint says of the training that wrote it: see `check_start`."""

    plan: NetworkPlan
    outputs: str
    seed: int
    variant: str
    snapshots: tuple[int, ...]

    def content(self) -> dict[str, Any]:
        """As checkpoints hold it."""
        return asdict(self)

    @classmethod
    def of_content(cls, content: Mapping[str, Any]) -> Origin:
        """What `content` has made."""
        plan = NetworkPlan(**content["plan"])
        return cls(**{**content, "plan": plan, "snapshots": tuple(content["snapshots"])})


def check_start(before: Origin, start: Start, now: Origin, lineage: Lineage) -> None:
    """Refuse to begin where another training ended.

    The patch may be another one, and the spacing a little coarser or finer: weights mean the same then.

    Args:
        before: the training that made the start.
        start: the network that it made.
        now: the training that would begin there.
        lineage: of that training.

    Raises:
        NoStartError: if it is of another plan, other structures or another seed, or has seen what must not be seen.
    """
    spacings = zip(before.plan.spacing_mm, now.plan.spacing_mm, strict=True)
    as_now = replace(before.plan, patch=now.plan.patch, spacing_mm=now.plan.spacing_mm)
    if as_now != now.plan or any(abs(a - b) > _TOLERATED * b for a, b in spacings):
        raise NoStartError("the plan of the networks has changed")
    if before.outputs != now.outputs:
        raise NoStartError("the structures, or what the network says of them, have changed")
    if (before.seed, before.variant, before.snapshots) != (now.seed, now.variant, now.snapshots):
        raise NoStartError("the seed or the length of the trainings has changed")
    if leaked := sorted({*start.seen} & {*lineage.unseen}):
        raise NoStartError(f"the last one has seen the patient {leaked[0]!r}, whom this one must not see")
