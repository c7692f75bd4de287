"""Start the server on one dataset folder, with defaults that are safe on a workstation."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import logging.handlers
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from segqc.errors import SegqcError
from segqc.loop.dataset import Dataset
from segqc.pacs.errors import PacsUnavailable
from segqc.processes import ending_signals, ignore_ending_signals
from segqc.settings import is_loopback
from segqc.store import scans, users
from segqc.text import LineFormatter

if TYPE_CHECKING:
    import uvicorn
    from filelock import BaseFileLock

    from segqc.server.guard import Traffic

logger = logging.getLogger(__name__)

# MONAI Label's settings: all that downloads, watches or queues by itself is off.
_DEFAULTS = {
    "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
    "MONAI_LABEL_TRACKING_ENABLED": "false",
    "MONAI_LABEL_INFER_CONCURRENCY": "-1",
}
_OPEN_FILES = 65_536
_LOG_BYTES = 5_000_000
# After SIGTERM: requests may end, then what still runs is cut off, and the process is gone after the last deadline.
_REQUEST_GRACE_SECONDS = 8
_WORKER_GRACE_SECONDS = 13.0
_DEADLINE_SECONDS = 16.0
_WORKER_PAUSE_SECONDS = 5.0
_ONE_WISH_SECONDS = 1.0
_LAST_SECONDS = 2
_IN_ORDER, _AT_ONCE = b"\0", b"\1"


class ServeError(SegqcError):
    """The server cannot be started; says why and what to do."""


def default_app_dir() -> Path:
    """The MONAI Label app of this project: inside the installed package, or in the checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "_apps" / "segqc_al", package.parent / "apps" / "segqc_al"):
        if (candidate / "main.py").is_file():
            return candidate
    raise ServeError(f"{package}: the app segqc_al is neither in the package nor beside it; install segqc again")


def serve(
    dataset: Path,
    *,
    app_dir: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    bootstrap: bool = True,
    inference_slots: int = 1,
    upload_limit_mb: float = 2048,
    upload_total_mb: float = 4096,
    upload_pause_seconds: float = 30,
    allowed_hosts: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    sign_in: bool | None = None,
    worker: bool = True,
) -> None:
    """Serve a dataset folder until the process is told to end.

    Args:
        dataset: a folder of scans (.nii, .nii.gz, .nrrd); labels lie below it, and what the server keeps.
        app_dir: another MONAI Label app to serve; this project's by default.
        host: the address to listen on; only this machine's own by default.
        port: the port.
        bootstrap: whether to train first networks where there are none and enough scans are labelled.
        inference_slots: how many inferences run at once; others wait.
        upload_limit_mb: the largest request that is taken, in megabytes.
        upload_total_mb: the most that is received at once, by all requests together, in megabytes.
        upload_pause_seconds: for how long a client may send nothing before its request is complete.
        allowed_hosts: names by which clients may ask for the server, beside this machine's own.
        allowed_origins: origins of other pages that may read from and submit to the server.
        sign_in: whether users sign in; None as the settings say: by default they do, but not on this machine only.
        worker: whether to start a worker beside the server; without one, jobs wait for ``segqc worker``.

    Raises:
        ServeError: if MONAI Label or the app is missing, the folder is served already, or the address cannot be used.
        DatasetError: if the folder does not exist.
        SettingsError: if its ``segqc.toml`` cannot be used.
        SourceUnavailable: if its PACS does not let this program in, is no DICOMweb, or does not answer and nothing is
            known of it.
    """
    if importlib.util.find_spec("monailabel") is None:
        raise ServeError("the server is not installed; pip install 'segqc[server]'")
    # before the signals are listened to: an end that comes at any moment finds what it has to remove
    with _temporary_files() as temporary:
        ending = Ending(temporary, worker=worker)
        # also where they are ignored by inheritance, as SIGINT is in a script's background
        for sign in ending_signals():
            signal.signal(sign, lambda *_: ending.begin(at_once=True))
        folder = Dataset(dataset, watched=True)  # the server's own thread takes the folder in
        _refuse_read_only(folder)
        _check_pacs(folder)
        signs_in = folder.settings.auth.demands_sign_in(host) if sign_in is None else sign_in
        if signs_in:
            _check_users(folder)
        folder.own.mkdir(parents=True, exist_ok=True)
        _allow_files()
        alone = _lock(folder)  # held until the process ends
        listener = _listen(host, port)
        port = listener.getsockname()[1]
        log_file = folder.own / "server.log"
        conf = {
            "bootstrap": str(bootstrap).lower(),
            "inference_slots": str(inference_slots),
            "upload_limit_mb": str(upload_limit_mb),
            "upload_total_mb": str(upload_total_mb),
            "upload_pause_seconds": str(upload_pause_seconds),
            "allowed_hosts": " ".join([host, *allowed_hosts]),
            "allowed_origins": " ".join(allowed_origins),
            "log_file": str(log_file),
            "sign_in": str(signs_in).lower(),
        }
        _set_environment(folder, (app_dir or default_app_dir()).resolve(), port, conf)
        _set_logging(log_file)
        folder.store.close()  # a database that cannot be used shows at once
        logger.info("SegQC serves %s; starting ...", folder.folder)
        _warn_of_strangers(folder, host, signs_in=signs_in)
        shown = host if ":" not in host else f"[{host}]"
        beside = _working(folder, ending.begun) if worker else contextlib.nullcontext()
        with listener:
            _answer(listener, f"http://{shown}:{port}/", beside, ending)
    alone.release()
    ignore_ending_signals()
    ending.report()


