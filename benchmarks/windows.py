"""Does it pay to let windows through a network together? Seconds per window, alone and by two and four, on one thread.

python benchmarks/windows.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from segqc.networks.plan import Spacing, Triple, plan_network
from segqc.networks.unet import build_network

SCANS: dict[str, tuple[Triple, Spacing]] = {
    "36 x 50 x 36, 1 mm": ((36, 50, 36), (1.0, 1.0, 1.0)),
    "256 x 256 x 48, 1 x 1 x 3 mm": ((256, 256, 48), (1.0, 1.0, 3.0)),
    "512 x 512 x 200, 0.7 x 0.7 x 2 mm": ((512, 512, 200), (0.7, 0.7, 2.0)),
}
TOGETHER = (1, 2, 4)
ROUNDS = 7


def measure(shape: Triple, spacing: Spacing) -> dict[int, float]:
    """The least seconds per window over some rounds, by the number of windows that go together; small network."""
    plan = plan_network(spacing, shape, in_channels=2, out_channels=1)
    network: nn.Module = build_network(plan).eval()
    batches = {n: torch.zeros(n, 2, *plan.patch) for n in TOGETHER}
    least = dict.fromkeys(TOGETHER, float("inf"))
    with torch.inference_mode():
        for _ in range(ROUNDS):  # in turn, so that other work on the machine meets all alike
            for n, batch in batches.items():
                started = time.perf_counter()
                network(batch)
                least[n] = min(least[n], (time.perf_counter() - started) / n)
    return least


def main() -> None:
    """Measure windows of a small, a middling and a large scan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "windows.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("scan", *(f"{n} together" for n in TOGETHER), "alone / two")
    rows = {}
    for name, (shape, spacing) in SCANS.items():
        seconds = measure(shape, spacing)
        rows[name] = {str(n): round(s, 4) for n, s in seconds.items()}
        table.add_row(name, *(f"{s:.3f}" for s in seconds.values()), f"{seconds[1] / seconds[2]:.1f}")
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, CPU, one thread",
        "seconds per window": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console().print(table)


if __name__ == "__main__":
    main()
