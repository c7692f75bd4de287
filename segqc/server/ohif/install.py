"""Install a newer OHIF than MONAI Label's package carries: OHIF's own build, by npm.

What is installed is checked by a hash, without what this server has no use for, and compressed. It appears whole or not
at all.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from filelock import FileLock, Timeout

from segqc.errors import SegqcError
from segqc.server.ohif.adapt import BELOW
from segqc.server.ohif.files import COMPRESSIBLE, PACKED, compress

logger = logging.getLogger(__name__)

VERSION: Final = "3.13.2"
_PACKAGE: Final = "@ohif/app"
_SHA512: Final = "WZdxmpmG7rqFgW9ZJLcbgr3XCtLi1KDNPoMaeY5PPe6j4G4fjEjjkycZM6C6Zk2F87BKxFfpq+jd5xXZB9E8EA=="
_FORM: Final = 1  # goes up with every change of what is made of the package
_DIST: Final = PurePosixPath("package/dist")
_LICENSE: Final = PurePosixPath("package/LICENSE")
# Models and pathology, which our mode does not offer; others' start pages, configurations and sign-in; sources' maps.
_UNUSED_FOLDERS: Final = frozenset({"customizations", "dicom-microscopy-viewer", "ort"})
_UNUSED_FILES: Final = frozenset({
    "_headers", "_redirects", "app-config.js", "es6-shim.min.js", "google.js", "oidc-client.min.js", "polyfill.min.js",
    "serve.json", "silent-refresh.html", "sw.js",
})  # fmt: skip
_UNUSED_SUFFIXES: Final = frozenset({".map"})


class InstallError(SegqcError):
    """OHIF cannot be installed; says why and what to do."""


def viewer_folder() -> Path:
    """Where OHIF is installed, beside the Python packages of this environment."""
    return Path(sys.prefix) / "share" / "segqc" / f"ohif-{VERSION}-{_FORM}"


def install_viewer(target: Path | None = None) -> Path:
    """Install OHIF where it is not yet.

    Args:
        target: the folder; by default where the server looks for it.

    Returns:
        The folder.

    Raises:
        InstallError: if there is no npm, it cannot get the package, or gets another one than is expected.
    """
    target = target or viewer_folder()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / ".ohif.lock", timeout=0):
            if not target.is_dir():
                for left in target.parent.glob(".ohif-*"):  # by one that was killed
                    shutil.rmtree(left)
                with tempfile.TemporaryDirectory(prefix=".ohif-", dir=target.parent) as work:
                    made = _make(_fetch(Path(work)), Path(work) / "new")
                    os.sync()  # its files are on the disk before its name is
                    made.rename(target)
    except Timeout as error:
        raise InstallError(f"{target}: is being installed already") from error
    except OSError as error:
        raise InstallError(f"{target}: cannot be written ({error.strerror or error})") from error
    return target


def _fetch(folder: Path) -> Path:
    """Have npm put the package's archive into a folder, and check it."""
    npm = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    if npm is None:
        raise InstallError("npm is not installed, which gets OHIF; install Node.js, or pip install 'segqc[ohif]'")
    wanted = f"{_PACKAGE}@{VERSION}"
    logger.info("npm gets %s (50 MB) ...", wanted)
    ended = subprocess.run(
        [npm, "pack", wanted, "--pack-destination", str(folder), "--ignore-scripts", "--loglevel=error"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    found = next(folder.glob("*.tgz"), None)
    if ended.returncode != 0 or found is None:
        said = (ended.stderr or ended.stdout).strip().splitlines()
        raise InstallError(f"npm could not get {wanted}: {said[0] if said else 'it does not say why'}")
    if base64.b64encode(hashlib.sha512(found.read_bytes()).digest()).decode() != _SHA512:
        raise InstallError(f"{wanted}: npm got something else than what was published; nothing was installed")
    return found


def _make(archive: Path, folder: Path) -> Path:
    """Make of a package's archive the files that are served."""
    logger.info("its files are made smaller ...")
    for name, content in _members(archive):
        suffix = Path(name).suffix
        if (edit := BELOW.get(suffix)) is not None:
            content = edit(content.decode()).encode()
        if suffix in COMPRESSIBLE:
            name, content = f"{name}{PACKED}", compress(content)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of what is used of a package's archive."""
    with tarfile.open(archive) as package:
        for member in package:
            file = package.extractfile(member) if member.isfile() else None
            if file is None:
                continue
            path = PurePosixPath(member.name)
            if path == _LICENSE:
                yield path.name, file.read()
            elif path.is_relative_to(_DIST) and ".." not in path.parts and _is_used(path.relative_to(_DIST)):
                yield str(path.relative_to(_DIST)), file.read()


def _is_used(path: PurePosixPath) -> bool:
    return not (path.parts[0] in _UNUSED_FOLDERS or str(path) in _UNUSED_FILES or path.suffix in _UNUSED_SUFFIXES)
