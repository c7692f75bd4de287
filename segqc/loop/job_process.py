"""The process of one job, started by its worker: ``python -m segqc.loop.job_process FOLDER JOB WORKER [CONFIG]``."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

from segqc.processes import die_with_parent, exit_by_signals

if __name__ == "__main__":
    # before the slow imports: a worker that dies meanwhile would leave an orphan
    die_with_parent(signal.SIGKILL, int(sys.argv[3]))
    exit_by_signals()
    from segqc.loop.worker import run_job
    from segqc.text import LineFormatter

    lines = logging.StreamHandler(sys.stdout)
    lines.setFormatter(LineFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[lines])
    for noisy in ("monai", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("ignite").setLevel(logging.CRITICAL)  # it logs each exception that passes through a training
    sys.exit(run_job(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[4]) if len(sys.argv) > 4 else None))
