"""The ASGI application: MONAI Label's interface on one dataset folder.

MONAI Label's own settings, in the environment, say which (`segqc.server.serve` sets them); ``segqc serve`` and
``monailabel start_server --uvicorn_app segqc.server.app:app`` start it.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Literal

import anyio
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.formparsers import MultiPartParser
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from segqc import __version__
from segqc.errors import SegqcError, sentence
from segqc.loop.due import put_first_trainings
from segqc.loop.requests import NETWORKS, TrainRequest, enqueue_scoring
from segqc.server.auth.setup import add_auth
from segqc.server.dicomweb.routes import SLOTS
from segqc.server.dicomweb.routes import router as dicomweb
from segqc.server.errors import RequestError
from segqc.server.guard import AllowedHosts, BodyLimits, Guard, Traffic, machine_names
from segqc.server.monailabel.config import settings
from segqc.server.monailabel.datastore import StoreDatastore
from segqc.server.monailabel.exceptions import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelError,
    MONAILabelException,
)
from segqc.server.monailabel.facade import App, current_app
from segqc.server.monailabel.stock import include_stock, stock_routers
from segqc.server.ohif.viewer import find_viewer
from segqc.server.pages.page import error_page, wants_page
from segqc.server.pages.routes import PAGES
from segqc.server.routers import ROUTERS, dicomweb_routers
from segqc.server.sent_once import check_sent_once
from segqc.settings import AuthSettings, ServerSettings, SettingsError, load_settings
from segqc.text import first_problem

logger = logging.getLogger(__name__)

# Of the files of a form, up to so much of each is kept in memory: a session may have thousands.
SPOOLED_BYTES: Final = 16_000
WATCH_SECONDS = 5.0
FIRST_LOOK_SECONDS = 10.0
INFERENCE_NICENESS: Final = 10
# So many new objects before garbage is looked for: by Python's default of 700, a request pays for it several times.
GARBAGE_OBJECTS: Final = 20_000
ANNOTATION_SLOTS: Final = 2  # one waits for the disk while another computes
# The first networks at most: minutes on two cores, to have something to correct. Later trainings take the settings.
FIRST_EPOCHS = {"epochs": 30, "fold_epochs": 10, "people_epochs": 10}


class OtherSlash:
    """ASGI application for what no route answers: the address with, or without, a slash at its end; else 404.

    MONAI Label's addresses end with a slash or not, people type either, and its clients do not follow redirections.
    """

    def __init__(self, router: ASGIApp) -> None:
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by the other address's route."""
        path: str = scope["path"]
        asked = scope.setdefault("segqc.asked", path)
        if asked != path or path == "/":
            raise HTTPException(404, f"there is nothing at {asked[:200]!r}.")
        scope["path"] = path.removesuffix("/") if path.endswith("/") else f"{path}/"
        await self._router(scope, receive, send)


class Refusal(BaseModel):
    """What clients get where a request is refused."""

    detail: str = Field(description="What is wrong with it, and what to do, in a sentence.")
    image: str | None = Field(None, description="The scan that it is about, where the client may call it otherwise.")


def create_app() -> FastAPI:
    """Build the application that MONAI Label's settings describe."""
    if settings.MONAI_LABEL_AUTH_ENABLE:
        raise SettingsError("MONAI_LABEL_AUTH_ENABLE: users sign in by the settings [auth] here; unset this variable")
    conf = settings.MONAI_LABEL_APP_CONF
    limits = _limits(conf)
    app = FastAPI(
        title="SegQC",
        version=__version__,
        docs_url=None,  # see `segqc.server.pages.api`
        redoc_url=None,
        lifespan=_lifespan,
        redirect_slashes=False,
        dependencies=[Depends(check_sent_once)],
        responses={"4XX": {"description": "Refused", "model": Refusal}},
        form_limits={"max_files": 4096, "max_fields": 16, "max_part_size": 1_000_000},
    )
    app.router.default = OtherSlash(app.router.app)
    MultiPartParser.spool_max_size = SPOOLED_BYTES
    folder = _folder()
    auth = load_settings(folder).auth if folder is not None else AuthSettings()
    told = conf.get("sign_in")
    sign_in = auth.demands_sign_in(None) if told is None else told == "true"
    add_auth(
        app,
        auth,
        lambda: current_app().context.dataset.store,
        sign_in=sign_in,
        port=settings.MONAI_LABEL_SERVER_PORT,
        refuse=refuse,
    )
    origins = _allowed("allowed_origins", conf)
    app.state.traffic = Traffic()
    hosts = AllowedHosts([*_allowed("allowed_hosts", conf), *machine_names()])
    app.add_middleware(Guard, hosts=hosts, origins=origins, limits=limits, traffic=app.state.traffic, refuse=refuse)
    if origins:  # around the guard: their pages can read why it refuses
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
        )
    app.state.log_file = Path(conf["log_file"]) if conf.get("log_file") else None
    app.state.viewer = find_viewer()
    routers = (*ROUTERS, *dicomweb_routers(from_pacs=_scans_are_of_pacs()), *PAGES)
    for router in routers:
        app.include_router(router)
    own = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    ours = {(route.path, method) for route in own for method in route.methods or ()}
    for router in stock_routers():
        include_stock(app, router, ours)
    _add_error_handlers(app)
    return app


