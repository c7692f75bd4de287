"""ASGI middleware that lets through who may: it finds out who makes a request, and whether their role is enough."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import parse_qs, quote

import anyio
import anyio.to_thread
from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request, cookie_parser
from starlette.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from segqc.errors import SegqcError
from segqc.server.auth.identity import ANYBODY, Identity, set_identity, sha256_of_secret
from segqc.server.auth.proxies import Proxies, peer
from segqc.server.auth.roles import PUBLIC, needed_for
from segqc.server.errors import Refuse, RequestError, refuse_in_json
from segqc.settings import AuthSettings
from segqc.store import users
from segqc.store.records import Actor
from segqc.store.store import Store

logger = logging.getLogger(__name__)

SIGN_IN_PAGE: Final = "/auth/sign-in"
_HEADER_NAME: Final = re.compile(r"[^\x00-\x1f\x7f]{1,200}")
_DOWNLOADS: Final = 3  # 3D Slicer tries that often
_MAX_KEPT: Final = 10_000
_THREADS: Final = 4  # of its own: who signs in does not wait for those who upload


class Downloads:
    """Scans that may be downloaded without a token, for a while and a few times, from where one was handed out.

    3D Slicer's extension signs in by a token, but downloads the scan that it is handed out without one.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Allow none yet.

        Args:
            seconds: for how long each is allowed.
            clock: gives the time.
        """
        self._seconds = seconds
        self._clock = clock
        self._left: dict[tuple[str, str], tuple[float, int, Identity]] = {}

    def allow(self, address: str, image: str, identity: Identity) -> None:
        """Let an address download a scan for somebody."""
        if self._seconds > 0:
            self._left.pop((address, image), None)
            self._left[address, image] = (self._clock() + self._seconds, _DOWNLOADS, identity)
            while len(self._left) > _MAX_KEPT:
                del self._left[next(iter(self._left))]

    def take(self, address: str, image: str) -> Identity | None:
        """For whom an address may download a scan now; it is one time less then."""
        until, left, identity = self._left.pop((address, image), (0.0, 0, ANYBODY))
        if left == 0 or self._clock() > until:
            return None
        if left > 1:
            self._left[address, image] = (until, left - 1, identity)
        return identity


class Gate:
    """ASGI middleware: each request gets an identity, or is refused in one sentence."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        sign_in: bool,
        settings: AuthSettings,
        cookie: str,
        store: Callable[[], Store],
        downloads: Downloads,
        refuse: Refuse = refuse_in_json,
    ) -> None:
        """Stand before an application.

        Args:
            app: the application.
            sign_in: whether users sign in.
            settings: how.
            cookie: the name of the session's cookie.
            store: gives the dataset folder's store.
            downloads: scans that may be downloaded without a token.
            refuse: answers requests that may not pass.
        """
        self._app = app
        self._refuse = refuse
        self._sign_in = sign_in
        self._settings = settings
        self._cookie = cookie
        self._store = store
        self._downloads = downloads
        self._proxies = Proxies(settings.trusted_proxies)
        self._told: set[str] = set()
        self._threads = anyio.CapacityLimiter(_THREADS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, refuse it, or send a browser to the sign-in page."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        named = self._named_by_proxy(scope, headers)
        is_proxy = self._proxies.trusts(peer(scope))
        if is_proxy:
            address, scheme = self._proxies.origin(scope, headers)
            scope = {**scope, "client": (address, 0), "scheme": scheme}
        # where a proxy that is not known as one stands before the server, all clients come from its address
        is_address_known = is_proxy or "x-forwarded-for" not in headers
        if not self._sign_in:
            known = ANYBODY if named is None else Identity(role=ANYBODY.role, actor=_by_header(named))
            set_identity(scope, known)
            await self._app(scope, receive, send)
            return
        needed = needed_for(scope["method"], scope["path"])
        if needed == PUBLIC:
            await self._app(scope, receive, send)
            return
        try:
            identity = await anyio.to_thread.run_sync(self._identify, headers, named, limiter=self._threads)
            if identity is None and is_address_known:
                identity = self._download(scope)
        except SegqcError as error:
            await self._refuse(Request(scope), error.status, str(error))(scope, receive, send)
            return
        answer: ASGIApp
        if identity is None:
            answer = _ask_to_sign_in(scope, headers)
        elif needed is None:
            message = f"there is nothing at {scope['path'][:200]!r} for {scope['method']}."
            answer = self._refuse(Request(scope), 404, message)
        elif not identity.may(needed):
            message = f"this needs the role {needed!r}, and yours is {identity.role!r}."
            answer = self._refuse(Request(scope), 403, message)
        else:
            set_identity(scope, identity)
            answer, send = self._app, _not_for_others(send)
        await answer(scope, receive, send)

    def _identify(self, headers: Headers, named: str | None) -> Identity | None:
        """Who makes a request: by a token, else by a session, else as a trusted proxy says."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        secrets = [(token.strip(), True)] if scheme.lower() == "bearer" else []
        if session := session_of(headers, self._cookie):
            secrets.append((session, False))
        if not secrets and named is None:
            return None
        with self._store().read() as transaction:
            for secret, by_token in secrets:
                found = users.current(transaction, sha256_of_secret(secret))
                if found is not None and (found.kind == "token") is by_token:
                    actor = users.actor_of(found.user.name, found.identified_by)
                    return Identity(role=found.user.role, actor=actor, by_token=by_token)
            if named is None:
                return None
            user = users.find(transaction, named)
        if user is not None:
            return Identity(role=user[0].role, actor=_by_header(user[0].name))
        if self._settings.header_role is None:
            raise RequestError(403, f"nobody has said what {named!r} may do here; an operator can ('segqc users add')")
        return Identity(role=self._settings.header_role, actor=_by_header(named))

    def _named_by_proxy(self, scope: Scope, headers: Headers) -> str | None:
        """The user whom a trusted proxy names; what others write into its header is ignored."""
        header = self._settings.user_header
        names = headers.getlist(header) if header is not None else []
        name = names[0] if len(names) == 1 else ""  # of two, one is the client's own
        if not _HEADER_NAME.fullmatch(name):
            return None
        address = peer(scope)
        if self._proxies.trusts(address):
            return name
        if address not in self._told and len(self._told) < _MAX_KEPT:
            self._told.add(address)
            logger.warning(
                "%s names a user in the header %r and is none of auth.trusted_proxies: ignored", address, header
            )
        return None

    def _download(self, scope: Scope) -> Identity | None:
        """For whom 3D Slicer downloads the scan that it was just handed out."""
        if scope["method"] != "GET" or scope["path"].rstrip("/") != "/datastore/image":
            return None
        wanted = parse_qs(scope["query_string"].decode("latin-1")).get("image", [])
        return self._downloads.take(peer(scope), wanted[0]) if len(wanted) == 1 else None


def session_of(headers: Headers, cookie: str) -> str | None:
    """The secret of a browser's session; None without one."""
    return next((found for text in headers.getlist("cookie") if (found := cookie_parser(text).get(cookie))), None)


def too_many(wait: float) -> HTTPException:
    """What a client gets that guesses."""
    seconds = max(1, math.ceil(wait))
    message = f"too many wrong passwords; try again in {seconds} seconds."
    return HTTPException(429, message, {"Retry-After": str(seconds)})


def _by_header(name: str) -> Actor:
    return users.actor_of(name, "trusted-header")


def _ask_to_sign_in(scope: Scope, headers: Headers) -> ASGIApp:
    """A browser that opens a page is sent to the sign-in page; a program is told."""
    is_page = headers.get("sec-fetch-mode", "navigate") == "navigate" and "text/html" in headers.get("accept", "")
    if scope["method"] == "GET" and is_page:
        query = scope["query_string"].decode("latin-1")
        wanted = f"{quote(scope['path'])}?{query}" if query else quote(scope["path"])
        return RedirectResponse(f"{SIGN_IN_PAGE}?next={quote(wanted, safe='')}", 303, {"Cache-Control": "no-store"})
    return JSONResponse(
        {"detail": f"sign in first: a browser at {SIGN_IN_PAGE}, a program with a token of /auth/token."},
        401,
        {"WWW-Authenticate": "Bearer"},
    )


def _not_for_others(send: Send) -> Send:
    """Keep caches between server and client from giving one user's answers to another."""

    async def marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).setdefault("Cache-Control", "private, no-cache")
        await send(message)

    return marked
