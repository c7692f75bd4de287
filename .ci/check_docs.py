"""Run the blocks of the README and the docs that are marked as checked, on few scans and steps; fail where one fails.

A marked block follows a line ``<!-- checked -->``. Python blocks run one by one, in a folder that holds a copy of the
sample scans. The shell blocks of a page run one after the other in an empty folder; those of a page that names
SEGQC_DATA, on the real data there. ``segqc serve`` runs beside the commands after it until the end of the page.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

SHORT = {
    "SEGQC_TRAINING__EPOCHS": "2",
    "SEGQC_TRAINING__FOLD_EPOCHS": "2",
    "SEGQC_TRAINING__STEPS_PER_EPOCH": "2",
    "SEGQC_TRAINING__GAMMAS": "[]",
}
FEW_SCANS = {"--labelled 30": "--labelled 8", "--unlabelled 50": "--unlabelled 6"}
PATIENCE_SECONDS = 180.0
SERVE = "segqc serve"
USUAL_ADDRESS = "127.0.0.1:8000"
SAMPLES = Path(__file__).parents[1] / "sample-datastore"


def checked_blocks(text: str, language: str) -> list[str]:
    """All marked blocks of a language, in order."""
    return re.findall(rf"<!-- checked -->\n```{language}\n(.*?)```", text, flags=re.DOTALL)


def checked_scripts(text: str) -> list[str]:
    """What all marked shell blocks of a page do, in order: each server by itself, and what lies between them."""
    text = "".join(checked_blocks(text, "sh"))
    for many, few in FEW_SCANS.items():
        text = text.replace(many, few)
    lines = [line for line in map(str.strip, text.replace("\\\n", " ").splitlines()) if line and line[0] != "#"]
    by_itself = itertools.groupby(lines, lambda line: line if line.startswith(SERVE) else "")
    return ["\n".join(group) for _, group in by_itself]


def run_python(block: str) -> None:
    """Run a Python block beside a copy of the sample scans; end the check where it fails."""
    print("$ python: " + block.strip().splitlines()[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(SAMPLES, Path(folder) / SAMPLES.name)
        code = subprocess.run([sys.executable, "-c", block], cwd=folder, check=False).returncode
    if code:
        sys.exit(f"check_docs: exit code {code} from this block:\n{block}")


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_it_answers(url: str, server: subprocess.Popen[bytes]) -> None:
    """Return when the server answers; end the check where it does not."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/info/", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    sys.exit(f"check_docs: the server did not answer at {url} within {PATIENCE_SECONDS:.0f} s")


def run_shell(page: str) -> None:
    """Run what the marked shell blocks of a page do; end the check where it fails."""
    port = str(free_port())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **SHORT, "PATH": path, "SEGQC_SERVER__PORT": port}
    servers: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for script in checked_scripts(page):
                print(f"$ {script}", flush=True)
                start = time.monotonic()
                if script.startswith(SERVE):
                    servers.append(subprocess.Popen(["bash", "-c", f"exec {script}"], cwd=folder, env=environment))
                    wait_until_it_answers(f"http://127.0.0.1:{port}", servers[-1])
                else:
                    script = script.replace(USUAL_ADDRESS, f"127.0.0.1:{port}")
                    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, check=True)
                print(f"  ({time.monotonic() - start:.1f} s)", flush=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"check_docs: exit code {error.returncode} from: {error.cmd[-1]}")
        finally:
            for server in servers:
                server.terminate()
                server.wait(timeout=30)


def main() -> None:
    """Run the marked blocks of the files given as arguments."""
    pages = {name: Path(name).read_text(encoding="utf-8") for name in sys.argv[1:]}
    scripts = [script for page in pages.values() for script in checked_blocks(page, "python")]
    shell = {name: page for name, page in pages.items() if checked_blocks(page, "sh")}
    if not (scripts and shell):
        sys.exit("check_docs: no Python block, or no shell block, is marked as checked")
    for script in scripts:
        run_python(script)
    for name, page in shell.items():
        if "SEGQC_DATA" in "".join(checked_blocks(page, "sh")) and not os.environ.get("SEGQC_DATA"):
            print(f"check_docs: the shell blocks of {name} are skipped, SEGQC_DATA names no folder of real data sets")
        else:
            run_shell(page)


if __name__ == "__main__":
    main()
