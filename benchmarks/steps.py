"""What mixed precision saves: seconds per training step in float32 and in bfloat16, on a GPU or one thread of a CPU.

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

from segqc.networks.device import device_of_choice, has_bfloat16, name_of_device
from segqc.networks.plan import NetworkSize, Spacing, Triple, plan_network
from segqc.training import NoProgress, TrainingSettings
from segqc.training.assessor_network import assessor_job
from segqc.training.cases import Example
from segqc.training.engine import Job, fit
from segqc.types import Structure

SMALL_SCAN: tuple[Triple, Spacing] = ((36, 50, 36), (1.0, 1.0, 1.0))
MIDDLING_SCAN: tuple[Triple, Spacing] = ((256, 256, 48), (1.0, 1.0, 3.0))
STEPS = 12
PRECISIONS = {"float32": False, "bfloat16": True}


def training(shape: Triple, spacing: Spacing, size: NetworkSize, *, mixed: bool) -> Job:
    """SegQC-Net's training on one scan of noise with a block to find: its speed is that of any scan of this size."""
    plan = plan_network(spacing, shape, in_channels=2, out_channels=1, size=size)
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
        def step(self, done: int, total: int, task: str, detail: str = "", *, unit: str = "scans") -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        fit(job, Path(folder), Clock())
    return (times[-1] - times[STEPS]) / (STEPS - 1)


def main() -> None:
    """Measure patches of a small and of a middling scan."""
    device = device_of_choice()
    gpu = device.type == "cuda"
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results / ("steps-gpu.json" if gpu else "steps.json"))
    parser.add_argument("--rounds", type=int, default=3, help="the least of so many is taken")
    arguments = parser.parse_args()
    if not has_bfloat16(device):
        raise SystemExit("no instructions for bfloat16 here (on CPUs AVX-512 BF16): trainings compute in float32")
    torch.set_num_threads(1)
    # a CPU would take minutes for a step of the larger networks
    sizes: tuple[NetworkSize, ...] = ("small", "medium", "paper") if gpu else ("small",)
    what = [("small", *SMALL_SCAN), *((size, *MIDDLING_SCAN) for size in sizes)]
    computes = name_of_device() if gpu else "CPU, one thread"
    machine = f"{platform.machine()}, {platform.system()}, {computes}, PyTorch {torch.__version__}"
    table = Table("network, scan", *PRECISIONS, "float32 / bfloat16")
    rows = {}
    for size, shape, spacing in what:
        name = f"{size}, {' x '.join(map(str, shape))}, {' x '.join(f'{s:g}' for s in spacing)} mm"
        least = dict.fromkeys(PRECISIONS, float("inf"))
        for _ in range(arguments.rounds):  # in turn, so that other work on the machine meets all alike
            for precision, mixed in PRECISIONS.items():
                job = training(shape, spacing, size, mixed=mixed)
                least[precision] = min(least[precision], seconds(job))
        rows[name] = {precision: round(found, 4) for precision, found in least.items()}
        ratio = least["float32"] / least["bfloat16"]
        table.add_row(name, *(f"{found:.3f}" for found in least.values()), f"{ratio:.2f}")
        result = {"date": datetime.date.today().isoformat(), "machine": machine, "seconds per step": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")  # of a run that is cut off, too
    Console().print(table)


if __name__ == "__main__":
    main()
