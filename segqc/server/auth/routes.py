"""The routes of signing in: as MONAI Label's clients call them, and for browsers."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Final, Literal, TypeAlias
from urllib.parse import urlsplit

import anyio.to_thread
from fastapi import APIRouter, Form, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from segqc.errors import SegqcError
from segqc.server.auth.gate import SIGN_IN_PAGE, session_of
from segqc.server.auth.identity import identity_of
from segqc.server.auth.oidc import FLOW_SECONDS, Provider
from segqc.server.auth.setup import Auth, auth_of
from segqc.server.auth.sign_in import NewSignIn
from segqc.server.errors import RequestError
from segqc.server.pages import assets
from segqc.store.records import JsonObject

router = APIRouter(prefix="/auth", tags=["Auth"])

View: TypeAlias = Literal["sign-in", "token"]

_templates: Final = Environment(
    loader=PackageLoader("segqc.server.auth"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
_templates.globals.update(asset=assets.address)
_OWN_PAGE: Final = re.compile(r"/(?![/\\])[^\x00-\x1f\x7f]*")
_FLOW_PATH: Final = "/auth/oidc"
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
_PRIVATE: Final = {"Cache-Control": "no-store"}

_TITLES: Final[Mapping[View, str]] = {"sign-in": "Sign in to SegQC", "token": "A token for 3D Slicer"}

Name = Annotated[str, Form(description="The user's name.")]
Password = Annotated[str, Form(description="The user's password.")]
NextPage = Annotated[str, Query(description="The page to open afterwards.")]


@router.get("/", summary="Whether users sign in")
def is_enabled(request: Request) -> JsonObject:
    """Tell clients whether they need a token."""
    return {"enabled": auth_of(request).sign_in, "client_id": "", "realm": ""}


@router.post("/token", summary="Get a token")
async def new_token(request: Request, response: Response, username: Name, password: Password) -> JsonObject:
    """Give a program a token for a name and a password, to be sent as ``Authorization: Bearer``."""
    auth = auth_of(request)
    if not auth.sign_in:
        raise RequestError(409, "nobody signs in here: no token is needed.")
    made = await auth.desk.by_password(auth.store(), username, password, "token", _address(request))
    response.headers.update(_PRIVATE)
    seconds = (made.record.expires_at - made.record.made_at).total_seconds()
    return {"access_token": made.secret, "token_type": "bearer", "expires_in": int(seconds)}


@router.get("/token/valid", summary="Who is signed in")
def who(request: Request) -> JsonObject:
    """Tell who makes this request, and what they may do; 401 where nobody is signed in."""
    identity = identity_of(request.scope)
    actor = identity.actor
    return {
        "username": "anybody" if actor is None else actor.name,
        "email": None,
        "name": None if actor is None else actor.name,
        "roles": [identity.role],
        "identified_by": None if actor is None else actor.identified_by,
    }


@router.delete("/token", summary="Give a token back")
def end_token(request: Request) -> JsonObject:
    """End the token that this request is made with."""
    auth = auth_of(request)
    auth.desk.end(auth.store(), request.headers.get("authorization", "").partition(" ")[2].strip())
    return {}


# ------------------------------------------------------------------------------------------------------------- browsers


@router.get("/sign-in", include_in_schema=False)
def sign_in_page(request: Request, next: NextPage = "/") -> Response:
    """The page at which people sign in."""
    auth = auth_of(request)
    return _page(auth, next) if auth.sign_in else RedirectResponse("/", 303)


@router.post("/sign-in", include_in_schema=False)
async def sign_in(request: Request, username: Name, password: Password, next: Annotated[str, Form()] = "/") -> Response:
    """Begin a browser's session."""
    auth = auth_of(request)
    if not auth.sign_in:
        return RedirectResponse("/", 303)
    try:
        made = await auth.desk.by_password(auth.store(), username, password, "session", _address(request))
    except HTTPException as error:
        return _page(auth, next, username, str(error.detail), error.status_code, error.headers)
    except SegqcError as error:
        return _page(auth, next, username, str(error), error.status)
    return _signed_in(request, auth, made, next)


@router.post("/sign-out", include_in_schema=False)
def sign_out(request: Request) -> Response:
    """End a browser's session."""
    auth = auth_of(request)
    if (secret := session_of(request.headers, auth.cookie)) is not None:
        auth.desk.end(auth.store(), secret)
    answer = RedirectResponse(SIGN_IN_PAGE, 303, _PRIVATE)
    answer.delete_cookie(auth.cookie, httponly=True, samesite="lax", secure=_is_secure(request))
    return answer


