"""Which scan comes next: one file a strategy, and the registry of them all."""

from segqc.selection.registry import score_of, scores, strategies
from segqc.selection.strategy import Score, ScoreFunction, Strategy, StrategyError

__all__ = ["Score", "ScoreFunction", "Strategy", "StrategyError", "score_of", "scores", "strategies"]
