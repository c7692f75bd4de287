"""Who may do what: MONAI Label's users and roles, as dependencies of routes."""

from __future__ import annotations

from typing import Annotated, Final, Protocol

from fastapi import Depends, HTTPException
from jwt import InvalidTokenError
from monailabel.endpoints.user.auth import RBAC, from_token, get_current_user, oauth2_scheme
from pydantic import ValidationError

from segqc.server.monailabel.config import settings


class User(Protocol):
    """Who is signed in; where nobody signs in, a user of all roles."""

    username: str


USER: Final = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))
ANNOTATOR: Final = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))
REVIEWER: Final = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_REVIEWER))
ADMIN: Final = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))

current_user: Final = get_current_user
"""MONAI Label's dependency, which `signed_in_user` takes the place of."""


def signed_in_user(token: Annotated[str, Depends(oauth2_scheme)]) -> User:
    """The user of a token, asked of the sign-in server: MONAI Label's own function blocks all other requests meanwhile.

    Raises:
        HTTPException: 401 for a token that cannot be used, 503 if the sign-in server makes no sense.
        RequestException: if the sign-in server does not answer.
    """
    try:
        user: User = from_token(token)
    except (InvalidTokenError, ValidationError) as error:
        raise HTTPException(401, "sign in first.", {"WWW-Authenticate": "Bearer"}) from error
    except (KeyError, TypeError) as error:
        realm = settings.MONAI_LABEL_AUTH_REALM_URI
        raise HTTPException(503, f"what answers at {realm} is no sign-in server: it has no public key.") from error
    return user
