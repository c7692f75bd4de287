"""Signing in: names and passwords checked, sessions and tokens begun and ended."""

from __future__ import annotations

import datetime as dt
import logging
from dataclasses import dataclass
from typing import Final

import anyio
import anyio.to_thread

from segqc.server.auth import passwords
from segqc.server.auth.gate import too_many
from segqc.server.auth.identity import new_secret, sha256_of_secret
from segqc.server.auth.oidc import ProvidedUser
from segqc.server.auth.throttle import Throttle
from segqc.server.errors import RequestError
from segqc.settings import AuthSettings
from segqc.store import users
from segqc.store.records import Actor, Identification, SignInKind, SignInRecord, UserRecord
from segqc.store.store import Store
from segqc.text import caseless

logger = logging.getLogger(__name__)

_MAX_NAME: Final = 200
_HASHES_AT_ONCE: Final = 2  # each takes 64 MiB and a third of a second of a core


@dataclass(frozen=True, slots=True)
class NewSignIn:
    """A session or token that has just begun: its secret, which is told once, and what is kept of it."""

    secret: str
    record: SignInRecord


class Desk:
    """Where users sign in and out."""

    def __init__(self, settings: AuthSettings, throttle: Throttle | None = None) -> None:
        """Open.

        Args:
            settings: for how long sign-ins count.
            throttle: slows guessing.
        """
        self._lifetimes: dict[SignInKind, dt.timedelta] = {
            "session": dt.timedelta(hours=settings.session_hours),
            "token": dt.timedelta(hours=settings.token_hours),
        }
        self._throttle = throttle or Throttle()
        self._slots = anyio.CapacityLimiter(_HASHES_AT_ONCE)

    async def by_password(self, store: Store, name: str, password: str, kind: SignInKind, address: str) -> NewSignIn:
        """Sign a user in who knows their password, or has a token, which is what they get then.

        Args:
            store: knows the users.
            name: what was given as the user's name.
            password: what was given as the password.
            kind: what is wanted.
            address: where the request comes from.

        Raises:
            RequestError: 401 if the two do not go together.
            HTTPException: 429 after too many that did not.
        """
        key = caseless(name)[:_MAX_NAME]
        if (wait := self._throttle.begin(key, address)) > 0:
            raise too_many(wait)
        made = await anyio.to_thread.run_sync(
            self._by_password, store, name, password, kind, address, limiter=self._slots
        )
        if made is None:
            logger.warning("%s could not sign in as %r: wrong name or password", address, key)
            raise RequestError(401, "the name or the password is wrong.")
        self._throttle.succeed(key, address)
        return made

    def _by_password(self, store: Store, name: str, password: str, kind: SignInKind, address: str) -> NewSignIn | None:
        with store.read() as transaction:
            found = users.find(transaction, name)
            made = users.current(transaction, sha256_of_secret(password)) if kind == "token" else None
        if made is not None and made.kind == "token" and found is not None and made.user.id == found[0].id:
            return NewSignIn(password, made)
        user, password_hash = found if found is not None else (None, None)
        if not passwords.matches(password, password_hash) or user is None or password_hash is None:
            return None
        if passwords.is_outdated(password_hash):
            with store.write() as transaction:
                users.replace_hash(transaction, user.id, passwords.rehash(password))
        return self._begin(store, user, kind, "signed-in", address)

    def by_provider(self, store: Store, provided: ProvidedUser, address: str) -> NewSignIn:
        """Begin the session of a user whom the OpenID provider has signed in.

        Raises:
            StoreError: if the name is another user's, or nobody says what they may do.
        """
        with store.write() as transaction:
            actor = users.actor_of(provided.name, "oidc")
            user = users.provided(transaction, provided.name, provided.subject, provided.role, actor)
        return self._begin(store, user, "session", "oidc", address)

    def for_program(self, store: Store, actor: Actor, address: str) -> NewSignIn:
        """Begin a token for somebody who is signed in already: for 3D Slicer, where they have no password here.

        Raises:
            UnknownUser: if only a proxy knows them.
        """
        with store.read() as transaction:
            user = users.get(transaction, actor.name)
        return self._begin(store, user, "token", actor.identified_by, address)

    def _begin(
        self, store: Store, user: UserRecord, kind: SignInKind, identified_by: Identification, address: str
    ) -> NewSignIn:
        secret = new_secret()
        with store.write() as transaction:
            record = users.begin(
                transaction, user, kind, sha256_of_secret(secret), identified_by, self._lifetimes[kind], address
            )
        logger.info("%s signed in from %s (%s, %s)", user.name, address, user.role, kind)
        return NewSignIn(secret, record)

    def end(self, store: Store, secret: str) -> None:
        """End a session or token."""
        with store.write() as transaction:
            users.end(transaction, sha256_of_secret(secret))
