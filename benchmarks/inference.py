"""How long do a mask and its assessment take? By scan size and backend, beside another checkout in the same run.

Networks of the default plan have their windows to look at, but what they answer is replaced by the truth of a phantom:
so there are masks and plausible voxels as of trained ones. Each backend, and the other checkout, has a process of its
own with one thread; they take turns at every task, and the least seconds of some rounds count: of the processor, or of
the clock on a GPU.

"assess" is of a scan that was just segmented, as whenever a new mask is assessed: where structures are possible is
known, and what was kept of the scan. "assess anywhere" is of a mask alone. "around" is the share of the seconds that is
not the network's own. "convolutions" are those of predicting alone, back to back, each in the layout that oneDNN
computes fastest. Where sixteen members of the test-time augmentation would take too long, it is four, counted fourfold.

    git worktree add ../before COMMIT
    python benchmarks/inference.py --before ../before

Scans that the result has already are left out: delete it to measure anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from segqc.networks.assessor import Assessor
from segqc.networks.card import ModelCard
from segqc.networks.plan import Spacing, Triple, plan_network
from segqc.networks.segmenter import Segmenter
from segqc.networks.unet import MeanOfNetworks, build_network
from segqc.types import Structure
from segqc.volumes import Volume

SCANS: dict[str, tuple[Triple, Spacing, float]] = {  # with the ellipsoid's radius in extents
    "hippocampus, 36 x 50 x 36": ((36, 50, 36), (1.0, 1.0, 1.0), 0.2),
    "Sunnybrook, 256 x 256 x 10": ((256, 256, 10), (1.25, 1.25, 8.0), 0.2),
    "256 x 256 x 48": ((256, 256, 48), (1.0, 1.0, 3.0), 0.2),
    "512 x 512 x 200": ((512, 512, 200), (0.7, 0.7, 2.0), 0.13),
}
BEFORE = "before"
BACKENDS = ("pytorch", "pytorch-bfloat16", "openvino", "openvino-bfloat16", "compile")
TASKS = (
    *("predict", "around predict", "assess", "around assess", "assess anywhere", "assess by three"),
    *("TTA-16", "convolutions"),
)
MEMBERS = 3
BRIGHT = 2.0  # of a normalised scan: what lies between body and ellipsoid
ENOUGH_SECONDS = 20.0  # a task that took so long in all is not repeated
TTA_SECONDS = 300.0  # what the test-time augmentation may take
GAMMAS = (0.7, 0.85, 1.2)  # with none, four contrasts of four flips
CHANNELS_LAST = torch.channels_last_3d


def phantom(shape: Triple, spacing: Spacing, radius: float) -> Volume:
    """A noisy body, an elliptic cylinder in air, with a bright ellipsoid in it."""
    axes = [(np.arange(n, dtype=np.float32) - n / 2) * s for n, s in zip(shape, spacing, strict=True)]
    extents = [n * s for n, s in zip(shape, spacing, strict=True)]
    x, y, z = axes[0][:, None, None] / extents[0], axes[1][:, None] / extents[1], axes[2] / extents[2]
    body = (x / 0.48) ** 2 + (y / 0.4) ** 2 < 1
    inside = (x**2 + y**2 + z**2) < radius**2
    array = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
    array = np.abs(array) * 0.1 + body * (array + 1 + 2 * inside)
    return Volume(array.astype(np.float32), np.diag([*spacing, 1.0]))  # as scans are read


def finding_what_is_bright(compute: Callable[[torch.Tensor], torch.Tensor], channels: int) -> nn.Module:
    """A network that takes its time, but answers that there is a structure where the scan is bright."""

    class Answers(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            started = clock()
            compute(x)
            z = 6 * (x[:, :1] - BRIGHT)
            answer = torch.cat([torch.zeros_like(z), z], dim=1) if channels == 2 else z
            _in_networks.append(clock() - started)
            return answer

    return Answers()


_in_networks: list[float] = []  # seconds of each call


def clock() -> float:
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def seconds(work: Callable[[], object]) -> float:
    started = clock()
    work()
    return clock() - started


def convolutions(network: nn.Module, patch: Triple, *, bfloat16: bool) -> float:
    """Seconds of a window's convolutions, each alone and in its fastest layout."""
    calls: list[tuple[nn.Conv3d | nn.ConvTranspose3d, torch.Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda m, inputs, _: calls.append((m, inputs[0])))
        for module in network.modules()
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d)
    ]
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    total = 0.0
    with torch.inference_mode():
        network(torch.randn(1, 1, *patch))
        for hook in hooks:
            hook.remove()
        for module, x in calls:
            works: list[Callable[[], object]] = []
            for order in ((0, 1, 2), (2, 0, 1)):
                axes = (0, 1, *(2 + axis for axis in order))
                x_, weight = (t.detach().to(dtype).permute(axes).contiguous() for t in (x, module.weight))
                stride, padding = ([int(sizes[axis]) for axis in order] for sizes in (module.stride, module.padding))
                for layout in (torch.contiguous_format, CHANNELS_LAST):
                    x_, weight = x_.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
                    works.append(_convolution(module, x_, weight, stride, padding))
            for work in works:
                work()
            total += min(seconds(work) for work in works for _ in range(3))
    return total