def _limits(conf: Mapping[str, str]) -> BodyLimits:
    default = ServerSettings()
    most = float(conf.get("upload_limit_mb", default.upload_limit_mb))
    total = float(conf.get("upload_total_mb", default.upload_total_mb))
    pause = float(conf.get("upload_pause_seconds", default.upload_pause_seconds))
    return BodyLimits(int(most * 1e6), int(max(most, total) * 1e6), pause)


def _allowed(name: Literal["allowed_hosts", "allowed_origins"], conf: Mapping[str, str]) -> Sequence[str]:
    """Who may ask the server: as `serve` was told, else as the dataset folder's settings say."""
    if name in conf:
        return conf[name].split()
    folder = _folder()
    if folder is None:
        return ()
    server = load_settings(folder).server
    return server.allowed_hosts if name == "allowed_hosts" else server.allowed_origins


def _folder() -> Path | None:
    """The dataset folder; None where there is none yet."""
    folder = Path(settings.MONAI_LABEL_STUDIES)
    return folder if settings.MONAI_LABEL_STUDIES and folder.is_dir() else None


def _scans_are_of_pacs() -> bool:
    folder = Path(settings.MONAI_LABEL_STUDIES)
    return bool(settings.MONAI_LABEL_STUDIES) and folder.is_dir() and load_settings(folder).pacs.url is not None


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    conf = settings.MONAI_LABEL_APP_CONF
    instance = current_app()
    instance.start()
    app.state.inference = ThreadPoolExecutor(int(conf.get("inference_slots", 1)), "inference", _step_back)
    app.state.annotation_slots = anyio.CapacityLimiter(ANNOTATION_SLOTS)
    app.state.dicomweb_slots = anyio.CapacityLimiter(SLOTS)
    threading.Thread(target=_preload, args=(instance,), name="preload", daemon=True).start()
    ended, looked = threading.Event(), threading.Event()
    threading.Thread(target=_watch, args=(instance.datastore, ended, looked), name="watch", daemon=True).start()
    # a folder of usual size is there from the first answer on; a large one is taken in while others are answered
    await anyio.to_thread.run_sync(looked.wait, FIRST_LOOK_SECONDS)
    bootstrap = str(conf.get("bootstrap", instance.context.settings.server.bootstrap)).lower() == "true"
    if bootstrap:
        threading.Thread(target=_bootstrap, args=(instance, looked), name="bootstrap", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        app.state.inference.shutdown(wait=False, cancel_futures=True)
        instance.context.dataset.store.close()


def _step_back() -> None:
    """Let this thread, and those of PyTorch that it starts, compute when no other request wants a core."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), INFERENCE_NICENESS)


def _watch(datastore: StoreDatastore, ended: threading.Event, looked: threading.Event) -> None:
    """Take in what people put into the folder, every few seconds; a large folder that changes often, less often."""
    pause = 0.0
    while not ended.wait(pause):
        started = time.monotonic()
        try:
            datastore.refresh(ended.is_set)
        except (SegqcError, OSError) as error:
            logger.warning("the folder could not be looked through: %s", error)
        except Exception:
            logger.exception("the folder could not be looked through")  # the next look may do better
        looked.set()
        pause = max(WATCH_SECONDS, 20 * (time.monotonic() - started))


def _preload(instance: App) -> None:
    """Load the models before the first annotator waits for them, and find out what clients see at first."""
    for network in NETWORKS:
        try:
            instance.context.model(network)
        except (SegqcError, OSError) as error:
            logger.warning("%s", error)
    try:
        instance.info()
    except (SegqcError, OSError) as error:
        logger.warning("%s", error)
    # what is loaded by now stays: looking through it for garbage would stop all requests for most of a second
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS)


def _bootstrap(instance: App, looked: threading.Event) -> None:
    """Put the trainings of the first networks where there are none and enough scans are labelled."""
    looked.wait()
    context = instance.context
    store = context.dataset.store
    missing = [network for network in NETWORKS if not context.has(network)]
    if not missing:
        with store.write() as transaction:
            enqueue_scoring(transaction)
        return
    labelled = len(context.dataset.cases())
    needed = max(context.settings.training_settings(network).min_cases for network in missing)
    if labelled < needed:
        logger.info(
            "No trained networks yet, and %d scans with final labels; with %d they can be trained (POST /train/).",
            labelled,
            needed,
        )
        return
    logger.info("First start: training %s on %d labelled scans; the server answers meanwhile.", missing, labelled)
    first = []
    for network in missing:
        config = instance.trainers[network].config()
        few = {name: min(config[name], most) for name, most in FIRST_EPOCHS.items() if name in config}
        first.append(TrainRequest(model=network, settings=few))
    put_first_trainings(store, first)


_MAX_DETAIL: Final = 1000
_NO_ROOM: Final = (507, "the server's disk is full; nothing was changed. Tell whoever runs the server.")


def is_full(error: OSError) -> bool:
    """Whether there was no room on a disk."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def refuse(
    request: Request,
    status: int,
    message: str,
    headers: Mapping[str, str] | None = None,
    *,
    image: str | None = None,
) -> Response:
    """Answer a request that is refused: see `Refuse`; ``image`` is the scan that it is about."""
    # what a client sent may be no text that can be sent back, or very long
    shown = sentence(message) if len(message) <= _MAX_DETAIL else f"{message[:_MAX_DETAIL]}..."
    body = Refusal(detail=shown.encode("utf-8", "backslashreplace").decode(), image=image)
    # DICOMweb says what it cannot send: to a request for text/html, too
    if wants_page(request) and not request.url.path.startswith(f"{dicomweb.prefix}/"):
        return error_page(request, status, body.detail, headers)
    return JSONResponse(body.model_dump(exclude_none=True), status, headers)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(StarletteHTTPException)
    async def on_http_exception(request: Request, error: StarletteHTTPException) -> Response:
        if isinstance(error.__cause__, OSError):
            return await on_os_error(request, error.__cause__)  # met while a form was received
        return refuse(request, error.status_code, str(error.detail), error.headers)

    @app.exception_handler(SegqcError)
    async def on_known_problem(request: Request, error: SegqcError) -> Response:
        if error.status >= 500:
            logger.error("%s", error)
        return refuse(request, error.status, str(error), image=error.image if isinstance(error, RequestError) else None)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        return refuse(request, 422, first_problem(error.errors()))

    @app.exception_handler(MONAILabelException)
    async def on_monailabel_error(request: Request, error: MONAILabelException) -> Response:
        if isinstance(error, ImageNotFoundException | LabelNotFoundException):
            return refuse(request, 404, str(error.msg))
        asked = error.error in (MONAILabelError.INVALID_INPUT, MONAILabelError.APP_INIT_ERROR)
        return refuse(request, 400 if asked else 500, str(error.msg))

    @app.exception_handler(OSError)
    async def on_os_error(request: Request, error: OSError) -> Response:
        logger.error("%s", error)
        if is_full(error):
            return refuse(request, *_NO_ROOM)
        return refuse(
            request,
            503,
            f"the server cannot use its files ({error.strerror or type(error).__name__}); nothing was changed. Tell "
            "whoever runs the server.",
        )

    @app.exception_handler(MemoryError)
    async def on_memory_error(request: Request, error: MemoryError) -> Response:
        logger.error("out of memory: %s", error)
        return refuse(
            request, 503, "the server has not enough memory for this request now; try a smaller one, or later."
        )


app = create_app()