class Ending:
    """The end of the server: it begins with a signal, and is over after some seconds, whatever still runs.

    A thread that reads a file or computes cannot be stopped from outside. Cutting it off is as safe as a loss of power:
    files appear whole or not at all, and the database undoes what was not committed.
    """

    def __init__(self, files: Path, *, worker: bool) -> None:
        """Wait for it.

        Args:
            files: the folder of temporary files, to be removed then.
            worker: whether a worker beside the server ends with it.
        """
        self.begun = threading.Event()
        self._worker = worker
        self._files = files
        self.traffic: Traffic | None = None
        self._reported = False
        # a signal's handler may interrupt the holder of any lock, another handler included: it only writes to a pipe
        self._signals, self._begin = os.pipe()
        os.set_blocking(self._begin, False)
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def begin(self, *, at_once: bool = False) -> None:
        """Let the deadline run, or end at once, as when called again (a second Ctrl-C). For signals' handlers."""
        with contextlib.suppress(BlockingIOError):  # full: it has been asked for often enough
            os.write(self._begin, _AT_ONCE if at_once else _IN_ORDER)

    def _watch(self) -> None:
        if os.read(self._signals, 1) != _AT_ONCE:
            # in a thread of its own: a terminal that is stopped must not hold up the deadline
            threading.Thread(target=logger.info, args=(self._waits(),), name="ending", daemon=True).start()
            self.begun.set()
            # `timeout` sends its signal twice: what comes together is one wish, and requests may end
            time.sleep(_ONE_WISH_SECONDS)
            os.set_blocking(self._signals, False)
            with contextlib.suppress(BlockingIOError):
                while os.read(self._signals, 1024):
                    pass
            select.select([self._signals], [], [], _DEADLINE_SECONDS - _ONE_WISH_SECONDS)
        self.cut()

    def _waits(self) -> str:
        """What the end waits for."""
        count = len(self.traffic.open) if self.traffic is not None else 0
        requests = f"{count} open request{'s' if count > 1 else ''} may end" if count else ""
        worker = "the worker stops its job, which goes on at the next start" if self._worker else ""
        waits = ", and ".join(filter(None, (requests, worker))) or "connections are closed"
        return f"SegQC is ending: {waits} (at most {_DEADLINE_SECONDS:.0f} s; Ctrl-C again ends it at once)."

    def report(self) -> None:
        """Log that the server has ended; a thread that still computes may keep the process until the deadline."""
        if not self._reported:
            logger.info("SegQC has ended.")
        self._reported = True
        logging.shutdown()

    def cut(self) -> None:
        """End the process here and now, and say whose requests are cut off."""
        _remove_in_use(self._files)
        signal.alarm(_LAST_SECONDS)  # the system ends it where even a last line cannot be told: a terminal is stopped
        for request in list(self.traffic.open.values()) if self.traffic is not None else ():
            request.log_cut()
        self.report()
        os._exit(0)


