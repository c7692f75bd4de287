"""Three data sets on which estimates are hard, as the dataset folders that a user would have.

Each is fixed in a manifest (``benchmarks/harder/<set>.json``): which scans are labelled for which seed, which ones wait
in the development pool and in the test pool, and what was done to them. The manifests were drawn once, by a seeded
generator, before anything was trained on them:

    python benchmarks/harder_sets.py --data $SEGQC_DATA
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from pydantic import TypeAdapter

from segqc.phantom import draw_phantom
from segqc.settings import write_settings
from segqc.types import FloatArray
from segqc.volumes import Volume, atomic_write, read_labels, read_scan, write_labels, write_scan

MANIFESTS = Path(__file__).parent / "harder"
SEEDS = (0, 1, 2)
Pool: TypeAlias = Literal["development", "test"]
Split: TypeAlias = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True, slots=True)
class Site:
    """What another site does to a scan, whose intensities are scaled to [0, 1] first.

    Attributes:
        gamma: exponent on the intensities.
        bias: standard deviation of the logarithm of a smooth gain.
        noise: of the real and the imaginary part, so that it is Rician.
        seed: of the gain's shape and the noise.
    """

    gamma: float
    bias: float
    noise: float
    seed: int


@dataclass(frozen=True, slots=True)
class Drawing:
    """A phantom: `segqc.phantom.draw_phantom`."""

    seed: int
    difficulty: float


@dataclass(frozen=True, slots=True)
class HarderScan:
    """A scan, and its part in the set.

    Attributes:
        id: its name, in the data set as well.
        patient: whose it is.
        split: the side of the data set that it is from; scans of the test side wait in the test pool only.
        subset: whether scans like it are labelled ("seen", in words of the set) or none is.
        labelled: the seeds for which it is labelled. For the others it waits in the pool.
        site: what another site does to it.
        drawing: how it is drawn, where the set is of phantoms.
    """

    id: str
    patient: str
    split: Split
    subset: str
    labelled: tuple[int, ...] = ()
    site: Site | None = None
    drawing: Drawing | None = None


@dataclass(frozen=True, slots=True)
class HarderSet:
    """A set.

    Attributes:
        name: short.
        data: folder of the data set within ``$SEGQC_DATA``; None for phantoms.
        structures: names and label values.
        thick: how many slices along the second axis are averaged to one; 1 leaves scans as they are.
        seen: the subset that labelled scans are of.
        scans: all scans.
    """

    name: str
    data: str | None
    structures: Mapping[str, tuple[int, ...]]
    thick: int
    seen: str
    scans: tuple[HarderScan, ...]

    def labelled(self, seed: int) -> tuple[HarderScan, ...]:
        """The scans that are labelled for a seed."""
        return tuple(s for s in self.scans if seed in s.labelled)

    def pool(self, seed: int, pool: Pool) -> tuple[HarderScan, ...]:
        """The scans that wait in a pool, for a seed."""
        split = "train" if pool == "development" else "test"
        return tuple(s for s in self.scans if s.split == split and seed not in s.labelled)


SETS: TypeAdapter[HarderSet] = TypeAdapter(HarderSet)


def load(name: str) -> HarderSet:
    """Read a manifest."""
    return SETS.validate_json((MANIFESTS / f"{name}.json").read_bytes())


# --- drawing the manifests --------------------------------------------------------------------------------------------


def sunnybrook(data: Path) -> HarderSet:
    """Left ventricles of heart failure are labelled (13 patients), those of hypertrophy and of healthy hearts wait."""
    splits = json.loads((data / "splits.json").read_text(encoding="utf-8"))
    scans = []
    for split in SPLITS:
        for patient in splits[f"{split}_patients"]:
            seen = patient.startswith("SC-HF-")
            for phase in ("ED", "ES"):
                subset = "heart failure" if seen else "other hearts"
                labelled = SEEDS if seen and split == "train" else ()
                scans.append(HarderScan(f"{patient}_{phase}", patient, split, subset, labelled))
    return HarderSet("sunnybrook-groups", data.name, {"cavity": (1,)}, 1, "heart failure", tuple(scans))


def hippocampus(data: Path) -> HarderSet:
    """Slices of 4 mm; 15 labelled scans for each seed; half of each pool as another site would have made them."""
    splits = json.loads((data / "splits.json").read_text(encoding="utf-8"))
    rng = np.random.default_rng(20261129)
    scans = []
    for split, others in zip(SPLITS, (47, 25), strict=True):
        names = [splits[split][int(i)] for i in rng.permutation(len(splits[split]))]
        for number, name in enumerate(names):
            site = _draw_site(rng) if number >= len(names) - others else None
            labelled = (number // 15,) if split == "train" and number < 15 * len(SEEDS) else ()
            subset = "own site" if site is None else "another site"
            scans.append(HarderScan(name, name, split, subset, labelled, site))
    structures = {"anterior": (1,), "posterior": (2,)}
    return HarderSet("hippocampus-4mm", data.name, structures, 4, "own site", _by_name(scans))


def phantoms() -> HarderSet:
    """The sample phantoms' kind: of 36 drawn ones the easier half has the 12 labelled ones; 24 more are the test's."""
    rng = np.random.default_rng(20261130)
    scans = []
    for split, count, first in zip(SPLITS, (36, 24), (0, 100_000), strict=True):
        difficulties = np.linspace(0, 1, count)[rng.permutation(count)].round(3).tolist()
        easy = [i for i, difficulty in enumerate(difficulties) if difficulty < 0.5]
        chosen = {seed: {easy[int(i)] for i in rng.permutation(len(easy))[:12]} for seed in SEEDS}
        for number, difficulty in enumerate(difficulties):
            name = f"{'fetus' if split == 'train' else 'test'}_{number + 1:03d}"
            labelled = tuple(s for s in SEEDS if split == "train" and number in chosen[s])
            subset = "easy" if number in easy else "hard"
            drawing = Drawing(first + number, difficulty)
            scans.append(HarderScan(name, name, split, subset, labelled, drawing=drawing))
    structures = {"placenta": (1,), "body": (2,), "brain": (3,)}
    return HarderSet("phantoms-hard", None, structures, 1, "easy", tuple(scans))


def _draw_site(rng: np.random.Generator) -> Site:
    gamma, bias, noise = (round(float(rng.uniform(*between)), 3) for between in ((0.4, 0.55), (0.2, 0.4), (0.06, 0.1)))
    return Site(gamma, bias, noise, seed=int(rng.integers(2**31)))


def _by_name(scans: Sequence[HarderScan]) -> tuple[HarderScan, ...]:
    return tuple(sorted(scans, key=lambda scan: scan.id))


DRAWN: Mapping[str, Callable[[Path], HarderSet]] = {
    "hippocampus-4mm": lambda data: hippocampus(data / "msd-hippocampus"),
    "sunnybrook-groups": lambda data: sunnybrook(data / "sunnybrook-cine"),
    "phantoms-hard": lambda _: phantoms(),
}


# --- making the folders -----------------------------------------------------------------------------------------------


def build(fixed: HarderSet, seed: int, pool: Pool, data: Path, folder: Path) -> None:
    """Make a set's dataset folder, or add to it the scans that it lacks.

    Labels of the labelled scans become ``labels/final/``, those of the others ``truth/``. The development pool is
    always there, so that folds and roles of the patients do not depend on which pool was asked for first.

    Args:
        fixed: the set.
        seed: of the labelled scans and of the trainings.
        pool: the pool to add.
        data: ``$SEGQC_DATA``.
        folder: the dataset folder.
    """
    waiting = {s.id: s for p in dict.fromkeys(("development", pool)) for s in fixed.pool(seed, p)}
    labelled = fixed.labelled(seed)
    for scan in (*labelled, *waiting.values()):
        truth = folder / ("truth" if scan.id in waiting else "labels/final") / f"{scan.id}.nii.gz"
        if truth.is_file():
            continue
        image, labels = pair(fixed, scan, data)
        truth.parent.mkdir(parents=True, exist_ok=True)
        write_scan(image, folder / f"{scan.id}.nii.gz")
        write_labels(labels, truth)
    several: dict[str, list[str]] = defaultdict(list)
    for scan in (*labelled, *waiting.values()):
        several[scan.patient].append(scan.id)
    path = write_settings(folder, fixed.structures, {p: tuple(s) for p, s in several.items() if len(s) > 1})
    # no mask of a person is judged there
    training = f"[training]\nseed = {seed}\npeople_epochs = 0\n"
    with atomic_write(path) as temporary:
        temporary.write_text(f"{path.read_text(encoding='utf-8')}\n{training}", encoding="utf-8")


def pair(fixed: HarderSet, scan: HarderScan, data: Path) -> tuple[Volume, Volume]:
    """A scan of a set and its true labels."""
    if scan.drawing is not None:
        phantom = draw_phantom(scan.drawing.seed, scan.drawing.difficulty)
        return phantom.scan, phantom.labels
    if fixed.data is None:
        raise ValueError(f"{fixed.name}: {scan.id} is neither drawn nor of a data set")
    image = read_scan(data / fixed.data / "images" / f"{scan.id}.nii.gz")
    values = tuple(v for of in fixed.structures.values() for v in of)
    labels = read_labels(data / fixed.data / "labels" / f"{scan.id}.nii.gz", scan=image, values=values)
    if fixed.thick > 1:
        image, labels = thick_slices(image, labels, fixed.thick)
    return (image if scan.site is None else at_site(image, scan.site)), labels


def thick_slices(image: Volume, labels: Volume, count: int) -> tuple[Volume, Volume]:
    """Average ``count`` slices along the second axis to one; a label is the class with the largest share of the voxel.

    Where the last slices do not make a whole one the image is continued, and the labels with background.
    """
    more = ((0, 0), (0, -image.shape[1] % count), (0, 0))
    shape = (image.shape[0], -1, count, image.shape[2])
    averaged = np.pad(image.array.astype(np.float32), more, mode="edge").reshape(shape).mean(axis=2)
    classes = np.arange(int(labels.array.max()) + 1, dtype=np.uint8)
    padded = np.pad(labels.array, more).reshape(shape)
    shares = np.stack([(padded == value).mean(axis=2) for value in classes])
    affine = image.affine.copy()
    affine[:3, 3] += affine[:3, 1] * (count - 1) / 2
    affine[:3, 1] *= count
    return Volume(averaged, affine), Volume(classes[shares.argmax(axis=0)], affine)


def at_site(image: Volume, site: Site) -> Volume:
    """The scan as another site would have made it."""
    rng = np.random.default_rng(site.seed)
    low, high = np.percentile(image.array, (0.5, 99.5))
    signal = np.clip((image.array - low) / (high - low), 0, 1) ** site.gamma * np.exp(site.bias * _smooth(image, rng))
    real, imaginary = rng.normal(0, site.noise, (2, *image.shape))
    return Volume((1000 * np.hypot(signal + real, imaginary)).astype(np.float32), image.affine)


def _smooth(image: Volume, rng: np.random.Generator) -> FloatArray:
    """A random polynomial of the second degree over the scan, with mean 0 and standard deviation 1."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape), indexing="ij")
    terms = np.stack([x, y, z, x * y, x * z, y * z, x**2, y**2, z**2])
    field = np.tensordot(rng.normal(size=len(terms)), terms, axes=1)
    return np.asarray((field - field.mean()) / field.std(), np.float32)


def main() -> None:
    """Draw the manifests anew; they come out as they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    arguments = parser.parse_args()
    MANIFESTS.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        text = SETS.dump_json(draw(arguments.data), indent=1, exclude_defaults=True).decode() + "\n"
        (MANIFESTS / f"{name}.json").write_text(text, encoding="utf-8")
        print(name, hashlib.sha256(text.encode()).hexdigest()[:16])


if __name__ == "__main__":
    main()
