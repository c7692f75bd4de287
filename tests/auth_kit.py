"""Users to sign in with, and passwords that are hashed quickly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import pytest
from argon2 import PasswordHasher

from segqc.server.auth import passwords
from segqc.store import users
from segqc.store.events import SERVER
from segqc.store.records import Role
from segqc.store.store import Store

PASSWORD: Final = "correct horse battery"
ROLES: Final[dict[str, Role]] = {"anna": "annotator", "rita": "reviewer", "otto": "operator"}


@contextlib.contextmanager
def quick_hashes() -> Iterator[None]:
    """Hash passwords at the lowest cost in this block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passwords, "_hasher", PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
        passwords._nobodys.cache_clear()
        yield
    passwords._nobodys.cache_clear()


def add_users(store: Store) -> None:
    """A user of each role, all with the same password."""
    with store.write() as transaction:
        for name, role in ROLES.items():
            users.add(transaction, name, role, passwords.hash_password(PASSWORD, name), SERVER)
