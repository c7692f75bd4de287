"""What every request passes first: known hosts, no foreign web pages, bounded bodies, and an answer to any error."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final
from urllib.parse import unquote_to_bytes, urlsplit

import anyio
from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from segqc.server.errors import Refuse, refuse_in_json

logger = logging.getLogger(__name__)

# Only these take files, as parts of a form; any other body is read into memory as a whole.
_UPLOADS: Final = re.compile(r"PUT /(datastore|session|model)/|POST /(infer|segqc/viewer)/|POST /scans/[^/]+/label/")
MAX_PLAIN_BODY_BYTES: Final = 1_000_000
MAX_HEADERS: Final = 100
# A body has to keep coming: at least so many bytes a second on average, after a start.
MIN_BYTES_PER_SECOND: Final = 500
_RETRY_SECONDS: Final = "10"
_OF_NO_PAGE: Final = (400, 421, 431)

_AUTHORITY: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{1,5})?")
_CONTROL: Final = re.compile(rb"[\x00-\x1f\x7f]")
_SLASHES: Final = re.compile(r"/{2,}")


def host_of(authority: str) -> str | None:
    """The name or address of a Host header or a URL's authority, without port and brackets, in its plainest form.

    Returns:
        Lower case without a trailing dot, an address in its canonical form; None if it is neither a name nor an
        address.
    """
    found = _AUTHORITY.fullmatch(authority.strip(" \t"))
    if found is None:
        return None
    name = (found[1] or found[2]).lower().removesuffix(".")
    address = _address(name)
    if address is not None:
        return str(address)
    return None if found[1] else name or None


def _plain(name: str) -> str | None:
    """`host_of` for a bare name or address, as settings and sockets give it: IPv6 without brackets, with a zone."""
    bare = name.partition("%")[0]
    return host_of(f"[{bare}]") if bare.count(":") > 1 else host_of(bare)


def _address(name: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(name)
    except ValueError:
        return None
    return (address.ipv4_mapped if isinstance(address, IPv6Address) else None) or address


def machine_names() -> tuple[str, ...]:
    """This machine's own names, as its neighbours call it."""
    name = socket.gethostname()
    return name, f"{name.partition('.')[0]}.local"


