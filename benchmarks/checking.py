"""How long does the check of a submission take? From the files on the disk to what is kept of it, on a CPU.

A phantom of 256 x 256 x 48 voxels, and networks of the default plan with three members, as they are trained by
default. What they answer is of no worth here, but costs the same. A part of the mask is cut off in two slices. Each
round checks a new version of the label and reads all anew, as a server does with a submission; the networks are loaded,
and the backend has been tried on this machine before. "drawn" labels are a person's alone; of "corrected" ones one
slice is, and the others are as the network that serves made them, so that it and SegQC-Net are asked, too.

    python benchmarks/checking.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from inference import BRIGHT, MEMBERS, SCANS, phantom
from rich.console import Console
from rich.table import Table

from segqc.loop.checking import check_label
from segqc.loop.dataset import Dataset
from segqc.networks.assessor import Assessor
from segqc.networks.bundle import model_name
from segqc.networks.card import ModelCard, NetworkName
from segqc.networks.plan import NetworkPlan, plan_network
from segqc.networks.segmenter import Segmenter
from segqc.networks.unet import MeanOfNetworks, build_network
from segqc.store.events import SERVER
from segqc.store.labels import NewLabel
from segqc.store.records import Actor
from segqc.types import Structure
from segqc.volumes import Volume, temporary_labels, write_scan

SCAN = "256 x 256 x 48"
ROUNDS = 7
STRUCTURES = (Structure("ellipsoid", (1,)),)
ANNA = Actor(kind="person", name="anna", identified_by="client-id")


def judge(plan: NetworkPlan) -> Assessor:
    """An untrained SegQC-Net of so many members as are trained by default."""
    members = [build_network(plan, seed=seed) for seed in range(MEMBERS)]
    return Assessor(ModelCard("segqc", plan, STRUCTURES, (1,), (), members=MEMBERS), MeanOfNetworks(members))


def make_folder(folder: Path, backend: str) -> Dataset:
    """One scan, and a bundle with a network for people's masks."""
    shape, spacing, radius = SCANS[SCAN]
    settings = f'[structures]\nellipsoid = [1]\n[inference]\nbackend = "{backend}"\n'
    (folder / "segqc.toml").write_text(settings, encoding="utf-8")
    write_scan(phantom(shape, spacing, radius), folder / "scan.nii.gz")
    plans = [plan_network(spacing, shape, in_channels=n, out_channels=3 - n) for n in (1, 2)]
    segmenter = Segmenter(ModelCard("segmentation", plans[0], STRUCTURES, (1,), ()), build_network(plans[0]))
    assessor = judge(plans[1]).with_people(judge(replace(plans[1], mask_skip=True)))
    dataset = Dataset(folder)
    with dataset.bundles.workspace() as work:
        models: dict[NetworkName, Segmenter | Assessor] = {"segmentation": segmenter, "segqc": assessor}
        files = {kind: work / model_name(kind) for kind in models}
        for kind, model in models.items():
            model.save(files[kind])
        dataset.bundles.publish(files, SERVER, "a benchmark")
    return dataset


def submissions(count: int) -> list[Volume]:
    """Label maps that differ in a voxel, with a part cut off in two slices."""
    shape, spacing, radius = SCANS[SCAN]
    scan = phantom(shape, spacing, radius)
    labels = (scan.array > BRIGHT).astype(np.uint8)
    labels[shape[0] // 2 :, :, 24:26] = 0
    made = []
    for number in range(count):
        array = labels.copy()
        array[number, 0, 0] = 1
        made.append(Volume(array, scan.affine))
    return made


def main() -> None:
    """Measure, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "checking.json")
    parser.add_argument("--backend", default="auto", help="as in the settings (default: auto)")
    arguments = parser.parse_args()
    seconds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        dataset = make_folder(Path(name), arguments.backend)
        bundle = dataset.bundle()
        assert bundle is not None
        served, *made = submissions(2 + ROUNDS)
        with temporary_labels(served) as path:
            mask = dataset.store.save_label(NewLabel("scan", "original", "network", SERVER, bundle=bundle.number), path)
        for kind, parent in (("drawn", None), ("corrected", mask.id)):
            clock, processor = [], []
            for labels in made:
                new = NewLabel("scan", f"{kind}-labels", "annotator", ANNA, parent=parent)
                with temporary_labels(labels) as path:
                    label = dataset.store.save_label(new, path)
                started, computed = time.perf_counter(), time.process_time()
                check = check_label(dataset, label, bundle)
                clock.append(time.perf_counter() - started)
                processor.append(time.process_time() - computed)
            # the first one loads and tries
            seconds[kind] = {"clock": sorted(clock[1:]), "processor": sorted(processor[1:])}
        dataset.store.close()
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, CPU, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}",
        "scan": SCAN,
        "members": MEMBERS,
        "backend": check.assessment.backend,
        "seconds": {
            kind: {by: [round(s, 3) for s in values] for by, values in of.items()} for kind, of in seconds.items()
        },
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = Table("seconds", "least", "median", "most", title=f"{SCAN}, {MEMBERS} members, {check.assessment.backend}")
    for kind, of in seconds.items():
        for by, values in of.items():
            table.add_row(f"{kind}, {by}", *(f"{f(values):.2f}" for f in (min, statistics.median, max)))
    Console().print(table)


if __name__ == "__main__":
    main()
