"""``segqc users``: who may sign in to the server of a dataset folder, and as what."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated, Final

import typer

from segqc.cli.common import AsCsv, AsJson, CommandError, DatasetFolder, Row, emit, kept_store, me

app = typer.Typer(
    no_args_is_help=True, help="Say who may sign in to the server of a dataset folder, and what they may do there."
)

_TERMS: Final = (
    "role: an annotator labels, a reviewer also approves, rejects and restores, an operator also trains, stops and "
    "removes. signs in by: a password kept here; an OpenID provider; or elsewhere, a proxy or a provider that has not "
    "signed them in yet. open: sessions and tokens that count now."
)
_NONE: Final = "There is no user yet. Add the first one, an operator: segqc users add FOLDER NAME"


class RoleName(StrEnum):
    """What a user may do."""

    ANNOTATOR = "annotator"
    REVIEWER = "reviewer"
    OPERATOR = "operator"


UserName = Annotated[str, typer.Argument(metavar="NAME", help="The user's name.", show_default=False)]


@app.command()
def add(
    folder: DatasetFolder,
    name: UserName,
    role: Annotated[
        RoleName | None, typer.Option(help="What they may do (default: annotator; the first user is an operator).")
    ] = None,
    elsewhere: Annotated[
        bool, typer.Option("--elsewhere", help="Without a password: a proxy or an OpenID provider signs them in.")
    ] = False,
) -> None:
    """Add a user, with a password that is asked for, or read as one line where the input is no terminal."""
    from segqc.store import users

    store = kept_store(folder, may_begin=True)
    with store.read() as transaction:
        is_first = not users.listing(transaction)
        if users.find(transaction, name) is not None:
            raise CommandError(f"{folder}: there is a user {name!r} already")
    chosen = role or (RoleName.OPERATOR if is_first else RoleName.ANNOTATOR)
    password_hash = None if elsewhere else _new_password(name)
    with store.write() as transaction:
        user = users.add(transaction, name, chosen.value, password_hash, me())
    typer.echo(f"{folder}: {user.name} may sign in as {user.role}")


@app.command("list")
def list_users(folder: DatasetFolder, as_json: AsJson = False, as_csv: AsCsv = False) -> None:
    """List the users: what they may do, and when they last signed in."""
    from segqc.store import users

    with kept_store(folder).read() as transaction:
        found, opened = users.listing(transaction), users.open_sign_ins(transaction)
    rows: list[Row] = [
        {
            "name": user.name,
            "role": user.role,
            "signs in by": "password" if user.has_password else "provider" if user.provider_subject else "elsewhere",
            "added": user.added_at.isoformat(timespec="seconds"),
            "last sign-in": None
            if user.last_sign_in_at is None
            else user.last_sign_in_at.isoformat(timespec="seconds"),
            "open": opened.get(user.name, 0),
        }
        for user in found
    ]
    emit(rows, f"{folder}: users", as_json=as_json, as_csv=as_csv, key="users", terms=_TERMS, empty=_NONE)


@app.command()
def history(folder: DatasetFolder, as_json: AsJson = False, as_csv: AsCsv = False) -> None:
    """List who was added, given a role or password, or removed, by whom, and who signed in and out, when and where."""
    from segqc.store import users

    with kept_store(folder).read() as transaction:
        found = users.history(transaction)
    rows: list[Row] = [
        {
            "at": event.at.isoformat(timespec="seconds"),
            "user": name,
            "what": event.verb,
            "by": event.actor.name,
            "known by": event.actor.identified_by,
            "detail": ", ".join(f"{key} {value}" for key, value in (event.detail or {}).items() if key != "name"),
        }
        for name, event in found
    ]
    emit(rows, f"{folder}: what happened to users", as_json=as_json, as_csv=as_csv, key="events", empty=_NONE)


@app.command()
def remove(folder: DatasetFolder, name: UserName) -> None:
    """Remove a user: their sessions and tokens end at once, and what they did stays in the history.

    Do not give the name to somebody else: the history could not tell the two apart.
    """
    from segqc.store import users

    with kept_store(folder).write() as transaction:
        user = users.remove(transaction, name, me())
    typer.echo(f"{folder}: {user.name} cannot sign in any more")


@app.command()
def password(folder: DatasetFolder, name: UserName) -> None:
    """Give a user another password, asked for as by 'segqc users add'; their sessions and tokens end at once."""
    from segqc.store import users

    store = kept_store(folder)
    with store.read() as transaction:
        users.get(transaction, name)
    password_hash = _new_password(name)
    with store.write() as transaction:
        user = users.set_password(transaction, name, password_hash, me())
    typer.echo(f"{folder}: {user.name} signs in with the new password from now on")


@app.command()
def role(
    folder: DatasetFolder,
    name: UserName,
    role: Annotated[RoleName, typer.Argument(metavar="ROLE", help="annotator, reviewer or operator.")],
) -> None:
    """Give a user another role: it counts from the next request on."""
    from segqc.store import users

    with kept_store(folder).write() as transaction:
        user = users.set_role(transaction, name, role.value, me())
    typer.echo(f"{folder}: {user.name} is {user.role}")


@app.command("sign-out")
def sign_out(folder: DatasetFolder, name: UserName) -> None:
    """End all sessions and tokens of a user, who can sign in again."""
    from segqc.store import users

    with kept_store(folder).write() as transaction:
        count = users.end_all(transaction, name, me())
    typer.echo(f"{folder}: {count} session{'' if count == 1 else 's'} and tokens of {name} ended")


def _new_password(name: str) -> str:
    """The hash of a password that is typed twice, or read as a line: it never stands on a command line."""
    try:
        from segqc.server.auth.passwords import hash_password
    except ImportError as error:
        if error.name is None or not error.name.startswith("argon2"):
            raise
        raise CommandError("the server is not installed; pip install 'segqc[server]'") from error
    if sys.stdin.isatty():
        typed: str = typer.prompt(f"Password of {name}", hide_input=True, confirmation_prompt=True, err=True)
    else:
        typed = sys.stdin.readline().rstrip("\r\n")
    return hash_password(typed, name)
