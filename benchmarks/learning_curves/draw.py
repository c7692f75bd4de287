"""Draw the learning curves of a committed study anew: of the masks of the test scans, and of the pool's labels.

python benchmarks/learning_curves/draw.py hippocampus
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from segqc.evaluation.simulation.results import read_units, result_of
from segqc.volumes import atomic_write

RESULTS: Final = Path(__file__).resolve().parents[1] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="learning-curves-STUDY.json is drawn")
    study = parser.parse_args().study
    for figure in result_of(read_units(RESULTS / f"learning-curves-{study}.json")).figures:
        with atomic_write(RESULTS / f"{figure.name}-{study}.{figure.suffix}") as temporary:
            temporary.write_text(str(figure.image), encoding="utf-8")


if __name__ == "__main__":
    main()
