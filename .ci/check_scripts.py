"""Check the scripts of viewer and pages: that they parse, and, where npm can get the checker, that their types fit.

The parser is the machine's Node.js or the one that Playwright's package carries, so that nothing else has to be
installed. TypeScript reads the types in the scripts' comments; it makes nothing of them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = ROOT / "segqc" / "server"
SCRIPTS = {SERVER / "ohif": "extension", SERVER / "pages": "static"}
"""Folders with a ``jsconfig.json``, and where below each its scripts are."""
TYPESCRIPT = "typescript@5.9.3"


def node() -> str | None:
    """A Node.js; None where there is none."""
    found = shutil.which("node")
    if found is not None:
        return found
    try:
        from playwright._impl._driver import compute_driver_executable
    except ImportError:
        return None
    return str(compute_driver_executable()[0])


def main() -> int:
    """Check; returns the exit status."""
    program = node()
    if program is None:
        print("the scripts are not checked: there is no Node.js, and Playwright is not installed")
        return 0
    for script in sorted(path for room, below in SCRIPTS.items() for path in (room / below).glob("*.js")):
        # as a module, which the suffix does not say
        command = [program, "--check", "--input-type=module", "-"]
        if subprocess.run(command, input=script.read_bytes()).returncode:
            print(f"{script.relative_to(ROOT)}: cannot be parsed")
            return 1
    npm = shutil.which("npm")
    if npm is None:
        print("the scripts parse; their types are not checked, as there is no npm")
        return 0
    for room in SCRIPTS:
        command = [npm, "exec", "--yes", "--ignore-scripts", f"--package={TYPESCRIPT}", "--", "tsc", "-p"]
        if subprocess.run([*command, str(room / "jsconfig.json")], cwd=ROOT).returncode:
            print(f"{room.relative_to(ROOT)}: the types of the scripts do not fit")
            return 1
    print("the scripts parse, and their types fit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
