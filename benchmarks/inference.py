"""How long do a mask and its assessment take? Processor seconds per backend and scan size, on one thread.

Networks of the default plan, taught for some steps to find a bright ball, so that there are masks and plausible voxels
as of a trained network. "convolutions alone" runs each convolution of the windows that were looked at, back to back, by
PyTorch in float32: their share of the time of predicting is what the rest leaves to them.

    python benchmarks/inference.py
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from segqc.networks.assessor import Assessor
from segqc.networks.backends import BackendError
from segqc.networks.card import ModelCard, NetworkName
from segqc.networks.inference import all_windows, canonical_scan, not_air, windows_near
from segqc.networks.plan import NetworkPlan, Spacing, Triple, plan_network
from segqc.networks.segmenter import Segmenter
from segqc.networks.unet import MeanOfNetworks, build_network
from segqc.types import BackendName, Structure
from segqc.volumes import Volume

SCANS: dict[str, tuple[Triple, Spacing]] = {
    "hippocampus, 36 x 50 x 36": ((36, 50, 36), (1.0, 1.0, 1.0)),
    "Sunnybrook, 256 x 256 x 10": ((256, 256, 10), (1.25, 1.25, 8.0)),
    "256 x 256 x 48": ((256, 256, 48), (1.0, 1.0, 3.0)),
    "512 x 512 x 200": ((512, 512, 200), (0.7, 0.7, 2.0)),
}
BACKENDS: tuple[BackendName, ...] = ("pytorch", "pytorch-bfloat16", "openvino", "openvino-bfloat16")
STEPS = 25
MEMBERS = 3


def ball(shape: Triple, spacing: Spacing) -> tuple[Volume, Volume]:
    """A noisy body with a bright ball in it, and the ball's mask."""
    axes = [(np.arange(n, dtype=np.float32) - n / 2) * s for n, s in zip(shape, spacing, strict=True)]
    radius = np.sqrt(axes[0][:, None, None] ** 2 + axes[1][:, None] ** 2 + axes[2] ** 2)
    extent = min(n * s for n, s in zip(shape, spacing, strict=True))
    array = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
    array += (radius < 2 * extent).astype(np.float32) + 2 * (radius < 0.25 * extent)
    affine = np.diag([*spacing, 1.0])
    return Volume(array, affine), Volume((radius < 0.25 * extent).astype(np.uint8), affine)


def taught(kind: NetworkName, plan: NetworkPlan) -> nn.Module:
    """A network that has learned, in a few steps, to find what is bright."""
    network = build_network(plan).train()
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    rng = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        place = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in plan.patch), indexing="ij"))
        centre = torch.rand(3, 1, 1, 1, generator=rng) - 0.5
        truth = ((place - centre).norm(dim=0) < 0.4).float()
        image = 3 * truth + 0.3 * torch.randn(plan.patch, generator=rng)
        x = torch.stack([image, truth][: plan.in_channels])[None]
        z = network(x)
        if kind == "segmentation":
            loss = nn.functional.cross_entropy(z, truth[None].long())
        else:
            loss = nn.functional.binary_cross_entropy_with_logits(z[0, 0], truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval()


def card(kind: NetworkName, plan: NetworkPlan, members: int = 1) -> ModelCard:
    return ModelCard(kind, plan, (Structure("ball", (1,)),), (1,), (), members=members)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The least processor seconds of some repeats."""
    least = math.inf
    for _ in range(repeats):
        started = time.process_time()
        work()
        least = min(least, time.process_time() - started)
    return least


def convolutions(network: nn.Module, x: torch.Tensor, repeats: int) -> float:
    """Processor seconds of the network's convolutions alone on a window, by PyTorch."""
    calls: list[tuple[nn.Module, torch.Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda m, inputs, _: calls.append((m, inputs[0])))
        for module in network.modules()
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d)
    ]
    with torch.inference_mode():
        network(x)
        for hook in hooks:
            hook.remove()
        return seconds(lambda: [module(inputs) for module, inputs in calls], repeats)


def measure(name: str, backend: BackendName, repeats: int) -> dict[str, float]:
    """All numbers of one scan by one backend, in this process."""
    torch.set_num_threads(1)
    shape, spacing = SCANS[name]
    scan, labels = ball(shape, spacing)

    def fresh() -> Volume:
        return Volume(scan.array, scan.affine)  # nothing that is kept of another one is of use

    plans = [plan_network(spacing, shape, in_channels=n, out_channels=3 - n) for n in (1, 2)]
    segmenting, judging = taught("segmentation", plans[0]), taught("segqc", plans[1])
    segmenter = Segmenter(card("segmentation", plans[0]), segmenting, backend)
    assessor = Assessor(card("segqc", plans[1]), judging, None, backend)
    mean = MeanOfNetworks([copy.deepcopy(judging) for _ in range(MEMBERS)])
    ensemble = Assessor(card("segqc", plans[1], MEMBERS), mean, None, backend)
    prediction = segmenter.predict(scan)
    gammas = (0.7, 0.85, 1.2)  # four flips, four contrasts
    row = {
        "predict": seconds(lambda: segmenter.predict(fresh()), repeats),
        "assess": seconds(lambda: assessor.assess(fresh(), prediction.labels, scan_id="s"), repeats),
        "assess near": seconds(
            lambda: assessor.assess(fresh(), prediction.labels, scan_id="s", plausible=prediction.plausible), repeats
        ),
        "assess by three": seconds(lambda: ensemble.assess(fresh(), prediction.labels, scan_id="s"), repeats),
        "TTA-16": seconds(lambda: segmenter.predict_tta(fresh(), gammas), max(1, repeats // 3)),
    }
    window = torch.randn(1, 1, *plans[0].patch)
    if backend == "pytorch":
        frame = segmenter.frame(scan)
        image = canonical_scan(scan, frame)
        windows = windows_near(all_windows(image.shape, plans[0].patch), not_air(image))
        row["convolutions alone"] = convolutions(segmenting, window, repeats) * len(windows)
    row["dice"] = assessor.map_metrics(scan, labels)[0].dice or 0.0
    row["peak GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return row


def main() -> None:
    """Measure each scan and backend in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=2, metavar=("SCAN", "BACKEND"), help="one case, in this process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "inference.json")
    arguments = parser.parse_args()
    if arguments.case:
        name, backend = arguments.case
        try:
            row = {key: round(value, 3) for key, value in measure(name, backend, arguments.repeats).items()}
        except BackendError as error:
            raise SystemExit(str(error)) from error
        sys.stdout.write(json.dumps(row))
        return
    rows: dict[str, dict[str, float]] = {}
    for name in SCANS:
        for backend in BACKENDS:
            command = [sys.executable, __file__, "--repeats", str(arguments.repeats), "--case", name, backend]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                rows[f"{name}, {backend}"] = json.loads(done.stdout)
            result = {
                "date": datetime.date.today().isoformat(),
                "machine": f"{platform.machine()}, {platform.system()}, CPU, one thread, PyTorch {torch.__version__}",
                "processor seconds": rows,
            }
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")  # of a run cut off, too
    table = Table("scan, backend", *next(iter(rows.values())))
    for name, row in rows.items():
        table.add_row(name, *(f"{value:g}" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
