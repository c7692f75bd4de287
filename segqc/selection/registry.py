"""All strategies: the project's own, and those that installed packages register as entry points."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Final

from segqc.selection import (
    class_stratified,
    cold_start,
    ensemble,
    entropy,
    expected_gain,
    expected_gain_diverse,
    foreground_random,
    segqc,
    segqc_diverse,
    sequential,
    tta,
    uniform_random,
    unlikeness,
)
from segqc.selection.strategy import Score, Strategy, StrategyError

ENTRY_POINTS: Final = "segqc.strategies"
_BUILT_IN: Final = (
    segqc.STRATEGY,
    segqc_diverse.STRATEGY,
    expected_gain.STRATEGY,
    expected_gain_diverse.STRATEGY,
    tta.STRATEGY,
    entropy.STRATEGY,
    ensemble.STRATEGY,
    class_stratified.STRATEGY,
    unlikeness.STRATEGY,
    cold_start.STRATEGY,
    foreground_random.STRATEGY,
    sequential.STRATEGY,
    uniform_random.STRATEGY,
)
_RESERVED: Final = "random"  # MONAI Label's name for the default


@functools.cache
def strategies() -> Mapping[str, Strategy]:
    """All strategies by name, the project's own first.

    Raises:
        StrategyError: if an entry point cannot be loaded, is no `Strategy`, or takes a name that is in use.
    """
    found = {strategy.name: strategy for strategy in _BUILT_IN}
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        origin = f"the entry point {entry.name!r} ({entry.value}) in the group {ENTRY_POINTS!r}"
        try:
            strategy = entry.load()
        except Exception as error:  # whatever a foreign module raises
            raise StrategyError(f"{origin} cannot be loaded: {error}") from error
        if not isinstance(strategy, Strategy):
            raise StrategyError(f"{origin} is no segqc.selection.Strategy, but a {type(strategy).__name__}.")
        if strategy.name in found or strategy.name == _RESERVED:
            raise StrategyError(f"{origin} has the name {strategy.name!r}, which is in use; choose another one.")
        found[strategy.name] = strategy
    return MappingProxyType(found)


def scores() -> Mapping[str, Score]:
    """The scores by the names of their strategies.

    Raises:
        StrategyError: see `strategies`.
    """
    return {name: strategy.score for name, strategy in strategies().items() if strategy.score is not None}


def score_of(name: str) -> Score:
    """The score of a strategy.

    Raises:
        StrategyError: if there is no such strategy, or it has none.
    """
    known = scores()
    if name not in known:
        raise StrategyError(f"there is no scoring method {name!r}; there are {', '.join(known)}.")
    return known[name]
