"""Which OHIF is served, with our configuration and extension in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from segqc.server.monailabel.stock import STATIC
from segqc.server.ohif.files import Asset, assets

INDEX: Final = "index.html"
CONFIG: Final = "app-config.js"
EXTENSION: Final = "extension"
_OWN: Final = Path(__file__).parent
_OUTSIDE: Final = re.compile(r"""<link\b[^>]*\bhref=["']?https?:[^>]*>""")


@dataclass(frozen=True, slots=True)
class Viewer:
    """An OHIF.

    Attributes:
        files: its files and ours, by name.
        index: its page.
    """

    files: Mapping[str, Asset]
    index: str


def bundled_viewer() -> Viewer | None:
    """The OHIF that MONAI Label's package carries; None where it carries none."""
    return _viewer(STATIC / "ohif")


def _viewer(folder: Path) -> Viewer | None:
    found = assets(folder)
    if INDEX not in found:
        return None
    index = _OUTSIDE.sub("", found[INDEX].plain().decode())
    own = {f"{EXTENSION}/{name}": asset for name, asset in assets(_OWN / EXTENSION).items()}
    return Viewer({**found, **own, CONFIG: Asset(CONFIG, _OWN / CONFIG)}, index)
