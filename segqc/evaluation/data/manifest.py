"""Which masks an experiment is about: fixed by their hashes before any method is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from pydantic import TypeAdapter

Corrections: TypeAlias = Literal["none", "real", "simulated"]
Selection: TypeAlias = Literal["all", "random", "stratified", "worst-first"]


@dataclass(frozen=True, slots=True)
class TestMask:
    """A mask that is assessed.

    Attributes:
        id: unique in the run; its file is ``test-masks/<id>.nii.gz``.
        case: the scan's id.
        patient: the scan's patient.
        source: the network that made it: ``sources/<source>.pt``.
        dice: its true Dice, all structures together.
        sha256: its content.
        early: whether the network was at an early epoch of its training.
    """

    __test__ = False  # not a test, whatever pytest thinks of the name

    id: str
    case: str
    patient: str
    source: str
    dice: float
    sha256: str
    early: bool = False


@dataclass(frozen=True, slots=True)
class MaskSource:
    """A network that made masks of an experiment: name, hash of its content, number of patients whose labels it saw."""

    name: str
    version: str
    patients: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The masks of an experiment, how they were chosen, and whether their truths are corrections of these very masks.

    ``after_training`` says that methods had been trained in the run folder before the masks were fixed, for an
    experiment that was asked for earlier.
    """

    seed: int
    bins: tuple[float, ...]
    per_bin: int
    sources: tuple[str, ...]
    masks: tuple[TestMask, ...]
    corrections: Corrections = "none"
    selection: Selection = "all"
    networks: tuple[MaskSource, ...] = ()
    after_training: bool = False


MANIFESTS: TypeAdapter[Manifest] = TypeAdapter(Manifest)
