"""What are the estimates of people's masks worth? SegQC-Net told who made a mask, and not told, beside other witnesses.

The labelled scans of a set become a dataset folder, in which the product trains at its default settings. Masks of
unseen patients are then judged as ``segqc evaluate labels FOLDER --on DATA`` does it. Resumable: what is trained and
judged in the work folder is not done again.

    python benchmarks/people.py run hippocampus --seed 0 --data $SEGQC_DATA --work /tmp/people
    python benchmarks/people.py run hippocampus --seed 0 --data $SEGQC_DATA --work /tmp/people --scan-only
    python benchmarks/people.py table

With ``--scan-only``, a SegQC-Net that never sees a mask stands in the place of the one that is not told, beside the
same network for people's masks. ``--pool development`` is for choosing; the test pool is measured once for each result
that is reported.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
from pydantic import JsonValue, TypeAdapter

from segqc.evaluation.experiments.labels import JudgedMask
from segqc.evaluation.labels import LabelSettings, LabelsResult, evaluate_labels
from segqc.evaluation.report.document import Table
from segqc.evaluation.report.formats import to_markdown
from segqc.evaluation.report.labels import error_tables, main_tables
from segqc.loop.dataset import Dataset
from segqc.loop.training import train, train_unpublished
from segqc.networks.assessor import Assessor
from segqc.networks.bundle import model_name
from segqc.networks.card import NetworkName
from segqc.settings import write_settings
from segqc.store.events import SERVER
from segqc.training import LineProgress
from segqc.training.cases import Case
from segqc.volumes import atomic_write

RESULTS = Path(__file__).parent / "results"
NETWORKS: tuple[NetworkName, ...] = ("segmentation", "segqc")
Pool: TypeAlias = Literal["development", "test"]
MIN_ERROR_MM2 = 25.0  # of an error that is to be found
progress = LineProgress()


@dataclass(frozen=True, slots=True)
class KnownSet:
    """A data set whose experts' labels are all known.

    Attributes:
        data: its folder within ``$SEGQC_DATA``.
        structures: names and label values.
        labelled: how many patients' scans are labelled.
        key: of the patients of a side in its ``splits.json``.
        scans: the scans of a patient.
    """

    data: str
    structures: dict[str, tuple[int, ...]]
    labelled: int
    key: str
    scans: Callable[[str], tuple[str, ...]]


SETS = {
    "hippocampus": KnownSet(
        "msd-hippocampus", {"anterior": (1,), "posterior": (2,)}, 30, "{}", lambda patient: (patient,)
    ),
    "sunnybrook": KnownSet(
        "sunnybrook-cine", {"cavity": (1,)}, 14, "{}_patients", lambda patient: (f"{patient}_ED", f"{patient}_ES")
    ),
}


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured with the networks of one seed; ``trust`` is the mask skip's, by member and structure."""

    set: str
    pool: Pool
    trust: tuple[tuple[float, ...], ...]
    found: LabelsResult


RESULT: TypeAdapter[Result] = TypeAdapter(Result)


# --- the product ------------------------------------------------------------------------------------------------------


def patients(known: KnownSet, seed: int, pool: Pool | None, data: Path) -> list[str]:
    """The labelled patients for a seed, or those of a pool."""
    splits = json.loads((data / known.data / "splits.json").read_text(encoding="utf-8"))
    if pool == "test":
        return sorted(splits[known.key.format("test")])
    train_side = sorted(splits[known.key.format("train")])
    order = [train_side[int(i)] for i in np.random.default_rng((27, seed)).permutation(len(train_side))]
    return order[: known.labelled] if pool is None else order[known.labelled :]


def serve(known: KnownSet, seed: int, data: Path, folder: Path) -> Dataset:
    """Make the dataset folder and train the networks, as far as it is not done yet."""
    if not folder.is_dir():
        new = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        (new / "labels" / "final").mkdir(parents=True)
        for patient in patients(known, seed, None, data):
            for scan in known.scans(patient):
                shutil.copy(data / known.data / "images" / f"{scan}.nii.gz", new)
                shutil.copy(data / known.data / "labels" / f"{scan}.nii.gz", new / "labels" / "final")
        several = {p: known.scans(p) for p in patients(known, seed, None, data) if len(known.scans(p)) > 1}
        path = write_settings(new, known.structures, several)
        path.write_text(f"{path.read_text(encoding='utf-8')}\n[training]\nseed = {seed}\n", encoding="utf-8")
        new.rename(folder)
    dataset = Dataset(folder)
    for network in NETWORKS:
        bundle = dataset.bundle()
        if bundle is None or not bundle.holds(network):
            train(dataset, network, progress)
    return dataset