def _convolution(
    module: nn.Module, x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Callable[[], object]:
    if isinstance(module, nn.ConvTranspose3d):
        return lambda: nn.functional.conv_transpose3d(x, weight, None, stride, padding)
    if x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return lambda: torch.mkldnn_convolution(x, weight, None, padding, stride, [1, 1, 1], 1)
    return lambda: nn.functional.conv3d(x, weight, None, stride, padding)


def serve(name: str, backend: str) -> None:
    """Do the tasks whose names come by standard input, and answer each with a number by standard output."""
    torch.set_num_threads(1)
    shape, spacing, radius = SCANS[name]
    scan = phantom(shape, spacing, radius)

    def fresh() -> Volume:
        return Volume(scan.array, scan.affine)  # nothing that is kept of another one is of use

    structures = (Structure("ellipsoid", (1,)),)
    plans = [plan_network(spacing, shape, in_channels=n, out_channels=3 - n) for n in (1, 2)]
    networks = [build_network(plan).eval() for plan in plans]
    mean = MeanOfNetworks([build_network(plans[1], seed=seed) for seed in range(MEMBERS)]).eval()
    by = () if backend == BEFORE else (backend,)
    card = ModelCard("segqc", plans[1], structures, (1,), ())
    segmenter = Segmenter(ModelCard("segmentation", plans[0], structures, (1,), ()), networks[0], *by)
    assessor = Assessor(card, networks[1], None, *by)
    ensemble = Assessor(dataclasses.replace(card, members=MEMBERS), mean, None, *by)
    for model in (segmenter, assessor, ensemble):
        channels = model.card.plan.out_channels
        if backend == BEFORE:
            model.network = finding_what_is_bright(model.network, channels)
        else:
            model.backend = dataclasses.replace(
                model.backend, compute=finding_what_is_bright(model.backend.compute, channels)
            )
    segmented = fresh()
    prediction = segmenter.predict(segmented)
    plausible = {} if backend == BEFORE else {"plausible": prediction.plausible}
    mask = np.roll(prediction.labels.array, round(shape[0] * radius / 3), axis=0)  # wrong at two sides, and
    mask[..., shape[2] // 2] = 0  # in a slice
    labels = Volume(mask, scan.affine)
    assessed = assessor.assess(segmented, labels, scan_id="s", **plausible).assessment

    def windows() -> int:
        looked: list[int] = []
        hook = networks[0].register_forward_pre_hook(lambda _, inputs: looked.append(len(inputs[0])))
        Segmenter(segmenter.card, networks[0]).predict(fresh())
        hook.remove()
        return sum(looked)

    def around(task: str) -> float:
        _in_networks.clear()
        whole = tasks[task]()
        return (whole - sum(_in_networks)) / whole

    tasks: dict[str, Callable[[], float]] = {
        "predict": lambda: seconds(lambda: segmenter.predict(fresh())),
        "around predict": lambda: around("predict"),
        "assess": lambda: seconds(lambda: assessor.assess(segmented, labels, scan_id="s", **plausible)),
        "around assess": lambda: around("assess"),
        "assess anywhere": lambda: seconds(lambda: assessor.assess(fresh(), labels, scan_id="s")),
        "assess by three": lambda: seconds(lambda: ensemble.assess(segmented, labels, scan_id="s", **plausible)),
        "TTA-16": lambda: seconds(lambda: segmenter.predict_tta(fresh(), GAMMAS)),
        "TTA-4": lambda: seconds(lambda: segmenter.predict_tta(fresh())),
        "convolutions": lambda: convolutions(networks[0], plans[0].patch, bfloat16=backend.endswith("bfloat16")),
        "windows": lambda: float(windows()),
        "estimated Dice": lambda: assessed.dice,
        "peak GiB": lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    for line in sys.stdin:
        print(json.dumps(tasks[line.strip()]()), flush=True)


class Worker:
    """A process that serves the tasks of one scan by one backend, or by the other checkout."""

    def __init__(self, name: str, backend: str, checkout: Path) -> None:
        self.backend = backend
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", name, backend],
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self, task: str) -> float | None:
        """The task's number; None where this backend is not to be had."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(task + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        answer = self._process.stdout.readline()
        return float(json.loads(answer)) if answer else None

    def end(self) -> str:
        """End the process; what it said in the end."""
        _, errors = self._process.communicate()
        return (errors.strip().splitlines() or [""])[-1]


def measure(name: str, checkouts: Mapping[str, Path], rounds: int) -> dict[str, dict[str, float]]:
    """All numbers of one scan, by backend."""
    workers = []
    for backend, checkout in checkouts.items():
        worker = Worker(name, backend, checkout)
        if worker.ask("estimated Dice") is None:  # also waits until it is ready
            print(f"{name}, {backend}: {worker.end()}", file=sys.stderr)
        else:
            workers.append(worker)
    rows: dict[str, dict[str, float]] = {worker.backend: {} for worker in workers}
    for task in TASKS:
        spent = dict.fromkeys(rows, 0.0)
        for _ in range(rounds):
            for worker in workers:
                row = rows[worker.backend]
                if spent[worker.backend] < ENOUGH_SECONDS:
                    started = time.perf_counter()
                    few = task == "TTA-16" and 16 * row["predict"] > TTA_SECONDS
                    answer = worker.ask("TTA-4" if few else task)
                    assert answer is not None, worker.end()
                    row[task] = min(4 * answer if few else answer, row.get(task, math.inf))
                    spent[worker.backend] += time.perf_counter() - started
    for worker in workers:
        row = rows[worker.backend]
        row |= {task: worker.ask(task) or 0.0 for task in ("windows", "estimated Dice", "peak GiB")}
        row["convolutions"] *= row["windows"]
        worker.end()
    return {backend: {task: round(value, 4) for task, value in row.items()} for backend, row in rows.items()}


def ratios(rows: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """What the numbers of one scan amount to, by backend."""
    before = rows.get(BEFORE)
    result = {}
    for backend, row in rows.items():
        result[backend] = {
            "TTA-16 / assess": row["TTA-16"] / row["assess"],
            "convolutions / predict": row["convolutions"] / row["predict"],
        }
        if before is not None:
            result[backend] |= {
                "TTA-16 before / assess": before["TTA-16"] / row["assess"],
                "predict before / predict": before["predict"] / row["predict"],
                "assess before / assess": before["assess"] / row["assess"],
            }
    return {backend: {name: round(value, 2) for name, value in row.items()} for backend, row in result.items()}


def main() -> None:
    """Measure each scan, and keep the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout, to compare with")
    parser.add_argument("--scans", nargs="+", choices=list(SCANS), default=list(SCANS), metavar="SCAN")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, metavar="BACKEND")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "inference.json")
    parser.add_argument("--serve", nargs=2, metavar=("SCAN", "BACKEND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return
    checkouts = {BEFORE: arguments.before.resolve()} if arguments.before is not None else {}
    checkouts |= dict.fromkeys(arguments.backends, Path(__file__).resolve().parents[1])
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, one thread, PyTorch {torch.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "seconds": {},
        "ratios": {},
    }
    if arguments.out.is_file():
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
    for name in arguments.scans:
        if name not in result["seconds"]:
            result["seconds"][name] = measure(name, checkouts, arguments.rounds)
            result["ratios"][name] = ratios(result["seconds"][name])
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for kind in ("seconds", "ratios"):
        rows = [(scan, backend, row) for scan, of in result[kind].items() for backend, row in of.items()]
        table = Table("scan", "backend", *rows[-1][2])
        for scan, backend, row in rows:
            table.add_row(scan, backend, *(f"{value:g}" for value in row.values()))
        Console(width=160).print(table)


if __name__ == "__main__":
    main()
