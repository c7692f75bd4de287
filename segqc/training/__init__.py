"""Training of both networks: scan-mask pairs, folds, checkpoints that resume.

What imports PyTorch is imported from its own module: settings are read without it.
"""

from segqc.progress import LineProgress, NoProgress, Progress
from segqc.training.spec import TrainingSettings

__all__ = ["LineProgress", "NoProgress", "Progress", "TrainingSettings"]
