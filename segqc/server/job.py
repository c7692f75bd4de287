"""The process of one job: ``python -m segqc.server.job KIND REQUEST`` runs MONAI Label's app once, without a server."""

from __future__ import annotations

import json
import logging
import sys

from segqc.loop.studies import StudiesError
from segqc.networks import ModelError
from segqc.server.errors import RequestError
from segqc.settings import SettingsError
from segqc.training import TooFewCases
from segqc.volumes import VolumeError

logger = logging.getLogger(__name__)

# What a user can mend: said in its own sentence, without the way it took through the code.
KNOWN_PROBLEMS = (ModelError, RequestError, SettingsError, StudiesError, TooFewCases, VolumeError)


def run(kind: str, request: str) -> int:
    """Run a job; the settings are in the environment.

    Args:
        kind: "train", "scoring" or "batch_infer".
        request: the request, as JSON.

    Returns:
        The exit status: 0 if it is done, 1 for a problem that a user can mend.
    """
    from monailabel.interfaces.utils.app import app_instance

    app = app_instance()
    work = {"train": app.train, "scoring": app.scoring, "batch_infer": app.batch_infer}[kind]
    try:
        result = work(json.loads(request))
    except KNOWN_PROBLEMS as error:
        logger.error("%s", error)
        return 1
    logger.info("%s", json.dumps(result, default=str))
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for noisy in ("monailabel", "ignite", "monai", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    sys.exit(run(sys.argv[1], sys.argv[2]))
