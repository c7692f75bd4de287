"""Signing in at an OpenID provider: the code flow with PKCE, state and nonce."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import requests
from authlib.common.security import generate_token
from authlib.integrations.base_client import OAuthError
from authlib.integrations.requests_client import OAuth2Session
from authlib.oidc.core import CodeIDToken
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet, KeySetSerialization

from segqc.server.auth.identity import ROLES
from segqc.server.errors import RequestError
from segqc.settings import OidcSettings
from segqc.store.records import Role

FLOW_SECONDS: Final = 600
"""So long a user may take at the provider."""
_TIMEOUT_SECONDS: Final = 10
_FRESH_SECONDS: Final = 3600  # what the provider says of itself
_LEEWAY_SECONDS: Final = 60  # by which its clock may differ
_MAX_FLOWS: Final = 10_000
# by keys that everybody may know: with a shared secret, or none, anybody who knows it could make tokens
_ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")


@dataclass(frozen=True, slots=True)
class ProvidedUser:
    """Whom the provider has signed in.

    Attributes:
        name: what they are called.
        subject: who they are there, whatever their name becomes.
        role: what they may do by their groups there; None where none of these is a role.
    """

    name: str
    subject: str
    role: Role | None


@dataclass(frozen=True, slots=True)
class _Flow:
    nonce: str
    verifier: str
    redirect_uri: str
    then: str
    until: float


class Provider:
    """An OpenID provider, and the sign-ins that are under way there."""

    def __init__(self, settings: OidcSettings, clock: Callable[[], float] = time.monotonic) -> None:
        """Prepare; the provider is asked when the first user signs in.

        Args:
            settings: where it is, and what its claims mean.
            clock: gives the time.
        """
        self._settings = settings
        self._clock = clock
        self._flows: dict[str, _Flow] = {}
        self._found: tuple[float, dict[str, Any]] | None = None
        self._keys: KeySet | None = None

    def begin(self, redirect_uri: str, then: str) -> tuple[str, str]:
        """Begin to sign somebody in.

        Args:
            redirect_uri: where the provider sends the browser back to.
            then: the page that was wanted.

        Returns:
            Where to send the browser, and the state that it has to bring back.

        Raises:
            RequestError: 503 if the provider does not answer.
        """
        state, nonce, verifier = generate_token(43), generate_token(43), generate_token(64)
        with self._session(redirect_uri) as session:
            address, _ = session.create_authorization_url(
                self._metadata()["authorization_endpoint"], state=state, nonce=nonce, code_verifier=verifier
            )
        self._flows[state] = _Flow(nonce, verifier, redirect_uri, then, self._clock() + FLOW_SECONDS)
        while len(self._flows) > _MAX_FLOWS:
            del self._flows[next(iter(self._flows))]
        return str(address), state

    def finish(self, state: str, code: str) -> tuple[ProvidedUser, str]:
        """Finish to sign somebody in.

        Args:
            state: what the browser brought back; it counts once.
            code: what the provider gave it.

        Returns:
            The user, and the page that was wanted.

        Raises:
            RequestError: 401 if the sign-in cannot be believed, 503 if the provider does not answer.
        """
        flow = self._flows.pop(state, None)
        if flow is None or self._clock() > flow.until:
            raise RequestError(401, "this sign-in was begun too long ago, or elsewhere; begin it again.")
        metadata = self._metadata()
        with self._session(flow.redirect_uri) as session:
            try:
                token = session.fetch_token(metadata["token_endpoint"], code=code, code_verifier=flow.verifier)
            except OAuthError as error:
                raise RequestError(401, f"the OpenID provider refuses this sign-in ({error.error}).") from error
            except requests.RequestException as error:
                raise self._away(error) from error
            claims = self._claims(token, flow.nonce)
            if _at(claims, self._settings.role_claim) is None and "userinfo_endpoint" in metadata:
                claims = {**self._more(session, metadata["userinfo_endpoint"], claims["sub"]), **claims}
        return self._user(claims), flow.then

    def _session(self, redirect_uri: str) -> OAuth2Session:
        secret = self._settings.client_secret
        return OAuth2Session(
            client_id=self._settings.client_id,
            client_secret=None if secret is None else secret.get_secret_value(),
            token_endpoint_auth_method="none" if secret is None else "client_secret_basic",
            scope=" ".join(["openid", *self._settings.scopes]),
            redirect_uri=redirect_uri,
            code_challenge_method="S256",
            default_timeout=_TIMEOUT_SECONDS,
        )

    def _metadata(self) -> dict[str, Any]:
        """What the provider says of itself."""
        if self._found is None or self._clock() - self._found[0] > _FRESH_SECONDS:
            found = self._get(f"{self._settings.issuer.rstrip('/')}/.well-known/openid-configuration")
            if found.get("issuer") != self._settings.issuer:
                raise RequestError(
                    503, f"what answers at {self._settings.issuer} calls itself {str(found.get('issuer'))[:200]!r}."
                )
            self._found, self._keys = (self._clock(), found), None
        return self._found[1]

    def _get(self, address: str) -> dict[str, Any]:
        try:
            answer = requests.get(address, timeout=_TIMEOUT_SECONDS)
            answer.raise_for_status()
            body: dict[str, Any] = answer.json()
        except (requests.RequestException, ValueError) as error:
            raise self._away(error) from error
        return body

    def _away(self, error: Exception) -> RequestError:
        return RequestError(503, f"the OpenID provider at {self._settings.issuer} does not answer ({error}).")

    def _claims(self, token: Mapping[str, Any], nonce: str) -> dict[str, Any]:
        """The claims of an ID token, whose signature, issuer, audience, times and nonce are right.

        Raises:
            RequestError: 401 if one of them is not.
        """
        settings = self._settings
        try:
            found = self._decoded(str(token.get("id_token", "")))
            claims = CodeIDToken(
                found.claims,
                found.header,
                {"iss": {"essential": True, "value": settings.issuer}, "aud": {"value": settings.client_id}},
                {"nonce": nonce, "client_id": settings.client_id, "access_token": token.get("access_token")},
            )
            claims.validate(leeway=_LEEWAY_SECONDS)
        except (JoseError, ValueError) as error:
            raise RequestError(401, f"the OpenID provider's token cannot be believed ({error}).") from error
        return dict(claims)

    def _decoded(self, id_token: str) -> jwt.Token:
        if self._keys is not None:
            try:
                return jwt.decode(id_token, self._keys, algorithms=list(_ALGORITHMS))
            except InvalidKeyIdError:
                pass  # the provider has new ones
        self._keys = KeySet.import_key_set(cast(KeySetSerialization, self._get(self._metadata()["jwks_uri"])))
        return jwt.decode(id_token, self._keys, algorithms=list(_ALGORITHMS))

    def _more(self, session: OAuth2Session, address: str, subject: str) -> dict[str, Any]:
        """What the provider tells of a user beside the ID token."""
        try:
            answer = session.get(address)
            answer.raise_for_status()
            body: dict[str, Any] = answer.json()
        except (requests.RequestException, OAuthError, ValueError) as error:
            raise self._away(error) from error
        return body if body.get("sub") == subject else {}

    def _user(self, claims: Mapping[str, Any]) -> ProvidedUser:
        name = _at(claims, self._settings.name_claim)
        if not isinstance(name, str) or not name:
            raise RequestError(401, f"the OpenID provider's token has no claim {self._settings.name_claim!r}.")
        groups = _at(claims, self._settings.role_claim)
        mine = [groups] if isinstance(groups, str) else groups if isinstance(groups, list) else []
        roles = {self._settings.roles[group] for group in mine if group in self._settings.roles}
        return ProvidedUser(name, f"{self._settings.issuer} {claims['sub']}", max(roles, key=ROLES.index, default=None))


def _at(claims: Mapping[str, Any], path: str) -> object:
    """A claim by its path; a name with dots in it comes before a way through objects."""
    if path in claims:
        return claims[path]
    found: object = claims
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