def serve_scan_only(known: KnownSet, seed: int, data: Path, folder: Path) -> Dataset:
    """Like `serve`, with a SegQC-Net that never sees a mask beside the product's network for people's masks."""
    twin = folder.with_name(f"{folder.name}-scan-only")
    if not twin.is_dir():
        serve(known, seed, data, folder)
        new = twin.with_name(f"{twin.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(folder, new)
        new.rename(twin)
    dataset = Dataset(twin)
    assessor = dataset.assessor()
    if assessor is None or assessor.people is None:
        raise SystemExit(f"{twin}: it has no network for people's masks")
    if not assessor.card.hide_mask:
        own = dataset.settings.training_settings("segqc")
        settings = replace(own, scan_only_share=1.0, hide_mask=True, average_flips=True, people_epochs=0)
        path = twin.with_name(f"{twin.name}-network") / model_name("segqc")
        train_unpublished(dataset, "segqc", progress, settings, path)
        Assessor.load(path).with_people(assessor.people).save(path)
        with dataset.bundles.publishing({"segqc": path}, SERVER, "scan only", even_if_worse=True):
            pass
    return dataset


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(
    name: str, seed: int, pool: Pool, data: Path, folder: Path, served: Callable[..., Dataset] = serve
) -> Result:
    """Judge the masks of all patients of a pool by the networks that are served so."""
    known = SETS[name]
    dataset = served(known, seed, data, folder)
    cases = [
        Case(scan, patient, *(data / known.data / kind / f"{scan}.nii.gz" for kind in ("images", "labels")))
        for patient in patients(known, seed, pool, data)
        for scan in known.scans(patient)
    ]
    settings = LabelSettings(seed=seed, min_error_mm2=MIN_ERROR_MM2)
    found = evaluate_labels(
        dataset, folder.with_name(f"{dataset.folder.name}-{pool}"), progress, on=cases, settings=settings
    )
    assessor = dataset.assessor()
    people = None if assessor is None else assessor.people
    skips = [] if people is None else [m for m in people.network.modules() if hasattr(m, "trust")]
    trust = tuple(tuple(round(float(t), 3) for t in skip.trust) for skip in skips)
    return Result(set=name, pool=pool, trust=trust, found=found)


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(results: Sequence[Result]) -> list[Table]:
    """The tables of the results of one set and pool, of one seed or several together."""
    masks: list[JudgedMask] = []
    for result in results:
        seed = result.found.settings.seed
        masks += [replace(mask, scan=f"{mask.scan}, seed {seed}") for mask in result.found.masks]
    seeds = ", ".join(str(result.found.settings.seed) for result in results)
    where = f"{results[0].set}, {results[0].pool} pool, seeds {seeds}"
    return [replace(table, title=f"{table.title}: {where}") for table in (*main_tables(masks), *error_tables(masks))]


def _short(value: JsonValue) -> JsonValue:
    """A value with numbers of five digits."""
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def keep(result: JsonValue, path: Path) -> None:
    """Write a result."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(_short(result)), encoding="utf-8")


def arguments_of(
    description: str | None,
    *,
    pools: Sequence[str] = get_args(Pool),
    further: Callable[[argparse.ArgumentParser], object] = lambda _: None,
) -> argparse.Namespace:
    """What the command line says: ``run`` of one unit, or ``table``; ``further`` adds options to ``run``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, judge and keep the result")
    run.add_argument("set", choices=SETS)
    run.add_argument("--seed", type=int, default=0)
    if pools:
        run.add_argument("--pool", choices=pools, default=pools[0])
    run.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    run.add_argument("--work", type=Path, required=True)
    further(run)
    run.add_argument("--result", type=Path, help="where to write it, instead of benchmarks/results")
    commands.add_parser("table", help="print the tables of all results")
    return parser.parse_args()


def _scan_only(run: argparse.ArgumentParser) -> None:
    run.add_argument("--scan-only", action="store_true", help="with a SegQC-Net that never sees a mask")


def main() -> None:
    """Run one unit, or print the tables."""
    arguments = arguments_of(__doc__, further=_scan_only)
    if arguments.command == "run":
        folder = arguments.work / f"{arguments.set}-{arguments.seed}"
        arguments.work.mkdir(parents=True, exist_ok=True)
        served = serve_scan_only if arguments.scan_only else serve
        result = measure(arguments.set, arguments.seed, arguments.pool, arguments.data, folder, served)
        what = "scan-only" if arguments.scan_only else "people"
        path = arguments.result or RESULTS / f"{what}-{arguments.set}-{arguments.seed}-{arguments.pool}.json"
        keep(RESULT.dump_python(result, mode="json"), path)
        print("\n\n".join(to_markdown(table) for table in tables([result])))
        return
    of: dict[tuple[str, Pool, str], list[Result]] = defaultdict(list)
    for what in ("people", "scan-only"):
        for path in sorted(RESULTS.glob(f"{what}-*.json")):
            result = RESULT.validate_json(path.read_bytes())
            of[result.set, result.pool, what].append(result)
    print("\n\n".join(to_markdown(table) for results in of.values() for table in tables(results)))


if __name__ == "__main__":
    main()
