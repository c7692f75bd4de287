"""A bundle that can audit labels: untrained networks, one of each fold, for networks' masks and for people's."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from segqc.loop.dataset import Dataset
from segqc.networks.assessor import Assessor
from segqc.networks.card import ModelCard
from segqc.networks.unet import build_network
from segqc.store.events import SERVER
from segqc.training.assessor_network import ensemble
from segqc.types import Structure
from tests.server_kit import STRUCTURES, save_models, tiny_plan


def fold_assessor(
    seen: Sequence[Sequence[str]], structures: tuple[Structure, ...] = STRUCTURES, *, people: bool = True
) -> Assessor:
    """An untrained SegQC-Net of as many members as there are lists of patients that each has seen."""
    inputs, outputs = 1 + len(structures), len(structures)
    plan = tiny_plan(inputs, outputs)
    values = tuple(value for structure in structures for value in structure.values)

    def member(number: int, *, skips: bool) -> Assessor:
        patients = tuple(seen[number])
        own = replace(plan, mask_skip=skips)
        card = ModelCard("segqc", own, structures, values, seen=patients, members_seen=(patients,))
        return Assessor(card, build_network(own, seed=number + 10 * skips))

    numbers = range(len(seen))
    together = ensemble([member(i, skips=False) for i in numbers]) if len(seen) > 1 else member(0, skips=False)
    if not people:
        return together
    skipping = ensemble([member(i, skips=True) for i in numbers]) if len(seen) > 1 else member(0, skips=True)
    return together.with_people(skipping)


@functools.cache
def _fold_file(seen: tuple[tuple[str, ...], ...], *, people: bool) -> bytes:
    """The file of a `fold_assessor`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "segqc.pt"
        fold_assessor(seen, people=people).save(path)
        return path.read_bytes()


def add_fold_models(folder: Path, seen: Sequence[Sequence[str]], *, people: bool = True) -> int:
    """Publish untrained networks, SegQC-Net's as `fold_assessor` makes them; the bundle's number."""
    dataset = Dataset(folder)
    with dataset.bundles.workspace() as work:
        files = save_models(work)
        files["segqc"].write_bytes(_fold_file(tuple(map(tuple, seen)), people=people))
        return dataset.bundles.publish(files, SERVER, "a test")