@router.get("/tokens", include_in_schema=False)
def token_page(request: Request) -> Response:
    """The page at which people without a password here get a token for 3D Slicer."""
    actor = identity_of(request.scope).actor
    return RedirectResponse("/", 303) if actor is None else _page(auth_of(request), view="token", username=actor.name)


@router.post("/tokens", include_in_schema=False)
def make_token(request: Request) -> Response:
    """Make a token for a program of whoever is signed in, and show it once."""
    auth, actor = auth_of(request), identity_of(request.scope).actor
    if actor is None:
        return RedirectResponse("/", 303)
    try:
        made = auth.desk.for_program(auth.store(), actor, _address(request))
    except SegqcError as error:
        return _page(auth, view="token", username=actor.name, problem=str(error), status=error.status)
    until = made.record.expires_at.strftime("%Y-%m-%d %H:%M UTC")
    return _page(auth, view="token", username=actor.name, token=made.secret, until=until)


@router.get("/oidc", include_in_schema=False)
def begin_at_provider(request: Request, next: NextPage = "/") -> Response:
    """Send a browser to the OpenID provider."""
    auth = auth_of(request)
    redirect_uri = f"{request.base_url}{_FLOW_PATH.removeprefix('/')}/callback"
    try:
        address, state = _provider(auth).begin(redirect_uri, _own_page(next))
    except SegqcError as error:
        return _page(auth, next, problem=str(error), status=error.status)
    answer = RedirectResponse(address, 303, _PRIVATE)
    answer.set_cookie(
        f"{auth.cookie}_oidc",
        state,
        max_age=FLOW_SECONDS,
        path=_FLOW_PATH,
        httponly=True,
        samesite="lax",
        secure=_is_secure(request),
    )
    return answer


@router.get("/oidc/callback", include_in_schema=False)
async def end_at_provider(request: Request, state: str = "", code: str = "", error: str = "") -> Response:
    """Begin the session of a browser that comes back from the OpenID provider."""
    auth = auth_of(request)
    begun = request.cookies.get(f"{auth.cookie}_oidc", "")
    try:
        provider = _provider(auth)
        if not state or not secrets.compare_digest(state.encode(), begun.encode()):
            raise RequestError(401, "this sign-in was begun too long ago, or elsewhere; begin it again.")
        if error or not code:
            raise RequestError(401, f"the OpenID provider did not sign you in ({(error or 'no code')[:80]}).")
        provided, then = await anyio.to_thread.run_sync(provider.finish, state, code)
        made = await anyio.to_thread.run_sync(auth.desk.by_provider, auth.store(), provided, _address(request))
    except SegqcError as problem:
        return _page(auth, problem=str(problem), status=problem.status)
    answer = _signed_in(request, auth, made, then)
    answer.delete_cookie(f"{auth.cookie}_oidc", path=_FLOW_PATH)
    return answer


def _provider(auth: Auth) -> Provider:
    if auth.provider is None or not auth.sign_in:
        raise RequestError(404, "no OpenID provider signs users in here.")
    return auth.provider


def _signed_in(request: Request, auth: Auth, made: NewSignIn, then: str) -> Response:
    answer = RedirectResponse(_own_page(then), 303, _PRIVATE)
    answer.set_cookie(
        auth.cookie,
        made.secret,
        max_age=int(auth.settings.session_hours * 3600),
        httponly=True,
        samesite="lax",  # the way back from the provider, and links from mails, find the session
        secure=_is_secure(request),
    )
    return answer


def _page(
    auth: Auth,
    then: str = "/",
    username: str = "",
    problem: str = "",
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    *,
    view: View = "sign-in",
    token: str = "",
    until: str = "",
) -> HTMLResponse:
    oidc = auth.settings.oidc
    page = _templates.get_template("page.html").render(
        title=_TITLES[view],
        view=view,
        problem=problem,
        username=username,
        next=_own_page(then),
        provider="" if oidc is None else urlsplit(oidc.issuer).hostname,
        token=token,
        until=until,
    )
    return HTMLResponse(page, status, {**_PRIVATE, "Content-Security-Policy": _POLICY, **(headers or {})})


def _own_page(page: str) -> str:
    """A page of this server; the first one in place of anything else."""
    return page if _OWN_PAGE.fullmatch(page) else "/"


def _is_secure(request: Request) -> bool:
    return request.url.scheme == "https"


def _address(request: Request) -> str:
    return request.client.host if request.client is not None else ""
