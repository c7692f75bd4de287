"""Passwords: what may be one, and their hashes (Argon2id)."""

from __future__ import annotations

import functools
import unicodedata
from typing import Final

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from segqc.errors import SegqcError
from segqc.text import caseless

MIN_LENGTH: Final = 12
MAX_LENGTH: Final = 200

_hasher: Final = PasswordHasher()  # the costs of RFC 9106's second choice: 64 MiB, a third of a second


class WeakPassword(SegqcError):  # noqa: N818 - the finding, not the exception, is what callers name
    """This can be no password; says why."""


def hash_password(password: str, name: str) -> str:
    """The hash of a new password.

    Args:
        password: the password.
        name: the user's name, which is no password.

    Raises:
        WeakPassword: if it is too short, too long, or the name.
    """
    if not MIN_LENGTH <= len(password) <= MAX_LENGTH:
        raise WeakPassword(f"a password has {MIN_LENGTH} to {MAX_LENGTH} characters; this one has {len(password)}")
    if caseless(password) == caseless(name) or len(set(password)) < 4:
        raise WeakPassword("this password is easily guessed; choose another one")
    return _hasher.hash(_plain(password))


def matches(password: str, password_hash: str | None) -> bool:
    """Whether a password has this hash; without a hash it takes as long to say no, so that no time tells of a user."""
    if len(password) > MAX_LENGTH:
        return False
    try:
        kept = _nobodys() if password_hash is None else password_hash
        return _hasher.verify(kept, _plain(password)) and password_hash is not None
    except (VerificationError, InvalidHashError, UnicodeEncodeError):
        return False


def is_outdated(password_hash: str) -> bool:
    """Whether a hash was made by other costs than those of now."""
    return _hasher.check_needs_rehash(password_hash)


def rehash(password: str) -> str:
    """The hash of a password that was right, by the costs of now."""
    return _hasher.hash(_plain(password))


@functools.cache
def _nobodys() -> str:
    return _hasher.hash("the password of no user")


def _plain(password: str) -> str:
    """The same text from every keyboard (NFKC, as NIST SP 800-63B has it)."""
    return unicodedata.normalize("NFKC", password)
