"""The colours of structures and of errors, the same on every picture and page."""

from __future__ import annotations

from typing import Final

# Okabe and Ito's colours, told apart with any kind of colour vision; red stays for errors.
STRUCTURES: Final = ("#56B4E9", "#F0E442", "#009E73", "#CC79A7", "#0072B2", "#E69F00")


def structure_colour(number: int) -> str:
    """The colour of a structure, as ``#RRGGBB``, by its place among the structures."""
    return STRUCTURES[number % len(STRUCTURES)]
