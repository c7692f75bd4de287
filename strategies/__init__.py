"""What MONAI Label calls to choose the next scan and to score the pool: thin over `segqc`."""

from strategies.sampling import Sampling
from strategies.scoring import PoolScoring

__all__ = ["PoolScoring", "Sampling"]
