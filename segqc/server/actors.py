"""Who makes a request, and how that is known."""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import re
import uuid
from collections.abc import Iterator
from typing import Annotated, Final

from fastapi import Query, Request, Response
from pydantic import JsonValue

from segqc.server.auth.gate import Downloads
from segqc.server.auth.identity import Identity, identity_of
from segqc.server.errors import RequestError
from segqc.server.parameters import ClientId
from segqc.store.events import SERVER
from segqc.store.records import Actor, Role

COOKIE: Final = "segqc_client"
_COOKIE_SECONDS: Final = 30 * 24 * 3600
_NAME: Final = re.compile(r"[^\x00-\x1f\x7f]{1,200}")
_SHOWN_HASH: Final = 8  # characters: short enough to read, and no two browsers of a site share them
_COOKIE: Final = re.compile(r"[0-9a-f]{32}")

_current: contextvars.ContextVar[Actor] = contextvars.ContextVar("actor", default=SERVER)


class RequestUser:
    """Who makes a request."""

    def __init__(self, request: Request, response: Response, identity: Identity, client_id: str | None) -> None:
        self._request, self._response, self._identity, self._client_id = request, response, identity, client_id
        self._new_cookie: str | None = None

    def actor(self, client_id: JsonValue = None) -> Actor:
        """Tell who it is.

        The signed-in user, or whom a trusted proxy names, whatever else the client says; where nobody signs in, what
        the client calls itself (MONAI Label's ``client_id``); else a browser, known again by a cookie.

        Args:
            client_id: what the client calls itself, as it sent it; by default what the address says.
        """
        if self._identity.actor is not None:
            return self._identity.actor
        client = client_id or self._client_id
        if isinstance(client, str) and _NAME.fullmatch(client):
            return Actor(kind="person", name=client, identified_by="client-id")
        known = self._new_cookie or self._request.cookies.get(COOKIE, "")
        if not _COOKIE.fullmatch(known):
            known = self._new_cookie = uuid.uuid4().hex
            self._response.set_cookie(COOKIE, known, httponly=True, samesite="lax", max_age=_COOKIE_SECONDS)
        return Actor(kind="person", name=_browser(known), identified_by="cookie")

    def known_actor(self) -> Actor | None:
        """Who it is, as `actor`; None where only a new cookie would tell: MONAI Label's own client keeps none."""
        actor = self.actor()
        return None if self._is_new(actor) else actor

    def client(self, actor: Actor) -> str:
        """What the next request of the same program has in common with this one.

        That is actor makes it, or the machine where only a new cookie would tell: MONAI Label's own client keeps none.
        """
        if not self._is_new(actor):
            return f"{actor.identified_by} {actor.name}"
        return f"address {self._request.client.host if self._request.client is not None else ''}"

    def _is_new(self, actor: Actor) -> bool:
        return actor.identified_by == "cookie" and actor.name != _browser(self._request.cookies.get(COOKIE, ""))

    def may(self, role: Role) -> bool:
        """Whether they have a role or a higher one."""
        return self._identity.may(role)

    def need(self, role: Role, what: str) -> None:
        """Refuse what only a part of a route's requests may.

        Args:
            role: the role that it needs.
            what: what is wanted, in a sentence such as "a review needs the role 'reviewer'".

        Raises:
            RequestError: 403 if this user has a lower role.
        """
        if not self.may(role):
            raise RequestError(403, f"{what} needs the role {role!r}, and yours is {self._identity.role!r}.")

    def will_download(self, image: str) -> None:
        """Let the program that was just handed out a scan download it without its token, as 3D Slicer's does."""
        downloads: Downloads = self._request.app.state.downloads
        if self._identity.by_token and self._request.client is not None:
            downloads.allow(self._request.client.host, image, self._identity)


def _browser(cookie: str) -> str:
    """What a browser is called: always the same, and it does not tell the cookie, by which others could pass for it."""
    return f"browser-{hashlib.sha256(cookie.encode()).hexdigest()[:_SHOWN_HASH]}"


async def request_user(
    request: Request, response: Response, client_id: Annotated[ClientId | None, Query()] = None
) -> RequestUser:
    """The dependency of routes that have to know who asks; a coroutine, as FastAPI gives functions a thread each."""
    return RequestUser(request, response, identity_of(request.scope), client_id)


@contextlib.contextmanager
def acting(actor: Actor) -> Iterator[None]:
    """Have what MONAI Label's interfaces do in this block be done by this actor: they do not pass it on."""
    token = _current.set(actor)
    try:
        yield
    finally:
        _current.reset(token)


def current_actor() -> Actor:
    """The actor of this block; the server itself outside of any."""
    return _current.get()
