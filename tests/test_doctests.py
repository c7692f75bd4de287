"""The examples in docstrings give what they show."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name", ["segqc.quality.boxes", "segqc.quality.intervals", "segqc.quality.metrics", "segqc.volumes.volume"]
)
def test_examples_in_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.attempted > 3
    assert results.failed == 0
