"""Who may sign in, and the sign-ins that count.

Secrets do not come here: passwords are kept as hashes that somebody else makes and compares, sessions and tokens by the
SHA-256 of their random text.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import Final

from sqlalchemy import delete, func, select

from segqc.store import events
from segqc.store.database import StoreError, Transaction
from segqc.store.records import Actor, EventRecord, Identification, Role, SignInKind, SignInRecord, UserRecord
from segqc.store.schema import SignInRow, UserRow
from segqc.text import caseless, nfc

_USER: Final = "user"
_ADDED: Final = "added"
_NAME: Final = re.compile(r"(?!\s)[^\x00-\x1f\x7f\ud800-\udfff]{1,200}(?<!\s)")


class UnknownUser(StoreError):  # noqa: N818 - the finding, not the exception, is what callers name
    """There is no user of this name."""

    status = 404


def add(
    transaction: Transaction, name: str, role: Role, password_hash: str | None, actor: Actor, subject: str | None = None
) -> UserRecord:
    """Add a user.

    Args:
        transaction: a writing one.
        name: what they sign in by; letters' case does not count.
        role: what they may do.
        password_hash: of their password; None where they are signed in elsewhere.
        actor: who adds them.
        subject: by which an OpenID provider knows them.

    Raises:
        StoreError: if the name cannot be one, or there is a user of this name.
    """
    name = nfc(name)
    if not _NAME.fullmatch(name):
        raise StoreError(f"{name[:40]!r} is no name of a user: wanted 1 to 200 characters without blanks at the ends")
    if _row(transaction, name) is not None:
        raise StoreError(f"there is a user {name!r} already")
    row = UserRow(
        name=name,
        key=caseless(name),
        role=role,
        password_hash=password_hash,
        provider_subject=subject,
        is_role_provided=subject is not None,
        added_at=transaction.now,
    )
    transaction.add(row)
    transaction.flush()
    events.record(transaction, actor, _ADDED, _USER, row.id, {"name": name, "role": role})
    return _record(row)


def get(transaction: Transaction, name: str) -> UserRecord:
    """A user by name.

    Raises:
        UnknownUser: if there is none.
    """
    return _record(_known(transaction, name))


def find(transaction: Transaction, name: str) -> tuple[UserRecord, str | None] | None:
    """A user by name, with the hash of their password; None if there is none."""
    row = _row(transaction, name)
    return None if row is None else (_record(row), row.password_hash)


def listing(transaction: Transaction) -> list[UserRecord]:
    """All users, by name."""
    return [_record(row) for row in transaction.scalars(select(UserRow).order_by(UserRow.key))]


def open_sign_ins(transaction: Transaction) -> dict[str, int]:
    """How many sessions and tokens count now, by the names of users who have any."""
    rows = transaction.execute(
        select(UserRow.name, func.count())
        .join(SignInRow, SignInRow.user_id == UserRow.id)
        .where(SignInRow.expires_at > transaction.now)
        .group_by(UserRow.name)
    )
    return {name: count for name, count in rows}


def remove(transaction: Transaction, name: str, actor: Actor) -> UserRecord:
    """Remove a user; their sessions and tokens end at once, and what they did stays in the history.

    Raises:
        UnknownUser: if there is none of this name.
    """
    row = _known(transaction, name)
    record = _record(row)
    transaction.delete(row)
    transaction.flush()
    events.record(transaction, actor, "removed", _USER, record.id, {"name": record.name})
    return record


def set_password(transaction: Transaction, name: str, password_hash: str, actor: Actor) -> UserRecord:
    """Give a user another password; their sessions and tokens end at once.

    Raises:
        UnknownUser: if there is none of this name.
        StoreError: if an OpenID provider signs them in.
    """
    row = _known(transaction, name)
    if row.provider_subject is not None:
        raise StoreError(f"{row.name!r} is signed in by the OpenID provider; their password is changed there")
    row.password_hash = password_hash
    end_all(transaction, name, actor)
    events.record(transaction, actor, "password set", _USER, row.id)
    return _record(row)


def replace_hash(transaction: Transaction, user: int, password_hash: str) -> None:
    """Keep the hash of the same password by today's costs."""
    transaction.get_one(UserRow, user).password_hash = password_hash


def set_role(transaction: Transaction, name: str, role: Role, actor: Actor) -> UserRecord:
    """Give a user another role, whatever an OpenID provider says; it counts from the next request on.

    Raises:
        UnknownUser: if there is none of this name.
    """
    row = _known(transaction, name)
    row.is_role_provided = False
    return _with_role(transaction, row, role, actor)


def _with_role(transaction: Transaction, row: UserRow, role: Role, actor: Actor) -> UserRecord:
    if row.role != role:
        events.record(transaction, actor, "role set", _USER, row.id, {"before": row.role, "role": role})
        row.role = role
    return _record(row)


