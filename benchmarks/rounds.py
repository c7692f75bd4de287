"""A round on real scans: how long it takes, and whether one that was killed ends as an undisturbed one.

    python benchmarks/rounds.py time --data $SEGQC_DATA/msd-hippocampus --work /tmp/rounds
    python benchmarks/rounds.py kills --data $SEGQC_DATA/msd-hippocampus --work /tmp/rounds

``time`` is of `segqc round` at its default settings, on 60 scans, half of them labelled. ``kills`` does a short round,
labels some scans more, and measures the next round, in which accepted pseudo-labels train: at each instant of a seeded
draw, in a copy of the folder, the command and all its processes are killed (SIGKILL), the round goes on, and its
networks, estimates and pseudo-labels are compared with those of an undisturbed one. A round that has ended before its
instant is no kill: another instant is drawn. Kills of other seeds are kept beside those that the result holds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from segqc.loop.dataset import Dataset
from segqc.loop.prepare import prepare
from segqc.networks.device import name_of_device
from segqc.store import pseudo_labels
from segqc.volumes import atomic_write

RESULTS = Path(__file__).parent / "results"
MORE = 3
STRUCTURES = {"anterior": (1,), "posterior": (2,)}
SHORT = """
[training]
epochs = 4
fold_epochs = 3
people_epochs = 3
steps_per_epoch = 5
folds = 3
[pseudo_labels]
mode = "top"
min_dice = 0.0
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round has published and chosen: versions of the networks, estimates, and hashes of the pseudo-labels."""

    networks: Mapping[str, str]
    estimates: Mapping[str, float | None]
    pseudo_labels: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class Timed:
    """A round at the default settings."""

    labelled: int
    waiting: int
    minutes: float
    minutes_of_processor: float


@dataclass(frozen=True, slots=True)
class Kill:
    """A round that was killed after so many seconds, and then continued."""

    seconds: float
    is_same: bool


def begin(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start `segqc round` in a session of its own."""
    with log.open("ab") as stream:
        command = [sys.executable, "-m", "segqc", "round", str(folder)]
        return subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)


def finish(folder: Path, log: Path) -> None:
    """Do a round, or what is left of it."""
    if begin(folder, log).wait():
        raise SystemExit(f"the round failed; see {log}")


def outcome_of(folder: Path) -> Outcome:
    """What serves and waits in a folder now."""
    dataset = Dataset(folder)
    bundle = dataset.bundle()
    assert bundle is not None
    with dataset.store.read() as transaction:
        accepted = {record.label.scan: record.label.sha256 for record in pseudo_labels.listing(transaction)}
    estimates = {name: assessment.dice for name, assessment in dataset.assessments().items()}
    dataset.store.close()
    return Outcome({name: entry.version for name, entry in bundle.manifest.networks.items()}, estimates, accepted)


def timed(data: Path, work: Path) -> Timed:
    """Measure a round on 60 scans."""
    folder = work / "time"
    shutil.rmtree(folder, ignore_errors=True)
    prepare(data, folder, labelled=30, unlabelled=30, structures=STRUCTURES, split="train")
    begun, before = time.monotonic(), os.times()
    finish(folder, work / "time.log")
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return Timed(30, 30, round((time.monotonic() - begun) / 60, 2), round(processor / 60, 2))


def killed(data: Path, work: Path, instants: int, seed: int) -> list[Kill]:
    """Kill a short round at drawn instants, each in a copy of its own."""
    first = work / "kills"
    shutil.rmtree(first, ignore_errors=True)
    prepare(data, first, labelled=12, unlabelled=10, structures=STRUCTURES, split="train")
    with (first / "segqc.toml").open("a", encoding="utf-8") as settings:
        settings.write(SHORT)
    finish(first, work / "kills.log")
    for truth in sorted((first / "truth").iterdir())[:MORE]:
        shutil.copy(truth, first / "labels" / "final")
    undisturbed = work / "undisturbed"
    shutil.rmtree(undisturbed, ignore_errors=True)
    shutil.copytree(first, undisturbed)
    begun = time.monotonic()
    finish(undisturbed, work / "kills.log")
    length, wanted = time.monotonic() - begun, outcome_of(undisturbed)
    rng = np.random.default_rng(seed)
    left = sorted(rng.uniform(0, length, instants).tolist())
    found: list[Kill] = []
    while left:
        instant, folder = left.pop(0), work / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(first, folder)
        begun, command = time.monotonic(), begin(folder, work / "kills.log")
        try:
            command.wait(instant)
        except subprocess.TimeoutExpired:
            os.killpg(command.pid, signal.SIGKILL)
            command.wait()
        else:  # the machine is faster than it was
            length = min(length, time.monotonic() - begun)
            left.append(rng.uniform(0, length))
            continue
        finish(folder, work / "kills.log")
        found.append(Kill(round(instant, 2), outcome_of(folder) == wanted))
        Console().print(found[-1])
    return found


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "kills"))
    parser.add_argument("--data", type=Path, required=True, help="the data set's folder")
    parser.add_argument("--work", type=Path, required=True, help="for dataset folders")
    parser.add_argument("--instants", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"rounds-{arguments.what}.json"
    run: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{name_of_device()}, {platform.machine()}, {os.cpu_count()} cores",
        "load before": round(os.getloadavg()[0], 1),
    }
    kept: list[dict[str, object]] = []
    if arguments.what == "time":
        run["round"] = asdict(timed(arguments.data, arguments.work))
    else:
        found = killed(arguments.data, arguments.work, arguments.instants, arguments.seed)
        run |= {"seed": arguments.seed, "kills": [asdict(kill) for kill in found]}
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    with atomic_write(path) as temporary:
        runs = [*(other for other in kept if other["seed"] != arguments.seed), run]
        temporary.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    Console().print(run)


if __name__ == "__main__":
    main()
