"""How much memory does assessing and segmenting take on a CPU? Peak resident memory, each case in its own process.

python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from segqc.networks.assessor import Assessor
from segqc.networks.card import ModelCard
from segqc.networks.device import name_of_device
from segqc.networks.plan import NetworkSize, Spacing, Triple, plan_network
from segqc.networks.segmenter import Segmenter
from segqc.networks.unet import build_network
from segqc.types import Structure
from segqc.volumes import Volume

CASES: dict[str, tuple[str, NetworkSize, Triple, Spacing]] = {
    "assess 256 x 256 x 48, paper-sized": ("segqc", "paper", (256, 256, 48), (1.0, 1.0, 3.0)),
    "assess 256 x 256 x 48, small": ("segqc", "small", (256, 256, 48), (1.0, 1.0, 3.0)),
    "segment 512 x 512 x 200, small": ("segmentation", "small", (512, 512, 200), (0.7, 0.7, 2.0)),
    "assess 512 x 512 x 200, small": ("segqc", "small", (512, 512, 200), (0.7, 0.7, 2.0)),
}


def measure(name: str) -> None:
    """Run one case in this process and write its numbers to the standard output."""
    kind, size, shape, spacing = CASES[name]
    channels = (2, 1) if kind == "segqc" else (1, 2)
    plan = plan_network(spacing, shape, in_channels=channels[0], out_channels=channels[1], size=size)
    card = ModelCard(
        kind="segqc" if kind == "segqc" else "segmentation",
        plan=plan,
        structures=(Structure("ball", (1,)),),
        values=(1,),
        seen=(),
    )
    rng = np.random.default_rng(0)
    affine = np.diag([*spacing, 1.0])
    scan = Volume(rng.normal(size=shape).astype(np.float32), affine)
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(n // 4, n // 2) for n in shape)] = 1
    started = time.monotonic()
    if kind == "segqc":
        Assessor(card, build_network(plan)).assess(scan, Volume(labels, affine), scan_id="scan")
    else:
        Segmenter(card, build_network(plan)).predict(scan)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sys.stdout.write(json.dumps({"peak GiB": round(peak, 2), "seconds": round(time.monotonic() - started, 1)}))


def main() -> None:
    """Run all cases and write their result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="one case, in this process")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    arguments = parser.parse_args()
    if arguments.case:
        measure(arguments.case)
        return
    rows = {}
    table = Table("case", "peak GiB", "seconds")
    for name in CASES:
        command = [sys.executable, __file__, "--case", name]
        rows[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        table.add_row(name, *(str(v) for v in rows[name].values()))
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, {name_of_device()}",
        "cases": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console().print(table)


if __name__ == "__main__":
    main()
