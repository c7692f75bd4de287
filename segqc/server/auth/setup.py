"""An application whose users sign in: its gate, and what its sign-in routes work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fastapi import FastAPI, Request

from segqc.server.auth.gate import Downloads, Gate
from segqc.server.auth.oidc import Provider
from segqc.server.auth.sign_in import Desk
from segqc.server.errors import Refuse, refuse_in_json
from segqc.settings import AuthSettings
from segqc.store.store import Store

_COOKIE: Final = "segqc_session"


@dataclass(frozen=True, slots=True)
class Auth:
    """How users sign in.

    Attributes:
        sign_in: whether they do.
        settings: the table ``[auth]``.
        cookie: the name of the session's cookie.
        store: gives the dataset folder's store.
        desk: where passwords are checked.
        provider: the OpenID provider; None without one.
    """

    sign_in: bool
    settings: AuthSettings
    cookie: str
    store: Callable[[], Store]
    desk: Desk
    provider: Provider | None


def add_auth(
    app: FastAPI,
    settings: AuthSettings,
    store: Callable[[], Store],
    *,
    sign_in: bool,
    port: int,
    refuse: Refuse = refuse_in_json,
) -> None:
    """Put the gate before an application; middleware that is added later stands before it.

    Args:
        app: the application.
        settings: the table ``[auth]``.
        store: gives the dataset folder's store.
        sign_in: whether users sign in.
        port: where the server listens: a browser keeps the cookies of two servers on one machine apart by it.
        refuse: answers requests that may not pass.
    """
    cookie = f"{_COOKIE}_{port}"
    provider = None if settings.oidc is None else Provider(settings.oidc)
    app.state.auth = Auth(sign_in, settings, cookie, store, Desk(settings), provider)
    app.state.downloads = Downloads(60 * settings.download_minutes)
    app.add_middleware(
        Gate,
        sign_in=sign_in,
        settings=settings,
        cookie=cookie,
        store=store,
        downloads=app.state.downloads,
        refuse=refuse,
    )


def auth_of(request: Request) -> Auth:
    """How users of the application sign in that a request is made to."""
    found: Auth = request.app.state.auth
    return found