class AllowedHosts:
    """The names under which this server is asked.

    A web page can make its own name point to this machine while it is open (DNS rebinding): its requests then come
    from the user's browser, and look like the server's own page. They name the page's host, so only known ones pass.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        """Take the names beside the loopback ones.

        Args:
            names: host names or addresses; ``*.example.org`` stands for all names below it, ``*`` for any name.
        """
        self._any = "*" in names
        self._below = tuple(name[1:].lower() for name in names if name.startswith("*."))
        self._names = frozenset(found for name in names if (found := _plain(name)))

    def allow(self, authority: str, connected_to: str | None = None) -> bool:
        """Whether a request may name this host.

        Args:
            authority: the Host header.
            connected_to: this machine's address that the connection came in by.
        """
        host = host_of(authority)
        if host is None:
            return False
        address = _address(host)
        loopback = address.is_loopback if address is not None else f".{host}".endswith(".localhost")
        own = connected_to is not None and host == _plain(connected_to)
        return loopback or own or self._any or host in self._names or host.endswith(self._below)


@dataclass(slots=True)
class OpenRequest:
    """A request that is being answered.

    Attributes:
        label: method and path.
        started: when it came (`time.monotonic`).
        received: bytes of its body so far.
    """

    label: str
    started: float
    received: int = 0

    def log_cut(self) -> None:
        """Note that it will not be answered."""
        logger.warning("cut off after %.0f s: %s", time.monotonic() - self.started, self.label)


@dataclass(slots=True)
class Traffic:
    """The requests that are being answered now, and the bytes of their bodies, which lie on the disk or in memory."""

    open: dict[int, OpenRequest] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def received(self) -> int:
        """Bytes of all bodies."""
        return sum(request.received for request in self.open.values())

    @contextlib.contextmanager
    def request(self, label: str) -> Iterator[OpenRequest]:
        """Count a request until it is answered."""
        number = next(self._numbers)
        self.open[number] = request = OpenRequest(label, time.monotonic())
        try:
            yield request
        finally:
            del self.open[number]


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """How much is received.

    Attributes:
        request_bytes: by one request.
        total_bytes: by all requests that are being answered.
        pause_seconds: how long a client may send nothing while its body is not complete.
    """

    request_bytes: int
    total_bytes: int
    pause_seconds: float = 30.0


class Guard:
    """ASGI middleware.

    Beside hosts, a request's origin is checked: a page of another site that is open in an annotator's browser could
    send requests to a server on the same machine; browsers name the page's origin, or say that it is another site, and
    any but the server's own and the configured ones is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: AllowedHosts,
        origins: Collection[str],
        limits: BodyLimits,
        traffic: Traffic,
        refuse: Refuse = refuse_in_json,
    ) -> None:
        self._app = app
        self._refuse = refuse
        self._hosts = hosts
        self._origins = frozenset(origins)
        self._limits = limits
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it in one sentence."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        scope = _without_authority(scope)
        scope["path"] = _SLASHES.sub("/", scope["path"])
        refusal = self._refusal(scope)
        if refusal is not None:
            await self._answer(refusal, scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        with self._traffic.request(f"{scope['method']} {scope['path']}") as request:
            try:
                await self._app(scope, self._counted(scope, receive, request), watched_send)
            except asyncio.CancelledError:  # the server ends, and does not wait any longer
                request.log_cut()
                if started:
                    raise
                await self._answer(HTTPException(503, "the server ends; send it again later."), scope, receive, send)
            except Exception:
                number = uuid.uuid4().hex[:8]
                logger.exception("error %s: %s could not be answered", number, request.label)
                if started:
                    raise
                message = f"the server met a mistake of its own; its log tells more under the error id {number}."
                await self._answer(HTTPException(500, message), scope, receive, send)

    async def _answer(self, error: HTTPException, scope: Scope, receive: Receive, send: Send) -> None:
        # under a name that is not the server's, a page could load nothing
        refuse = refuse_in_json if error.status_code in _OF_NO_PAGE else self._refuse
        answer = refuse(Request(scope), error.status_code, str(error.detail), error.headers)
        await answer(scope, receive, send)

    def _refusal(self, scope: Scope) -> HTTPException | None:
        if len(scope["headers"]) > MAX_HEADERS:
            return HTTPException(431, f"the request has more than {MAX_HEADERS} headers.")
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        connected_to = scope["server"][0] if scope.get("server") else None
        if len(hosts) != 1:
            return HTTPException(421, "a request needs one Host header, which names this server.")
        if not self._hosts.allow(hosts[0], connected_to):
            return HTTPException(
                421,
                f"this server does not answer under the name {hosts[0]!r}; whoever runs it can add the name to the "
                "setting server.allowed_hosts.",
            )
        address = scope["path"].encode("utf-8", "replace") + b"?" + unquote_to_bytes(scope["query_string"])
        if _CONTROL.search(address):
            return HTTPException(400, "the address holds control characters.")
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and _origin_host(origin) != hosts[0].lower():
            return HTTPException(
                403,
                f"pages of {origin!r} may not ask this server; whoever runs it can add the origin to the setting "
                "server.allowed_origins.",
            )
        if origin not in self._origins and _is_of_another_site(scope["method"], headers):
            return HTTPException(403, "a page of another site asks for this; only links to this server's pages may.")
        return self._too_much(_declared_length(headers), self._most(scope))

    def _too_much(self, length: int, most: int) -> HTTPException | None:
        if length > most:
            return _too_large(most)
        if self._traffic.received + length > self._limits.total_bytes:
            return _busy()
        if length > MAX_PLAIN_BODY_BYTES and length > shutil.disk_usage(tempfile.gettempdir()).free:
            return HTTPException(507, "the server's disk has no room for this request; tell whoever runs the server.")
        return None

    def _most(self, scope: Scope) -> int:
        """Bytes of the largest body of a request."""
        form = Headers(scope=scope).get("content-type", "").lower().strip().startswith("multipart/")
        files = form and _UPLOADS.match(f"{scope['method']} {scope['path']}/")
        return self._limits.request_bytes if files else min(self._limits.request_bytes, MAX_PLAIN_BODY_BYTES)

    def _counted(self, scope: Scope, receive: Receive, request: OpenRequest) -> Receive:
        most = self._most(scope)
        complete = False

        async def counted() -> Message:
            nonlocal complete
            if complete:  # all that can come is the end of the connection
                return await receive()
            due = request.started + self._limits.pause_seconds + request.received / MIN_BYTES_PER_SECOND
            try:
                with anyio.fail_after(max(0.0, min(self._limits.pause_seconds, due - time.monotonic()))):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(
                    408, "the request did not arrive in time; send it again.", {"Connection": "close"}
                ) from error
            request.received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if request.received > most:  # sent in chunks, without a length
                raise _too_large(most)
            if self._traffic.received > self._limits.total_bytes:
                raise _busy()
            return message

        return counted


def _too_large(most: int) -> HTTPException:
    return HTTPException(413, f"the request is larger than the {most / 1e6:.0f} MB that this server takes.")


def _busy() -> HTTPException:
    return HTTPException(
        503, "the server is receiving as much as it can at once; send it again later.", {"Retry-After": _RETRY_SECONDS}
    )


def _declared_length(headers: Headers) -> int:
    length = headers.get("content-length", "0")
    return int(length) if length.isascii() and length.isdecimal() and len(length) < 20 else 0


def _is_of_another_site(method: str, headers: Headers) -> bool:
    """Whether a browser says that another site's page makes a request, other than by a link that somebody follows.

    It says so also where it names no origin: for pictures, scripts and forms.
    """
    if headers.get("sec-fetch-site") not in ("cross-site", "same-site"):
        return False
    return method not in ("GET", "HEAD") or headers.get("sec-fetch-mode") != "navigate"


def _origin_host(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _without_authority(scope: Scope) -> Scope:
    """The scope of a request that names a whole URL, as proxies are asked: its host is the URL's, not the header's."""
    found = re.match(r"https?://([^/]*)(.*)", scope["path"], re.IGNORECASE | re.DOTALL)
    if found is None:
        return {**scope}
    headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
    host = found[1].encode("latin-1", "replace")
    return {**scope, "path": found[2] or "/", "headers": [*headers, (b"host", host)]}
