"""Which OHIF is served, with our configuration and extension in it, and what its page may do."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlencode

from segqc.server.dicomweb.series import DicomScan
from segqc.server.monailabel.stock import STATIC
from segqc.server.ohif.adapt import INSIDE
from segqc.server.ohif.files import Asset, Edit, assets
from segqc.server.ohif.install import viewer_folder

INDEX: Final = "index.html"
CONFIG: Final = "app-config.js"
EXTENSION: Final = "extension"
_OWN: Final = Path(__file__).parent
_INLINE_SCRIPT: Final = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def viewer_address(scan: DicomScan) -> str:
    """Where the viewer shows a scan."""
    return f"/ohif/segqc?{urlencode({'StudyInstanceUIDs': scan.study_uid, 'SeriesInstanceUIDs': scan.series_uid})}"


@dataclass(frozen=True, slots=True)
class Viewer:
    """An OHIF.

    Attributes:
        files: its files and ours, by name.
        policy: its content security policy: what the page may load, and where from.
    """

    files: Mapping[str, Asset]
    policy: str


def find_viewer() -> Viewer | None:
    """The OHIF that ``segqc ohif`` has installed, else MONAI Label's own; None where there is neither."""
    return installed_viewer() or bundled_viewer()


def installed_viewer() -> Viewer | None:
    """The OHIF that ``segqc ohif`` has installed."""
    return _viewer(viewer_folder())


def bundled_viewer() -> Viewer | None:
    """The OHIF that MONAI Label's package carries."""
    return _viewer(STATIC / "ohif", INSIDE)


def _viewer(folder: Path, edits: Mapping[str, Edit] | None = None) -> Viewer | None:
    found = assets(folder, edits)
    if INDEX not in found:
        return None
    own = {f"{EXTENSION}/{name}": asset for name, asset in assets(_OWN / EXTENSION).items()}
    return Viewer({**found, **own, CONFIG: Asset(CONFIG, _OWN / CONFIG)}, _policy(found[INDEX].content().decode()))


def _policy(page: str) -> str:
    """Everything from this server, and made in the page itself: pictures, workers, styles, and WebAssembly.

    Of scripts in the page, those that are in it now.
    """
    inline = " ".join(f"'sha256-{_hash(script)}'" for script in _INLINE_SCRIPT.findall(page))
    rules = {
        "default-src": "'self'",
        "script-src": f"'self' 'wasm-unsafe-eval' {inline}",
        "worker-src": "'self' blob:",
        "connect-src": "'self' blob: data:",
        "img-src": "'self' blob: data:",
        "font-src": "'self' data:",
        "style-src": "'self' 'unsafe-inline'",
        "object-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'self'",
        "frame-ancestors": "'self'",
    }
    return "; ".join(f"{name} {sources}" for name, sources in rules.items())


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
