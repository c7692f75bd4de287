"""Who makes a request, and what they may do."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Final

from starlette.types import Scope

from segqc.store.records import Actor, Role

ROLES: Final[tuple[Role, ...]] = ("annotator", "reviewer", "operator")
"""From the one that may do least; each may do what those before it may."""

_KEY: Final = "segqc.identity"
_SECRET_BYTES: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who makes a request.

    Attributes:
        role: what they may do.
        actor: who they are; None where nobody signs in, so that clients are who they say they are.
        by_token: whether a program's token tells it.
    """

    role: Role
    actor: Actor | None
    by_token: bool = False

    def may(self, needed: Role) -> bool:
        """Whether this is a role's or a higher one's."""
        return ROLES.index(self.role) >= ROLES.index(needed)


ANYBODY: Final = Identity(role="operator", actor=None)
"""Whoever makes a request where nobody signs in."""


def identity_of(scope: Scope) -> Identity:
    """Who makes a request, as the gate has found out; a mistake of ours where it has not, as on public routes."""
    found: Identity = scope[_KEY]
    return found


def set_identity(scope: Scope, identity: Identity) -> None:
    """Note who makes a request."""
    scope[_KEY] = identity


def new_secret() -> str:
    """The secret of a session or token: nobody can guess it."""
    return secrets.token_urlsafe(_SECRET_BYTES)


def sha256_of_secret(secret: str) -> str:
    """What is kept of it: it is random, so that no slow hash is needed against guessing."""
    return hashlib.sha256(secret.encode()).hexdigest()
