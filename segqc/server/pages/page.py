"""What the pages share: who asks, the templates, headers that keep a page to itself, and notices after an action."""

from __future__ import annotations

import datetime as dt
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Final, TypeAlias, TypeVar
from urllib.parse import quote, unquote

from fastapi import Depends, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from segqc import __version__
from segqc.server.actors import RequestUser
from segqc.server.auth.identity import identity_of
from segqc.server.monailabel.facade import App, current_app
from segqc.server.monailabel.strategy import estimate_warning
from segqc.server.pages import assets, words
from segqc.server.parameters import MAX_INTEGER
from segqc.server.routers.dependencies import AskingUser
from segqc.store.records import Actor, Role
from segqc.text import visible, write_csv

T = TypeVar("T")

Columns: TypeAlias = Mapping[str, Callable[[T], object]]
"""What a table's cells hold, by their headings."""

Seen: TypeAlias = Annotated[int | None, Form(ge=0, le=MAX_INTEGER)]
"""The newest label version on the page that a reviewer's decision comes from."""

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""The content security policy of pages: nothing from elsewhere, and nothing inline."""
_NOTICE: Final = "segqc_notice"
_NOTICE_SECONDS: Final = 60
_MAX_NOTICE: Final = 600  # characters

_templates = Environment(
    loader=PackageLoader("segqc.server.pages"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.globals.update(asset=assets.address, version=__version__)
_templates.filters.update(
    number=words.number,
    count=words.count,
    share=words.share,
    duration=words.duration,
    moment=words.moment,
    person=words.person,
    age=words.age,
    visible=visible,
    segment=lambda text: quote(text, safe=""),
)


def html(template: str, values: Mapping[str, object], *, status: int = 200) -> HTMLResponse:
    """A page, or a part of one, of a template."""
    return HTMLResponse(
        _templates.get_template(template).render(values),
        status,
        headers={
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "same-origin",
            "Cache-Control": "private, no-cache",
        },
    )


class Page:
    """One request for a page: who asks, and how it is answered."""

    def __init__(self, request: Request, response: Response, user: RequestUser) -> None:
        self.request = request
        self.user = user
        self._headers = response  # cookies that were set while the request was looked at

    @property
    def app(self) -> App:
        """The running app."""
        return current_app()

    @property
    def actor(self) -> Actor:
        """Who asks."""
        return self.user.actor()

    @property
    def warning(self) -> str | None:
        """Why the estimated Dice cannot be relied on; None where nothing speaks against it."""
        dataset = self.app.context.dataset
        return estimate_warning(dataset.report_card(), dataset.drift_alarm())

    def may(self, role: Role) -> bool:
        """Whether who asks may do what this role may."""
        return identity_of(self.request.scope).may(role)

    @property
    def is_signed_in(self) -> bool:
        """Whether who asks has signed in here, and so can sign out."""
        actor = identity_of(self.request.scope).actor
        return actor is not None and actor.identified_by != "trusted-header"

    def render(self, template: str, **values: object) -> Response:
        """Answer with a template; a notice that an action has left is shown once."""
        actor = self.actor
        notice = unquote(self.request.cookies.get(_NOTICE, ""))
        answer = html(
            template,
            {
                "me": actor,
                "may": self.may,
                "is_signed_in": self.is_signed_in,
                "notice": notice[1:],
                "notice_kind": "problem" if notice.startswith("!") else "done",
                "now": dt.datetime.now(dt.UTC),
                "path": self.request.url.path,
                **values,
            },
        )
        if notice:
            answer.delete_cookie(_NOTICE, httponly=True, samesite="strict")
        return self._with_cookies(answer)

    def go(self, address: str, notice: str | None = None, *, problem: bool = False) -> Response:
        """Send the browser on after an action, to a page that shows a notice."""
        answer = RedirectResponse(address, status_code=303)
        if notice is not None:
            text = ("!" if problem else " ") + notice[:_MAX_NOTICE]
            answer.set_cookie(_NOTICE, quote(text, safe=""), max_age=_NOTICE_SECONDS, httponly=True, samesite="strict")
        return self._with_cookies(answer)

    def _with_cookies(self, answer: Response) -> Response:
        answer.headers.raw.extend(self._headers.headers.raw)
        return answer


async def _page(request: Request, response: Response, user: AskingUser) -> Page:
    return Page(request, response, user)


AskedPage = Annotated[Page, Depends(_page)]


def csv_file(name: str, columns: Columns[T], rows: Iterable[T]) -> Response:
    """A table as a CSV file to download, with its headings above, whether or not it has rows."""
    text = io.StringIO()
    write_csv(text, [{heading: cell(row) for heading, cell in columns.items()} for row in rows], list(columns))
    named = f"attachment; filename*=UTF-8''{quote(name, safe='')}.csv"
    headers = {"Content-Disposition": named, "X-Content-Type-Options": "nosniff", "Cache-Control": "private, no-cache"}
    return Response(text.getvalue(), media_type="text/csv; charset=utf-8", headers=headers)


def wants_page(request: Request) -> bool:
    """Whether a person's browser asks, who is better served by a page than by JSON."""
    return "text/html" in request.headers.get("accept", "")


def error_page(request: Request, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> HTMLResponse:
    """The page that says why a request was refused."""
    back = request.headers.get("referer", "")
    is_own = back.startswith(str(request.base_url)) and back != str(request.url)
    values = {"status": status, "sentence": sentence, "back": back if is_own else "/", "path": request.url.path}
    answer = html("error.html.jinja", values, status=status)
    answer.headers.update(headers or {})
    return answer