def provided(transaction: Transaction, name: str, subject: str, role: Role | None, actor: Actor) -> UserRecord:
    """The user whom an OpenID provider has just signed in; added when it is the first time.

    A user who was added without a password is the one of this name at the provider from then on.

    Args:
        transaction: a writing one.
        name: their name, as the provider says.
        subject: by which the provider knows them, whatever their name becomes.
        role: their role, as the provider says; None for the one that an operator gave them here.
        actor: the user themselves.

    Raises:
        StoreError: if the name is another user's, or nobody says what they may do.
    """
    row = transaction.scalar(select(UserRow).where(UserRow.provider_subject == subject))
    if row is None:
        row = _row(transaction, name)
        if row is None:
            if role is None:
                raise StoreError(f"nobody has said what {name!r} may do here; an operator can ('segqc users add')")
            return add(transaction, name, role, None, actor, subject)
        if row.password_hash is not None or row.provider_subject is not None:
            raise StoreError(f"the name {row.name!r} is another user's here; an operator can remove that one")
        row.provider_subject = subject
    if role is not None:
        row.is_role_provided = True
        return _with_role(transaction, row, role, actor)
    if row.is_role_provided:
        raise StoreError(f"the OpenID provider does not say any more what {row.name!r} may do here")
    return _record(row)


def begin(
    transaction: Transaction,
    user: UserRecord,
    kind: SignInKind,
    sha256: str,
    identified_by: Identification,
    lifetime: dt.timedelta,
    address: str,
) -> SignInRecord:
    """Keep a new session or token; those that have expired are removed.

    Args:
        transaction: a writing one.
        user: whose.
        kind: of a browser, or of a program.
        sha256: of its secret.
        identified_by: how it was known who it is.
        lifetime: for how long it counts.
        address: where the request came from.

    Raises:
        UnknownUser: if the user was removed meanwhile.
    """
    transaction.execute(delete(SignInRow).where(SignInRow.expires_at <= transaction.now))
    row = transaction.get(UserRow, user.id)
    if row is None:  # removed a moment ago
        raise UnknownUser(f"there is no user {user.name!r}")
    row.last_sign_in_at = transaction.now
    made = SignInRow(
        user_id=user.id,
        kind=kind,
        sha256=sha256,
        identified_by=identified_by,
        made_at=transaction.now,
        expires_at=transaction.now + lifetime,
    )
    transaction.add(made)
    actor = actor_of(row.name, identified_by)
    events.record(transaction, actor, "signed in", _USER, user.id, {"kind": kind, "address": address})
    return _sign_in(made, row)


def current(transaction: Transaction, sha256: str) -> SignInRecord | None:
    """The sign-in with this secret, if it counts now."""
    found = transaction.execute(
        select(SignInRow, UserRow)
        .join(UserRow, SignInRow.user_id == UserRow.id)
        .where(SignInRow.sha256 == sha256, SignInRow.expires_at > transaction.now)
    ).first()
    return None if found is None else _sign_in(*found)


def end(transaction: Transaction, sha256: str) -> None:
    """End a session or token, if there is one with this secret."""
    found = current(transaction, sha256)
    if found is None:
        return
    transaction.execute(delete(SignInRow).where(SignInRow.sha256 == sha256))
    actor = actor_of(found.user.name, found.identified_by)
    events.record(transaction, actor, "signed out", _USER, found.user.id, {"kind": found.kind})


def end_all(transaction: Transaction, name: str, actor: Actor) -> int:
    """End all sessions and tokens of a user, and say how many there were.

    Raises:
        UnknownUser: if there is none of this name.
    """
    row = _known(transaction, name)
    mine = SignInRow.user_id == row.id
    count = transaction.scalar(select(func.count()).where(mine, SignInRow.expires_at > transaction.now)) or 0
    transaction.execute(delete(SignInRow).where(mine))
    if count:
        events.record(transaction, actor, "signed out", _USER, row.id, {"count": count})
    return count


def history(transaction: Transaction) -> list[tuple[str, EventRecord]]:
    """What happened to users, oldest first, each with the user's name; also to those who were removed."""
    found = events.history(transaction, _USER)
    names = {event.object_id: str((event.detail or {})["name"]) for event in found if event.verb == _ADDED}
    return [(names[event.object_id], event) for event in found]


def actor_of(name: str, identified_by: Identification) -> Actor:
    """A signed-in user as the one who does things: the same one by a session and by a token, as it is one person."""
    return Actor(kind="person", name=name, identified_by=identified_by)


def _row(transaction: Transaction, name: str) -> UserRow | None:
    if not _NAME.fullmatch(nfc(name).strip()):  # the database may not even take it
        return None
    return transaction.scalar(select(UserRow).where(UserRow.key == caseless(name)))


def _known(transaction: Transaction, name: str) -> UserRow:
    row = _row(transaction, name)
    if row is None:
        raise UnknownUser(f"there is no user {name!r}")
    return row


def _record(row: UserRow) -> UserRecord:
    return UserRecord(
        id=row.id,
        name=row.name,
        role=row.role,
        has_password=row.password_hash is not None,
        provider_subject=row.provider_subject,
        added_at=row.added_at,
        last_sign_in_at=row.last_sign_in_at,
    )


def _sign_in(row: SignInRow, user: UserRow) -> SignInRecord:
    return SignInRecord(
        user=_record(user),
        kind=row.kind,
        identified_by=row.identified_by,
        made_at=row.made_at,
        expires_at=row.expires_at,
    )