def _remove_in_use(folder: Path) -> None:
    """Remove a folder that others write to: first from where they look for it."""
    aside = folder.with_name(f"{folder.name}-removed")
    with contextlib.suppress(OSError):
        os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _temporary_files() -> Iterator[Path]:
    """Keep what this process receives and makes in one temporary folder, which is removed with all that is left."""
    with tempfile.TemporaryDirectory(prefix="segqc-server-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = None


def server_of(config: uvicorn.Config, begin_end: Callable[[], None]) -> uvicorn.Server:
    """The server of a configuration, which a signal ends in order, however many come and whenever.

    Args:
        config: what to serve.
        begin_end: called by each signal's handler.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # not by uvicorn's own handler: where another signal interrupts that of a Ctrl-C, it takes the two for a
            # wish to cut off all requests, and the application, which ends with a traceback then
            self.should_exit = True
            begin_end()

    return Server(config)


def _answer(
    listener: socket.socket, shown: str, beside: contextlib.AbstractContextManager[None], ending: Ending
) -> None:
    """Answer requests until the process is told to end, with something else running beside."""
    # after the environment: MONAI Label reads its settings when it is imported
    import uvicorn

    from segqc.server.app import app
    from segqc.server.connection import Connection

    ending.traffic = app.state.traffic
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        proxy_headers=False,  # the gate knows whom to trust
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=_REQUEST_GRACE_SECONDS,
    )
    server = server_of(config, ending.begin)
    for sign in ending_signals():
        signal.signal(sign, server.handle_exit)
    logger.info("SegQC answers at %s (a browser, 3D Slicer, MONAI Label's clients; Ctrl-C ends it)", shown)
    with beside:
        server.run(sockets=[listener])


@contextlib.contextmanager
def _working(dataset: Dataset, ended: threading.Event) -> Iterator[None]:
    """Keep a worker running beside the server until an event: one that dies is started again."""

    def keep() -> None:
        while not ended.is_set():
            process = subprocess.Popen(
                [sys.executable, "-m", "segqc", "worker", str(dataset.folder), "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches it through us only
            )
            while process.poll() is None and not ended.wait(0.5):
                pass
            if ended.is_set():
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=_WORKER_GRACE_SECONDS)
                process.kill()
                return
            logger.warning("the worker ended with status %s; another one is started", process.returncode)
            ended.wait(_WORKER_PAUSE_SECONDS)

    keeper = threading.Thread(target=keep, name="worker")
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()


def _refuse_read_only(dataset: Dataset) -> None:
    for folder in (dataset.folder, dataset.own):
        if folder.exists() and not os.access(folder, os.W_OK):
            raise ServeError(
                f"{folder}: is read-only; the server writes its database, log and labels below {dataset.folder}: "
                "make the folder writable, or serve a copy"
            )


def _check_pacs(dataset: Dataset) -> None:
    """Refuse a PACS that is none or lets nobody in; of one that is away, what is known is served."""
    if dataset.pacs is None:
        return
    try:
        dataset.pacs.client.check()
    except PacsUnavailable as error:
        with dataset.store.read() as transaction:
            known = scans.names(transaction)
        if not known:
            raise
        logger.warning("%s What is known of it is served meanwhile (%d scan(s)).", error, len(known))


def _check_users(dataset: Dataset) -> None:
    """Refuse to keep everybody out."""
    auth = dataset.settings.auth
    with dataset.store.read() as transaction:
        somebody = any(user.has_password for user in users.listing(transaction))
    if not somebody and auth.oidc is None and auth.user_header is None:
        raise ServeError(
            f"{dataset.folder}: users have to sign in at this address, and there is no user yet: add the first one "
            f"(segqc users add {dataset.folder} NAME), or let everybody do everything (--without-sign-in)"
        )


def _warn_of_strangers(dataset: Dataset, host: str, *, signs_in: bool) -> None:
    if is_loopback(host):
        return
    if not signs_in:
        logger.warning("Nobody signs in: whoever reaches this machine may see and change everything.")
    elif not dataset.settings.auth.trusted_proxies:
        logger.warning("Passwords travel as they are: put a proxy with TLS before the server (auth.trusted_proxies).")


def _lock(dataset: Dataset) -> BaseFileLock:
    """Keep a second server off the folder: each would train and score by itself."""
    from filelock import FileLock, Timeout

    lock = FileLock(dataset.own / "server.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ServeError(f"{dataset.folder}: another server serves this folder already; end it first") from error
    return lock


def _allow_files() -> None:
    """Let the process have more files open than the usual 1024: each connection and each uploaded file is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _listen(host: str, port: int) -> socket.socket:
    """Take the address before the long imports: a port in use shows at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # named, as asyncio sends small answers at once (TCP_NODELAY) on sockets that say that they are TCP's only
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ServeError(f"{host}:{port}: cannot listen there ({error.strerror}); choose another --port") from error
    return listener


def _set_environment(dataset: Dataset, app_dir: Path, port: int, conf: dict[str, str]) -> None:
    if not (app_dir / "main.py").is_file():
        raise ServeError(f"{app_dir}: no MONAI Label app there (no main.py)")
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.update(
        MONAI_LABEL_APP_DIR=str(app_dir),
        MONAI_LABEL_STUDIES=str(dataset.folder),
        MONAI_LABEL_SERVER_PORT=str(port),
        MONAI_LABEL_APP_CONF=json.dumps(conf),
        MONAI_LABEL_SESSION_PATH=str(dataset.own / "sessions"),
    )
    # jobs run this interpreter: its tools and this checkout have to be found there, too
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


def _set_logging(log_file: Path) -> None:
    """Short lines on the terminal, all lines with their time in a file."""
    terminal = logging.StreamHandler()
    terminal.setFormatter(LineFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    kept = logging.handlers.RotatingFileHandler(log_file, maxBytes=_LOG_BYTES, backupCount=3, encoding="utf-8")
    kept.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[terminal, kept], force=True)
    for noisy in ("monailabel", "uvicorn", "watchdog", "filelock", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("timeloop").disabled = True  # it takes a terminal of its own when MONAI Label starts it
