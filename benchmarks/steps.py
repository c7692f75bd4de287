"""What mixed precision saves: seconds per training step in float32 and in bfloat16, small network, on one thread.

python benchmarks/steps.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from segqc.networks import Spacing, Triple, plan_network
from segqc.training import NoProgress, TrainingSettings
from segqc.training.assessor import assessor_job
from segqc.training.cases import Example
from segqc.training.fit import Job, cpu_has_bfloat16, fit
from segqc.types import Structure

SCANS: dict[str, tuple[Triple, Spacing]] = {
    "36 x 50 x 36, 1 mm": ((36, 50, 36), (1.0, 1.0, 1.0)),
    "256 x 256 x 48, 1 x 1 x 3 mm": ((256, 256, 48), (1.0, 1.0, 3.0)),
}
STEPS = 10
ROUNDS = 3


def training(shape: Triple, spacing: Spacing, *, mixed: bool) -> Job:
    """SegQC-Net's training on one scan of noise with a block to find: its speed is that of any scan of this size."""
    plan = plan_network(spacing, shape, in_channels=2, out_channels=1)
    truth = np.zeros(plan.patch, np.uint8)
    truth[tuple(slice(n // 4, n // 2) for n in plan.patch)] = 1
    image = np.random.default_rng(0).normal(size=plan.patch).astype(np.float32)
    example = Example("noise", image, truth, truth)
    settings = TrainingSettings(epochs=2, steps_per_epoch=STEPS, mixed_precision=mixed)
    return assessor_job("steps", plan, [example], [], [Structure("block", (1,))], settings)


def seconds(job: Job) -> float:
    """Of a step, augmentation included, in the second of two epochs."""
    times = []

    class Clock(NoProgress):
        def step(self, done: int, of: int, what: str) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        fit(job, Path(folder), Clock())
    return (times[-1] - times[STEPS]) / (STEPS - 1)


def main() -> None:
    """Measure patches of a small and of a middling scan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "steps.json")
    arguments = parser.parse_args()
    if not cpu_has_bfloat16():
        raise SystemExit("this CPU has no instructions for bfloat16 (AVX-512 BF16): trainings compute in float32")
    torch.set_num_threads(1)
    table = Table("scan", "float32", "bfloat16", "float32 / bfloat16")
    rows = {}
    for name, (shape, spacing) in SCANS.items():
        jobs = {mixed: training(shape, spacing, mixed=mixed) for mixed in (False, True)}
        least = dict.fromkeys(jobs, float("inf"))
        for _ in range(ROUNDS):  # in turn, so that other work on the machine meets both alike
            for mixed, job in jobs.items():
                least[mixed] = min(least[mixed], seconds(job))
        rows[name] = {"float32": round(least[False], 4), "bfloat16": round(least[True], 4)}
        table.add_row(name, f"{least[False]:.3f}", f"{least[True]:.3f}", f"{least[False] / least[True]:.2f}")
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, CPU, one thread",
        "seconds per step": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
