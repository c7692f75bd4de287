"""What MONAI Label calls to choose the next scan and to score the pool: those that `segqc.selection` has registered."""

from __future__ import annotations

from segqc.selection import scores
from segqc.selection import strategies as registered
from segqc.server.context import AppContext
from segqc.server.monailabel.strategy import PoolScoring, Sampling
from segqc.server.names import known


def sampling(context: AppContext) -> dict[str, Sampling]:
    """The default first. MONAI Label's OHIF panel always asks for "random": that name is the default, too."""
    default = known("strategy", context.settings.server.strategy, registered())
    made = {name: Sampling(name, context.dataset) for name in {default: None, **dict.fromkeys(registered())}}
    return {**made, "random": made[default]}


def scoring(context: AppContext) -> dict[str, PoolScoring]:
    """The scores of all strategies that have one."""
    return {method: PoolScoring(method, context.dataset) for method in scores()}
